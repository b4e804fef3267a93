"""The memory that a rank allocates at most, predicted tensor by tensor from an experiment's sizes.

Counted are the tensors that autograd keeps in Megatron-LM core_v0.19.0 with Transformer Engine
2.19's layers: megatron/core/transformer/{attention,mlp,transformer_layer}.py,
megatron/core/transformer/moe/{router,experts,token_dispatcher}.py, and
transformer_engine/pytorch/module/{layernorm_linear,linear,grouped_linear}.py. The method, and for
GPT-2's layers the result (34 bytes a token and hidden unit), are those of Korthikanti et al. 2022
(arXiv:2205.05198), section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from harness.experiment.experiment import Experiment
from harness.predict.flops import Held, padded_vocab_size, parameters_on, state_on
from harness.predict.timeline import warm_up_passes

GIB = 2**30
WORKSPACE_BYTES = 2**25
"""cuBLAS's on Hopper: PyTorch's, and get_cublas_workspace_size_bytes in
transformer_engine/pytorch/cpp_extensions."""
FSDP_PREFETCH_ELEMENTS = 5e8
"""suggested_AG_prefetch_size in megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py.
"""


@dataclass(frozen=True)
class Memory:
    """GiB on the fullest rank, at the moment when most is allocated."""

    weights: float
    """With their fp8 copies, and what FSDP has gathered."""
    gradients: float
    optimizer: float
    attention: float
    """Activations of attention and its norm, in all layers."""
    mlp: float
    """Activations of MLPs or experts and their norm, in all layers."""
    passing: float
    """What exists only for a moment: logits, or a layer's tensors while it goes backward."""

    @property
    def pieces(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)

    @property
    def activations(self) -> float:
        return self.attention + self.mlp + self.passing

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def predict(experiment: Experiment) -> Memory:
    """What ``experiment`` allocates on its fullest rank, of the first or the last pipeline stage.

    Assumes that routers spread tokens evenly; otherwise the rank with most tokens needs more.
    """
    stages = {0, experiment.pp - 1}
    return max((_on_stage(experiment, stage) for stage in stages), key=lambda memory: memory.total)


def _on_stage(experiment: Experiment, stage: int) -> Memory:
    state, held = state_on(experiment, stage), parameters_on(experiment, stage)
    attention, mlp = attention_bytes(experiment), mlp_bytes(experiment)
    layers = _layers_in_flight(experiment, stage)
    recomputed = 0
    if experiment.recompute == "full":
        # kept is the layer's input; its other activations exist while it goes backward
        recomputed, attention, mlp = attention + mlp, _hidden_bytes(experiment), 0
    passing = recomputed + _backward_bytes(experiment) + _gathered_layer_bytes(experiment, held)
    if stage == experiment.pp - 1:
        passing = max(passing, loss_bytes(experiment))
    passing += _ends_bytes(experiment, stage)
    weights = state.weights + _fp8_copies_bytes(experiment, held)
    weights += _gathered_ends_bytes(experiment, held)
    return Memory(
        weights=weights / GIB,
        gradients=state.gradients / GIB,
        optimizer=state.optimizer / GIB,
        attention=attention * layers / GIB,
        mlp=mlp * layers / GIB,
        passing=passing / GIB,
    )


def attention_bytes(experiment: Experiment) -> float:
    """Bytes that a layer's attention and its norm keep of one micro-batch for the backward pass."""
    model, size = experiment.model, _element_bytes(experiment)
    queries, keys = model.query_size, model.key_size
    # queries, keys, values; the output, which is the projection's input
    per_token = size * (2 * queries + 2 * keys)
    per_token += 4 * model.num_attention_heads  # flash attention's softmax statistics, fp32
    if experiment.precision == "fp8":
        per_token += _saved_bytes(experiment) * queries  # the projection's input, quantised
    if model.attention_output_gate:
        # the gate, a view that holds its buffer; the product
        per_token += size * (2 * queries + 2 * keys) + size * queries
    match model.qk_norm:
        case "head":
            # inputs and fp32 statistics
            per_token += size * (queries + keys) + 4 * (queries + keys) / model.head_size
        case "projection":
            # harness/specs/projection_norm.py, in fp32 and eager
            per_token += (4 + 4 + size) * (queries + keys)
    shared = _norm_bytes(experiment) + _mask_bytes(experiment)
    return shared + per_token * _tokens(experiment) / experiment.tp


def mlp_bytes(experiment: Experiment) -> float:
    """Bytes that a layer's MLP or experts and their norm keep of one micro-batch."""
    model = experiment.model
    if model.num_experts:
        return _experts_bytes(experiment)
    before = _element_bytes(experiment) * model.ffn * model.fc1_matrices
    per_token = before + _saved_bytes(experiment) * model.ffn
    shared = _norm_bytes(experiment) + _mask_bytes(experiment)
    return shared + per_token * _tokens(experiment) / experiment.tp


def _experts_bytes(experiment: Experiment) -> float:
    """Bytes of router, dispatch and experts, with ``moe_router_topk`` copies of each token.

    The norm before experts is not fused with the first matrix. Its output, the router's input, may
    be recomputed (``layernorm``), and so may the activation, the second matrix's input
    (``moe_act``). Clamping as GPT-OSS does keeps its own input as well as the clamped one
    (weighted_bias_quick_geglu_impl in megatron/core/fusions/fused_bias_geglu.py). The product with
    the router's weights in bf16, for which upstream has no fused kernel without a gate, keeps both
    factors.
    """
    model, size = experiment.model, _element_bytes(experiment)
    tokens, modules = _hidden_tokens(experiment), experiment.recompute_modules
    # probabilities (fp32), their map (bool), the rows they go to; fp32 scores of each loss
    scores = (
        bool(model.moe_aux_loss_coeff) + bool(model.moe_z_loss_coeff) + model.moe_router_pre_softmax
    )
    router = model.num_experts * (4 + 1 + 8 + 4 * scores) + 12 * model.moe_router_topk
    norm = model.hidden_size * size * (1 if "layernorm" in modules else 2)
    before = size * model.moe_ffn * model.fc1_matrices
    if "moe_act" in modules:
        activation = before
    else:
        factors = 2 if model.activation == "clamped_quick_geglu" else 1
        weighted = 0 if model.gated else size * model.moe_ffn
        activation = before * factors + weighted + _saved_bytes(experiment) * model.moe_ffn
    rows = tokens * model.moe_router_topk * experiment.etp
    per_row = _saved_bytes(experiment) * model.hidden_size + activation / experiment.etp
    return tokens * (norm + router) + _mask_bytes(experiment) + rows * per_row


def loss_bytes(experiment: Experiment) -> float:
    """Bytes of the logits when the loss needs most of them.

    The unfused loss works in place: its backward pass has the fp32 softmax and a bf16 gradient
    (megatron/core/tensor_parallel/cross_entropy.py). The fused loss is compiled, and writes the
    softmax to a new tensor: two in fp32, and the logits in bf16 (fusions/fused_cross_entropy.py).
    """
    vocabulary = padded_vocab_size(experiment.model.vocab_size, experiment.tp)
    softmax = 8 if experiment.cross_entropy_fusion else 4
    gradient = 2 if experiment.precision != "fp32" else 0
    return _tokens(experiment) * vocabulary / experiment.tp * (softmax + gradient)


def _ends_bytes(experiment: Experiment, stage: int) -> float:
    """Bytes outside of layers: mask, workspaces, embedding's dropout, last norm, logits' input."""
    mask = experiment.micro_batch_size * experiment.seq_length**2 / experiment.cp
    # PyTorch's forward and backward thread, Transformer Engine; with experts, its four streams too
    workspaces = WORKSPACE_BYTES * (7 if experiment.model.num_experts else 3)
    first = _mask_bytes(experiment) if stage == 0 else 0
    last = 2 * _hidden_bytes(experiment) if stage == experiment.pp - 1 else 0
    return mask + workspaces + first + last


def _backward_bytes(experiment: Experiment) -> float:
    """Bytes of a layer's largest gradients, those of its MLP or experts.

    They are of the activation, the input, the output and the first matrix. Without Apex a weight's
    gradient is a tensor of its own before it is accumulated.
    """
    model, size, fc1 = experiment.model, _element_bytes(experiment), experiment.model.fc1_matrices
    hidden = model.hidden_size
    if model.num_experts:
        rows = _hidden_tokens(experiment) * model.moe_router_topk
        experts = model.num_experts // experiment.ep
        matrix = experts * hidden * model.moe_ffn * fc1 / experiment.etp
        return size * (rows * (model.moe_ffn * (fc1 + 1) + hidden) + matrix)
    of_mlp = model.ffn * (_tokens(experiment) * (fc1 + 1) + hidden * fc1) / experiment.tp
    return size * of_mlp + _hidden_bytes(experiment)


def _layers_in_flight(experiment: Experiment, stage: int) -> float:
    """Layers x micro-batches whose activations a rank of ``stage`` keeps at most.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    chunks = experiment.num_microbatches * experiment.vpp
    layers_of_chunk = experiment.model.num_layers / (experiment.pp * experiment.vpp)
    in_flight = warm_up_passes(stage, experiment.pp, experiment.vpp) + 1
    return min(in_flight, chunks) * layers_of_chunk


def _fp8_copies_bytes(experiment: Experiment, held: Held) -> float:
    """Bytes of the quantised weights that Transformer Engine caches, by rows and by columns.

    Source: quantize_weight and _fp8_workspaces in transformer_engine/pytorch/module. Blockwise
    scales are fp32, one for 128 x 128 weights.
    """
    if experiment.precision != "fp8":
        return 0
    scales = 4 / 128**2 if experiment.fp8_recipe == "blockwise" else 0
    return 2 * (held.matrices + held.expert_matrices) * (1 + scales)


def _gathered_ends_bytes(experiment: Experiment, held: Held) -> float:
    """Bytes of embeddings, last norm and output layer, which Megatron-FSDP always holds whole.

    Its units are layers: fsdp_unit_modules in
    megatron/core/distributed/fsdp/mcore_fsdp_adapter.py.
    """
    if experiment.sharding != "fsdp_optim_grads_params":
        return 0
    return held.ends * _element_bytes(experiment)


def _gathered_layer_bytes(experiment: Experiment, held: Held) -> float:
    """Bytes of the layers gathered while one goes backward.

    FSDP2 prefetches one layer, Megatron-FSDP FSDP_PREFETCH_ELEMENTS.
    """
    if not experiment.shards_weights:
        return 0
    layers = experiment.model.num_layers // experiment.pp
    layer = (held.dense - held.ends + held.experts) / layers
    fsdp2 = experiment.sharding == "torch_fsdp2"
    ahead = 1 if fsdp2 else math.ceil(FSDP_PREFETCH_ELEMENTS / layer)
    return min(1 + ahead, layers) * layer * _element_bytes(experiment)


def _norm_bytes(experiment: Experiment) -> float:
    """A norm's input, its output, which is the next product's input, and its fp32 statistics."""
    statistics = 4 * (2 if experiment.model.normalization == "LayerNorm" else 1)
    per_unit = _element_bytes(experiment) + _saved_bytes(experiment)
    return _hidden_tokens(experiment) * (experiment.model.hidden_size * per_unit + statistics)


def _mask_bytes(experiment: Experiment) -> float:
    """Dropout's mask of one hidden state, a byte an element."""
    model = experiment.model
    return _hidden_tokens(experiment) * model.hidden_size if model.dropout else 0


def _hidden_bytes(experiment: Experiment) -> float:
    """One hidden state."""
    width = experiment.model.hidden_size * _element_bytes(experiment)
    return _hidden_tokens(experiment) * width


def _tokens(experiment: Experiment) -> float:
    return experiment.seq_length / experiment.cp * experiment.micro_batch_size


def _hidden_tokens(experiment: Experiment) -> float:
    """Tokens of a hidden state on a rank; sequence parallelism splits them."""
    return _tokens(experiment) / (experiment.tp if experiment.sequence_parallel else 1)


def _element_bytes(experiment: Experiment) -> int:
    return 4 if experiment.precision == "fp32" else 2


def _saved_bytes(experiment: Experiment) -> float:
    """Bytes an element of the input that a linear layer keeps; blockwise, a scale for each 128."""
    if experiment.precision == "fp8":
        return 1 + (4 / 128 if experiment.fp8_recipe == "blockwise" else 0)
    return _element_bytes(experiment)
