"""The tensors that a transformer layer leaves for its backward pass, operation by operation.

Counted are the tensors that autograd keeps in Megatron-LM core_v0.19.0 with Transformer Engine
2.19's layers: megatron/core/transformer/{attention,mlp,transformer_layer}.py,
megatron/core/transformer/{multi_latent_attention,multi_token_prediction}.py,
megatron/core/transformer/moe/{router,experts,shared_experts,token_dispatcher}.py, and
transformer_engine/pytorch/module/{layernorm_linear,linear,grouped_linear}.py. The method, and for
GPT-2's layers the result (34 bytes a token and hidden unit), are those of Korthikanti et al. 2022
(arXiv:2205.05198), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind
from harness.experiment.model import LatentAttention
from harness.predict.flops import padded_vocab_size


@dataclass(frozen=True)
class Operation:
    """One autograd node of a layer, with the bytes of the tensors that it allocates."""

    saves: tuple[float, ...]
    """What it keeps for its backward pass, most of it its inputs."""
    gradient: float
    """The gradient of its input."""
    weight_gradient: float = 0
    """Without Apex a tensor of its own before it is accumulated; none of a frozen weight."""
    passing: float = 0
    """An output that nothing keeps."""
    adds_residual: bool = False
    """It starts with the dropout of the output before it, and the sum with the residual."""


def attention_bytes(experiment: Experiment) -> float:
    """Bytes that a layer's attention and its norm keep of one micro-batch for the backward pass."""
    return sum(sum(operation.saves) for operation in attention_operations(experiment))


def mlp_bytes(experiment: Experiment, kind: LayerKind | None = None) -> float:
    """Bytes that a layer's MLP or experts and their norm keep of one micro-batch.

    ``kind``: as for ``mlp_operations``.
    """
    return sum(sum(operation.saves) for operation in mlp_operations(experiment, kind))


def layer_operations(experiment: Experiment, kind: str) -> list[Operation]:
    """A transformer layer on one micro-batch: ``dense``, ``experts``, or in ``predictors``."""
    if kind != "predictors":
        return attention_operations(experiment) + mlp_operations(experiment, kind)
    layer = attention_operations(experiment) + mlp_operations(experiment)
    return [*_joining_operations(experiment), *layer, _last_norm(experiment)]


def predictor_bytes(experiment: Experiment) -> float:
    """Bytes that a layer of multi-token prediction keeps besides its transformer layer."""
    operations = [*_joining_operations(experiment), _last_norm(experiment)]
    return sum(sum(operation.saves) for operation in operations)


def _joining_operations(experiment: Experiment) -> list[Operation]:
    """Norms of a hidden state and of the next token's embedding, joined by a projection."""
    hidden, width = hidden_bytes(experiment), experiment.model.hidden_size
    joined = 2 * hidden_tokens(experiment) * width * saved_bytes(experiment)
    return [
        Operation((hidden, hidden, *_statistics(experiment) * 2), 2 * hidden),
        Operation((joined,), 2 * hidden, _gradient_bytes(experiment, 2 * width)),
    ]


def _last_norm(experiment: Experiment) -> Operation:
    """The norm after a predicting transformer layer, and its result, the output layer's input."""
    hidden = hidden_bytes(experiment)
    return Operation((hidden, *_statistics(experiment), hidden), hidden)


def attention_operations(experiment: Experiment) -> list[Operation]:
    """A layer's norm and attention on one micro-batch, in the order of the forward pass."""
    model, size = experiment.model, element_bytes(experiment)
    if model.latent_attention:
        return _latent_attention_operations(experiment, model.latent_attention)
    tokens = tokens_on(experiment) / experiment.tp
    queries, keys = model.query_size * tokens, model.key_size * tokens
    hidden = hidden_bytes(experiment)
    projected = size * (queries + 2 * keys)
    if model.attention_output_gate:
        # the gate, a view that holds its buffer
        projected += size * (2 * queries + 2 * keys)
    statistics = 4 * model.num_attention_heads * tokens  # flash attention's softmax, fp32
    # other recipes keep the original, which attention keeps in any case: set_save_original_input in
    # megatron/core/transformer/attention.py
    quantised = saved_bytes(experiment) * queries if experiment.fp8_recipe == "delayed" else 0
    gated = size * queries if model.attention_output_gate else 0  # the product
    return [
        _norm(experiment),
        Operation(
            (_norm_output_bytes(experiment),), hidden, _gradient_bytes(experiment, model.qkv_size)
        ),
        Operation((projected, size * queries, statistics), projected),
        Operation((_qk_norm_bytes(experiment), gated), 0),
        Operation(
            (quantised,),
            size * queries,
            _gradient_bytes(experiment, model.query_size),
            passing=hidden,
        ),
    ]


def _latent_attention_operations(
    experiment: Experiment, latent: LatentAttention
) -> list[Operation]:
    """Norm and latent attention: what is compressed is whole on every rank, what is rebuilt split.

    The norm is not fused with the projections down, which share its output in bf16 and quantise it
    each in fp8. The projections up contain the norms of their inputs, which are kept before and
    after. Positions are applied to queries in place; keys and values are written anew (ApplyMLA…
    in megatron/core/fusions/fused_mla_yarn_rope_apply.py), without that kernel queries too.
    """
    model, size = experiment.model, element_bytes(experiment)
    hidden, width, saved = hidden_bytes(experiment), model.hidden_size, saved_bytes(experiment)
    compressed, tokens = hidden_tokens(experiment), tokens_on(experiment) / experiment.tp
    queries, keys, values = (
        size * tokens * part for part in (model.query_size, model.key_size, model.value_size)
    )
    context = size * tokens * model.context_size
    statistics = 4 * model.num_attention_heads * tokens
    copies = 2 if experiment.precision == "fp8" else 1
    norm_output = copies * compressed * width * saved
    rank = latent.q_lora_rank or 0
    pairs = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    normed = compressed * (rank + latent.kv_lora_rank) * saved
    normed += 4 * compressed * (bool(rank) + 1)
    rebuilt = model.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim)
    down_gradient = _gradient_bytes(experiment, rank + pairs, split=1)
    up_weights = rank * model.query_size + latent.kv_lora_rank * rebuilt
    if not rank:
        up_weights += width * model.query_size
    up_gradient = 0 if experiment.lora else size * up_weights / experiment.tp
    discarded = "mla_up_proj" in experiment.recompute_modules
    kept = () if discarded else (queries, keys, values)
    quantised = saved * tokens * model.context_size if experiment.fp8_recipe == "delayed" else 0
    return [
        _norm(experiment),
        Operation((norm_output,), hidden, down_gradient),
        Operation(
            (size * compressed * (rank + pairs), 0 if discarded else normed),
            size * compressed * (rank + pairs),
            up_gradient,
            passing=size * tokens * rebuilt,
        ),
        Operation((*kept, context, statistics), queries + keys + values),
        Operation(
            (quantised,), context, _gradient_bytes(experiment, model.context_size), passing=hidden
        ),
    ]


def mlp_operations(experiment: Experiment, kind: LayerKind | None = None) -> list[Operation]:
    """A layer's second norm and its MLP or experts, in the order of the forward pass.

    ``kind``: of the layer; None: experts if the model has any.
    """
    model = experiment.model
    if kind == "experts" or (kind is None and model.num_experts):
        return _experts_operations(experiment)
    size, hidden = element_bytes(experiment), hidden_bytes(experiment)
    activated = model.ffn * tokens_on(experiment) / experiment.tp
    before = size * activated * model.fc1_matrices
    # by rows and by columns: no source says so, but 614 had the second copy's 1.8 GiB on two H200s
    blockwise = experiment.fp8_recipe == "blockwise"
    return [
        _norm(experiment),
        Operation(
            (_norm_output_bytes(experiment),),
            hidden,
            _gradient_bytes(experiment, model.ffn * model.fc1_matrices),
        ),
        Operation((before,), before),
        Operation(
            (saved_bytes(experiment) * activated,) * (2 if blockwise else 1),
            size * activated,
            _gradient_bytes(experiment, model.ffn),
            passing=hidden,
        ),
    ]


def _experts_operations(experiment: Experiment) -> list[Operation]:
    """Router, dispatch and experts, with ``moe_router_topk`` copies of each token.

    The norm before experts is not fused with the first matrix. Its output, the router's input, may
    be recomputed (``layernorm``), and so may the activation, the second matrix's input
    (``moe_act``). Clamping as GPT-OSS does keeps its own input as well as the clamped one
    (weighted_bias_quick_geglu_impl in megatron/core/fusions/fused_bias_geglu.py). The product with
    the router's weights in bf16, for which upstream has no fused kernel without a gate, keeps both
    factors.
    """
    model, size = experiment.model, element_bytes(experiment)
    tokens, modules = hidden_tokens(experiment), experiment.recompute_modules
    hidden = hidden_bytes(experiment)
    # probabilities (fp32), their map (bool), the rows they go to; fp32 scores of each loss, and of
    # a score function before top-k
    before_topk = model.moe_router_pre_softmax or model.moe_router_score_function == "sigmoid"
    scores = bool(model.moe_aux_loss_coeff) + bool(model.moe_z_loss_coeff) + before_topk
    router = model.num_experts * (4 + 1 + 8 + 4 * scores) + 12 * model.moe_router_topk
    norm_output = 0 if "layernorm" in modules else hidden
    rows = tokens * model.moe_router_topk
    before = size * rows * model.moe_ffn * model.fc1_matrices
    if "moe_act" in modules:
        activation = (before,)
        activated = 0
    else:
        factors = 2 if model.activation == "clamped_quick_geglu" else 1
        weighted = 0 if model.gated else size * rows * model.moe_ffn
        activation = (before,) * factors + (weighted,)
        activated = saved_bytes(experiment) * rows * model.moe_ffn
    dispatched = rows * experiment.etp * model.hidden_size
    matrix = model.num_experts // experiment.ep * model.moe_ffn // experiment.etp
    return [
        Operation((mask_bytes(experiment), hidden), hidden, adds_residual=True),
        *_shared_expert_operations(experiment),
        Operation((norm_output, tokens * router), hidden),
        Operation(
            (saved_bytes(experiment) * dispatched,),
            size * dispatched,
            _gradient_bytes(experiment, matrix * model.fc1_matrices, split=1),
        ),
        Operation(activation, before),
        Operation(
            (activated,),
            size * rows * model.moe_ffn,
            _gradient_bytes(experiment, matrix, split=1),
            passing=size * dispatched,
        ),
        Operation((), size * dispatched, passing=hidden),
    ]


def _shared_expert_operations(experiment: Experiment) -> list[Operation]:
    """The expert of every token; its input is the router's, of which delayed fp8 keeps a copy.

    Other recipes keep the original (set_save_original_input in
    megatron/core/transformer/moe/shared_experts.py).
    """
    model, size = experiment.model, element_bytes(experiment)
    shared = model.moe_shared_expert_intermediate_size
    if not shared:
        return []
    hidden, again = hidden_bytes(experiment), "shared_experts" in experiment.recompute_modules
    activated = shared * tokens_on(experiment) / experiment.tp
    before = size * activated * model.fc1_matrices
    quantised = _norm_output_bytes(experiment) if experiment.fp8_recipe == "delayed" else 0
    kept = 0 if again else 1
    return [
        Operation(
            (kept * quantised,), hidden, _gradient_bytes(experiment, shared * model.fc1_matrices)
        ),
        Operation((kept * before,), before),
        Operation(
            (kept * saved_bytes(experiment) * activated,),
            size * activated,
            _gradient_bytes(experiment, shared),
            passing=hidden,
        ),
    ]


def loss_bytes(experiment: Experiment) -> float:
    """Bytes of the logits when the loss needs most of them.

    The unfused loss works in place: its backward pass has the fp32 softmax and a bf16 gradient
    (megatron/core/tensor_parallel/cross_entropy.py). The fused loss is compiled, and writes the
    softmax to a new tensor: two in fp32, and the logits in bf16 (fusions/fused_cross_entropy.py).
    Each further token that is predicted has left its softmax before
    (process_mtp_loss in megatron/core/transformer/multi_token_prediction.py).
    """
    softmax = 8 if experiment.cross_entropy_fusion else 4
    gradient = 2 if experiment.precision != "fp32" else 0
    return logits_on(experiment) * (softmax + gradient + 4 * experiment.model.predictors)


def logits_on(experiment: Experiment) -> float:
    """Logits of one micro-batch on a rank."""
    vocabulary = padded_vocab_size(experiment.model.vocab_size, experiment.tp)
    return tokens_on(experiment) * vocabulary / experiment.tp


def mask_bytes(experiment: Experiment) -> float:
    """Dropout's mask of one hidden state, a byte an element."""
    model = experiment.model
    return hidden_tokens(experiment) * model.hidden_size if model.dropout else 0


def hidden_bytes(experiment: Experiment) -> float:
    """One hidden state."""
    width = experiment.model.hidden_size * element_bytes(experiment)
    return hidden_tokens(experiment) * width


def tokens_on(experiment: Experiment) -> float:
    """Tokens of one micro-batch on a rank."""
    return experiment.seq_length / experiment.cp * experiment.micro_batch_size


def hidden_tokens(experiment: Experiment) -> float:
    """Tokens of a hidden state on a rank; sequence parallelism splits them."""
    return tokens_on(experiment) / (experiment.tp if experiment.sequence_parallel else 1)


def element_bytes(experiment: Experiment) -> int:
    return 4 if experiment.precision == "fp32" else 2


def saved_bytes(experiment: Experiment) -> float:
    """Bytes an element of the input that a linear layer keeps; blockwise, a scale for each 128."""
    if experiment.precision == "fp8":
        return 1 + (4 / 128 if experiment.fp8_recipe == "blockwise" else 0)
    return element_bytes(experiment)


def _norm(experiment: Experiment) -> Operation:
    """A norm's input and fp32 statistics, and the mask of the dropout before it."""
    hidden = hidden_bytes(experiment)
    return Operation(
        (mask_bytes(experiment), hidden, *_statistics(experiment)), hidden, adds_residual=True
    )


def _statistics(experiment: Experiment) -> list[float]:
    """What a norm keeps of each token, in fp32: a mean if it has one, and a deviation."""
    count = 2 if experiment.model.normalization == "LayerNorm" else 1
    return [4 * hidden_tokens(experiment)] * count


def _norm_output_bytes(experiment: Experiment) -> float:
    """A norm's output, as the linear layer after it keeps it."""
    return hidden_tokens(experiment) * experiment.model.hidden_size * saved_bytes(experiment)


def _qk_norm_bytes(experiment: Experiment) -> float:
    """What norms of queries and keys keep."""
    model, size = experiment.model, element_bytes(experiment)
    width = model.query_size + model.key_size
    match model.qk_norm:
        case "head":
            per_token = size * width + 4 * width / model.head_size  # inputs and fp32 statistics
        case "projection":
            # harness/specs/projection_norm.py, in fp32 and eager
            per_token = (4 + 4 + size) * width
        case "none":
            per_token = 0
    return per_token * tokens_on(experiment) / experiment.tp


def _gradient_bytes(experiment: Experiment, width: float, split: int | None = None) -> float:
    """The gradient of a matrix between the hidden state and ``width``, which TP splits."""
    if experiment.lora:
        return 0
    split = split or experiment.tp
    return element_bytes(experiment) * experiment.model.hidden_size * width / split
