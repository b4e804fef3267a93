"""What a rank allocates at most, tensor by tensor: predicted from an experiment's sizes before it
runs.

Counted are the tensors that autograd keeps in Megatron-LM core_v0.19.0 with Transformer Engine
2.19's layers, as read
there: megatron/core/transformer/{attention,mlp,transformer_layer}.py,
megatron/core/transformer/moe/{router,experts, token_dispatcher}.py, and
transformer_engine/pytorch/module/{layernorm_linear,linear,grouped_linear}.py. The method, and for
GPT-2's layers the result (34 bytes a token and hidden unit), are those of Korthikanti et al. 2022
(arXiv:2205.05198), section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from harness.predict.flops import Held, padded_vocab_size, parameters_on, state_on

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

GIB = 2**30
WORKSPACE = 2**25
"""cuBLAS's on Hopper, from PyTorch and from get_cublas_workspace_size_bytes in
transformer_engine/pytorch/cpp_extensions."""


@dataclass(frozen=True)
class Memory:
    """GiB on the fullest rank, at the moment when most is allocated."""

    weights: float
    """With their fp8 copies, and what FSDP has gathered."""
    gradients: float
    optimizer: float
    attention: float
    """Of activations, what attention keeps for its backward pass, its norm included; in all layers.
    """
    mlp: float
    """The same of MLPs or experts."""
    passing: float
    """Logits, or what is there for a moment while a layer is recomputed or goes backward, where
    that is more."""

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


def predict(e: Experiment) -> Memory:
    """What ``e`` allocates on its fullest rank: one of the first or of the last pipeline stage.

    Routers are taken to deal tokens out evenly; where they do not, the rank with most tokens needs
    more.
    """
    return max((_on_stage(e, stage) for stage in {0, e.pp - 1}), key=lambda memory: memory.total)


def _on_stage(e: Experiment, stage: int) -> Memory:
    state, held = state_on(e, stage), parameters_on(e, stage)
    attention, mlp = attention_bytes(e), mlp_bytes(e)
    layers = _layers_in_flight(e, stage)
    if e.recompute == "full":
        whole, attention, mlp = attention + mlp, _hidden(e), 0
    else:
        whole = 0
    passing = whole + _backward_bytes(e) + _gathered_layers(e, held)
    if stage == e.pp - 1:
        passing = max(passing, loss_bytes(e))
    passing += _ends_bytes(e, stage)
    return Memory(
        weights=(state.weights + _fp8_copies(e, held) + _gathered(e, held)) / GIB,
        gradients=state.gradients / GIB,
        optimizer=state.optimizer / GIB,
        attention=attention * layers / GIB,
        mlp=mlp * layers / GIB,
        passing=passing / GIB,
    )


def attention_bytes(e: Experiment) -> float:
    """Bytes that the attention of a layer keeps of one micro-batch: norm, projections, queries,
    keys, values, output."""
    m, size, saved = e.model, _element(e), _saved(e)
    queries, keys = m.query_size, m.key_size
    # queries, keys, values; the output, which is the projection's input
    each = size * (2 * queries + 2 * keys)
    each += 4 * m.num_attention_heads  # softmax statistics, fp32
    if e.precision == "fp8":
        each += saved * queries  # the projection's input, quantised
    if m.attention_output_gate:
        # the gate, a view that holds its buffer; the product
        each += size * (2 * queries + 2 * keys) + size * queries
    match m.qk_norm:
        case "head":
            # inputs and statistics
            each += size * (queries + keys) + 4 * (queries + keys) / m.head_size
        case "projection":
            # harness/specs/projection_norm.py, in fp32 and eager
            each += (4 + 4 + size) * (queries + keys)
    return _normed(e) + _masks(e) + each * _tokens(e) / e.tp


def mlp_bytes(e: Experiment) -> float:
    """Bytes that the MLP or the experts of a layer keep of one micro-batch, their norm included."""
    if e.model.num_experts:
        return _experts_bytes(e)
    m, size = e.model, _element(e)
    before = size * m.ffn * m.fc1_matrices
    return _normed(e) + _masks(e) + (before + _saved(e) * m.ffn) * _tokens(e) / e.tp


def _experts_bytes(e: Experiment) -> float:
    """Router, dispatch and experts: of each token, ``moe_router_topk`` copies that are dealt out
    evenly.

    The norm before them is apart from the first matrix, and its output, the router's input, may be
    recomputed (``layernorm``); so may be the activation, the second matrix's input (``moe_act``).
    Clamping as GPT-OSS does keeps its own input beside the clamped one
    (weighted_bias_quick_geglu_impl in megatron/core/fusions/fused_bias_geglu.py); the product with
    the router's weights in bf16, for which upstream has no fused kernel without a gate, its two
    factors.
    """
    m, size = e.model, _element(e)
    tokens = _hidden_tokens(e)
    modules = e.recompute_modules
    # probabilities, their map, the rows they go to, scores for the balancing loss
    router = (
        m.num_experts
        * (
            4
            + 1
            + 8
            + (4 if m.moe_aux_loss_coeff else 0)
            + (4 if m.moe_z_loss_coeff else 0)
            + (4 if m.moe_router_pre_softmax else 0)
        )
        + 12 * m.moe_router_topk
    )
    norm = m.hidden_size * size * (1 if "layernorm" in modules else 2)
    before = size * m.moe_ffn * m.fc1_matrices
    if "moe_act" in modules:
        activation = before
    else:
        factors = 2 if m.activation == "clamped_quick_geglu" else 1
        product = 0 if m.gated else size * m.moe_ffn
        activation = before * factors + product + _saved(e) * m.moe_ffn
    rows = tokens * m.moe_router_topk * e.etp
    return (
        tokens * (norm + router)
        + _masks(e)
        + rows * (_saved(e) * m.hidden_size + activation / e.etp)
    )


def loss_bytes(e: Experiment) -> float:
    """Bytes of the logits when the loss goes backward: in fp32, as the softmax, and their gradient
    in bf16.

    Source: megatron/core/tensor_parallel/cross_entropy.py; the fused loss keeps the same
    (fusions/fused_cross_entropy.py).
    """
    return (
        _tokens(e)
        * padded_vocab_size(e.model.vocab_size, e.tp)
        / e.tp
        * (4 + (2 if e.precision != "fp32" else 0))
    )


def _ends_bytes(e: Experiment, stage: int) -> float:
    """What is kept besides layers: embedding's dropout, attention mask, last norm, the output
    layer's input, workspaces.

    cuBLAS works for PyTorch's forward and backward thread and for Transformer Engine, for whose
    experts on four streams.
    """
    mask = e.micro_batch_size * e.seq_length**2 / e.cp
    workspaces = WORKSPACE * (7 if e.model.num_experts else 3)
    first = _masks(e) if stage == 0 else 0
    last = 2 * _hidden(e) if stage == e.pp - 1 else 0
    return mask + workspaces + first + last


def _backward_bytes(e: Experiment) -> float:
    """The largest gradients in a layer: of its MLP's or experts' activation, input and output, and
    of the first matrix.

    Without Apex a weight's gradient is a tensor of its own before it is added up.
    """
    m, size, fc1 = e.model, _element(e), e.model.fc1_matrices
    if m.num_experts:
        rows, matrix = (
            _hidden_tokens(e) * m.moe_router_topk,
            m.num_experts // e.ep * m.hidden_size * m.moe_ffn * fc1 / e.etp,
        )
        return size * (rows * (m.moe_ffn * (fc1 + 1) + m.hidden_size) + matrix)
    return size * m.ffn * (_tokens(e) * (fc1 + 1) + m.hidden_size * fc1) / e.tp + _hidden(e)


def _layers_in_flight(e: Experiment, stage: int) -> float:
    """Layers times micro-batches whose activations a rank of ``stage`` keeps at most, under 1F1B,
    interleaved or not.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2, and get_pp_rank_microbatches in
    megatron/core/pipeline_parallel/schedules.py.
    """
    chunks = e.num_microbatches * e.vpp
    after = e.pp - 1 - stage
    warm_up = after if e.vpp == 1 else 2 * after + (e.vpp - 1) * e.pp
    return min(warm_up + 1, chunks) * e.model.num_layers / (e.pp * e.vpp)


def _fp8_copies(e: Experiment, held: Held) -> float:
    """Bytes of quantised weights that Transformer Engine caches for all micro-batches, once by
    rows, once by columns.

    Source: quantize_weight and _fp8_workspaces in transformer_engine/pytorch/module; blockwise
    scales are fp32, one for 128 x 128.
    """
    if e.precision != "fp8":
        return 0
    return (
        2
        * (held.matrices + held.expert_matrices)
        * (1 + (4 / 128**2 if e.fp8_recipe == "blockwise" else 0))
    )


def _gathered(e: Experiment, held: Held) -> float:
    """Bytes of embeddings, last norm and output layer, which Megatron-FSDP holds whole all the
    time: its units are layers.

    Source: fsdp_unit_modules in megatron/core/distributed/fsdp/mcore_fsdp_adapter.py.
    """
    return held.ends * _element(e) if e.sharding == "fsdp_optim_grads_params" else 0


def _gathered_layers(e: Experiment, held: Held) -> float:
    """Bytes of the layers gathered while one goes backward: FSDP2 has one ahead, Megatron-FSDP half
    a billion elements.

    Source: suggested_AG_prefetch_size in
    megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py.
    """
    if e.sharding not in ("fsdp_optim_grads_params", "torch_fsdp2"):
        return 0
    layers = e.model.num_layers // e.pp
    layer = (held.dense - held.ends + held.experts) / layers
    ahead = 1 if e.sharding == "torch_fsdp2" else math.ceil(5e8 / layer)
    return min(1 + ahead, layers) * layer * _element(e)


def _normed(e: Experiment) -> float:
    """A norm's input, its output, which is the next product's input, and its statistics."""
    statistics = 4 * (2 if e.model.normalization == "LayerNorm" else 1)
    return _hidden_tokens(e) * (e.model.hidden_size * (_element(e) + _saved(e)) + statistics)


def _masks(e: Experiment) -> float:
    """Dropout's mask of one hidden state, a byte an element."""
    return _hidden_tokens(e) * e.model.hidden_size if e.model.dropout else 0


def _hidden(e: Experiment) -> float:
    """One hidden state."""
    return _hidden_tokens(e) * e.model.hidden_size * _element(e)


def _tokens(e: Experiment) -> float:
    return e.seq_length / e.cp * e.micro_batch_size


def _hidden_tokens(e: Experiment) -> float:
    """Tokens of the hidden states between the split products, which sequence parallelism splits,
    too."""
    return _tokens(e) / (e.tp if e.sequence_parallel else 1)


def _element(e: Experiment) -> int:
    return 4 if e.precision == "fp32" else 2


def _saved(e: Experiment) -> float:
    """Bytes an element of what a linear layer keeps of its input; blockwise, with a scale for each
    128."""
    if e.precision == "fp8":
        return 1 + (4 / 128 if e.fp8_recipe == "blockwise" else 0)
    return _element(e)
