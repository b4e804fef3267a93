"""Parameters, model FLOPs and state memory of an experiment, from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment
    from harness.experiment.model import Model


MODEL_FLOPS = (
    "model FLOPs (Korthikanti et al. 2022, arXiv:2205.05198, with causal attention; frozen weights"
    " have no gradient, recomputation does not count)"
)
"""Which count TFLOP/s and MFU follow, in words: see step_flops."""


@dataclass(frozen=True)
class Parameters:
    """Parameters with the padded vocabulary; ``total`` and ``active`` count tied embeddings
    once."""

    total: int
    active: int
    """What one token passes through: of the experts, only those it is routed to."""
    per_rank: int
    """Held by a rank of the first pipeline stage, which has both embeddings."""


@dataclass(frozen=True)
class Held:
    """Parameters that a rank holds."""

    dense: int
    experts: int
    matrices: int
    """The part of ``dense`` in weights of linear layers, without biases, embeddings and the output
    layer."""
    expert_matrices: int
    """The part of ``experts`` in weights of linear layers."""
    ends: int
    """The part of ``dense`` outside of transformer layers."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """``vocab_size`` rounded up to a multiple of 128 x tp.

    Source: vocab_size_with_padding in megatron/core/tokenizers/utils/build_tokenizer.py,
    core_v0.19.0.
    """
    return math.ceil(vocab_size / (128 * tp)) * 128 * tp


def count_parameters(e: Experiment) -> Parameters:
    """Parameters of upstream's GPT model: biases, norms, softmax sinks and learned positions
    included.

    Upstream's own estimate leaves out the linear layers' biases and the position embedding
    (compute_weight_and_optimizer_memory in megatron/training/theoretical_memory_usage.py,
    core_v0.19.0).
    """
    m, layer, first = e.model, _layer(e), parameters_on(e, 0)
    shared = layer.column + layer.row + layer.replicated + layer.column_bias + layer.row_bias
    expert = layer.expert + layer.expert_bias
    words = m.hidden_size * padded_vocab_size(m.vocab_size, e.tp)
    ends = words * (2 if _untied(e) else 1) + _positions(e) + _norm(m)
    return Parameters(
        total=m.num_layers * (shared + (m.num_experts or 0) * expert) + ends,
        active=m.num_layers * (shared + (m.moe_router_topk if m.num_experts else 0) * expert)
        + ends,
        per_rank=first.dense + first.experts,
    )


def parameters_on(e: Experiment, stage: int) -> Held:
    """What a rank of pipeline stage ``stage`` (from 0) holds of the model, before data parallelism
    shards it.

    The last stage has the output layer: with tied embeddings, a copy of the word embedding.
    """
    m, layer, layers = e.model, _layer(e), e.model.num_layers // e.pp
    first, last = stage == 0, stage == e.pp - 1
    words = m.hidden_size * padded_vocab_size(m.vocab_size, e.tp) // e.tp
    ends = (words + _positions(e) if first else 0) + (_norm(m) if last else 0)
    if last and (_untied(e) or not first):
        ends += words
    experts = layers * (m.num_experts or 0) // e.ep
    matrices = layers * (layer.column + layer.row) // e.tp
    rest = layers * (layer.column_bias // e.tp + layer.row_bias + layer.replicated)
    return Held(
        dense=matrices + rest + ends,
        experts=experts * (layer.expert // e.etp + layer.expert_bias_per_rank),
        matrices=matrices,
        expert_matrices=experts * (layer.expert // e.etp),
        ends=ends,
    )


@dataclass(frozen=True)
class _Layer:
    """Parameters of a transformer layer by how tensor parallelism splits them."""

    column: int
    row: int
    column_bias: int
    """Split as its weights are; softmax sinks, one a head, among them."""
    row_bias: int
    replicated: int
    """Norms and the router, whole on every rank."""
    expert: int
    """Weights of one expert."""
    expert_bias: int
    expert_bias_per_rank: int


def _layer(e: Experiment) -> _Layer:
    m, h = e.model, e.model.hidden_size
    bias = int(m.add_bias_linear)
    fc1 = 0 if m.num_experts else m.ffn * m.fc1_matrices
    expert_fc1 = m.moe_ffn * m.fc1_matrices if m.num_experts else 0
    return _Layer(
        column=h * (m.qkv_size + fc1),
        row=m.query_size * h + (0 if m.num_experts else h * m.ffn),
        column_bias=bias * (m.qkv_size + fc1) + (m.num_attention_heads if m.attention_sinks else 0),
        row_bias=bias * h * (1 if m.num_experts else 2),
        replicated=2 * _norm(m) + _qk_norms(m) + (h + bias) * (m.num_experts or 0),
        expert=h * (expert_fc1 + m.moe_ffn) if m.num_experts else 0,
        expert_bias=bias * (expert_fc1 + h) if m.num_experts else 0,
        expert_bias_per_rank=bias * (expert_fc1 // e.etp + h) if m.num_experts else 0,
    )


def _norm(m: Model) -> int:
    return m.hidden_size * (2 if m.normalization == "LayerNorm" else 1)


def _positions(e: Experiment) -> int:
    learned = e.model.position_embedding == "learned_absolute"
    return e.model.hidden_size * (e.positions or e.seq_length) if learned else 0


def _qk_norms(m: Model) -> int:
    """Parameters of a layer's norms of queries and keys."""
    weights = {"none": 0, "head": 2 * m.head_size, "projection": m.query_size + m.key_size}[
        m.qk_norm
    ]
    return weights * (2 if m.normalization == "LayerNorm" else 1)


def step_flops(e: Experiment, tokens: float | None = None, squares: float | None = None) -> float:
    """Model FLOPs of one training step over the whole batch: what its products compute,
    recomputation left out.

    As in Korthikanti et al. 2022 (arXiv:2205.05198, section 5 and appendix A), with causal
    attention: a token costs 6 a weight of the matrix products, 2 for a multiply-add, once forward
    and twice backward, in the output layer as well (over the padded vocabulary); attention costs 6
    x width of the queries x tokens seen x 2, for scores and values, where a token sees half of its
    sequence, or a window of it. Of experts, those a token is routed to count; routers do not. A
    frozen weight (LoRA) has no gradient: 4; and what lies before the first adapter is not gone
    through backward at all: 2.

    Args:
        tokens: of the batch; None: ``global_batch_size`` sequences of ``seq_length``.
        squares: sum of the squared lengths of the sequences that attention keeps apart, as upstream
        counts packed ones.
    """
    tokens = e.global_batch_size * e.seq_length if tokens is None else tokens
    squares = e.global_batch_size * e.seq_length**2 if squares is None else squares
    m, h = e.model, e.model.hidden_size
    windowed = (m.num_layers + 1) // 2 if m.window_size else 0
    seen = squares * (m.num_layers - windowed) + _windowed_squares(e, tokens, squares) * windowed
    output = h * padded_vocab_size(m.vocab_size, e.tp)
    each = sum(_products(m).values())
    if e.lora is None:
        return tokens * 6 * (m.num_layers * each + output) + 6 * m.query_size * seen
    whole = adapter_widths(e.model_copy(update={"tp": 1}))
    adapters = e.lora.rank * sum(map(sum, whole.values()))
    flops = (
        tokens * (m.num_layers * (4 * each + 6 * adapters) + 4 * output) + 6 * m.query_size * seen
    )
    return flops - _not_gone_through_backward(
        e, tokens, _windowed_squares(e, tokens, squares) if windowed else squares
    )


def upstream_flops(
    e: Experiment, tokens: float | None = None, squares: float | None = None
) -> float:
    """The same exactly as upstream counts it for its TFLOP/s.

    Upstream counts frozen weights as if they were trained, attention in a window as if it saw all
    tokens, and a gated quick-GELU as two products where it is three.
    Source: num_floating_point_operations in megatron/training/training.py, core_v0.19.0.
    """
    tokens = e.global_batch_size * e.seq_length if tokens is None else tokens
    squares = e.global_batch_size * e.seq_length**2 if squares is None else squares
    m, h = e.model, e.model.hidden_size
    attention = h * m.qkv_size + m.query_size * h
    products = 3 if m.activation == "swiglu" else 2
    mlp = products * h * (m.moe_ffn * (m.moe_router_topk or 1) if m.num_experts else m.ffn)
    output = h * padded_vocab_size(m.vocab_size, e.tp)
    return (
        tokens * 6 * (m.num_layers * (attention + mlp) + output)
        + 6 * m.num_layers * m.query_size * squares
    )


def share_of_upstreams(
    e: Experiment, tokens: float | None = None, squares: float | None = None
) -> float:
    """Model FLOPs over upstream's count of them; 1 where all weights are trained, in full
    attention."""
    return step_flops(e, tokens, squares) / upstream_flops(e, tokens, squares)


def _products(m: Model) -> dict[str, int]:
    """Weights that a token is multiplied with in a layer, by upstream's names of the linear layers,
    in order."""
    width = m.moe_ffn * (m.moe_router_topk or 1) if m.num_experts else m.ffn
    h = m.hidden_size
    return {
        "linear_qkv": h * m.qkv_size,
        "linear_proj": m.query_size * h,
        "linear_fc1": h * width * m.fc1_matrices,
        "linear_fc2": width * h,
    }


def _windowed_squares(e: Experiment, tokens: float, squares: float) -> float:
    """``squares`` of a layer whose tokens see a window of w: of s tokens, s^2 becomes 2 s w - w^2.

    Where sequences are packed, whose lengths nobody knows here, at most 2 w a token.
    """
    window = min(e.model.window_size or e.seq_length, e.seq_length)
    if squares == e.global_batch_size * e.seq_length**2:
        return e.global_batch_size * (2 * e.seq_length * window - window**2)
    return min(squares, 2 * window * tokens)


def _not_gone_through_backward(e: Experiment, tokens: float, squares: float) -> float:
    """FLOPs of gradients that nothing asks for: those of the first layer's frozen input, down to
    its first adapter.

    With full recomputation the embedding's output asks for one (harness/finetune/lora.py).
    """
    if e.recompute == "full":
        return 0
    products = _products(e.model)
    order = list(products)
    first = min(e.lora.targets, key=order.index)
    before = order[: order.index(first) + 1]
    weights = (
        sum(products[name] for name in before)
        + e.lora.rank * adapter_widths(e.model_copy(update={"tp": 1}))[first][0]
    )
    attention = 4 * e.model.query_size * squares if "linear_proj" in before else 0
    return 2 * tokens * weights + attention


def tflops_per_gpu(e: Experiment, step_ms: float) -> float:
    """Model TFLOP/s of one GPU at this step time."""
    return step_flops(e) / (step_ms * 1e-3) / e.world_size / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation, from 0 to 1: model TFLOP/s per GPU / its dense peak at the run's
    precision."""
    return tflops / peak_tflops


@dataclass(frozen=True)
class State:
    """Weights, gradients and optimizer state: bytes, of a parameter or of a rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def times(self, parameters: float) -> State:
        return State(
            self.weights * parameters, self.gradients * parameters, self.optimizer * parameters
        )

    def __add__(self, other: State) -> State:
        return State(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )


def state_of_parameter(e: Experiment, replicas: int, *, matrix: bool = True) -> State:
    """Bytes of one trained parameter on a rank: weight, gradient and optimizer state, sharded over
    ``replicas``.

    bf16: 2 + 4 + 12 (fp32 copy, two Adam moments), so 18 replicated and 6 + 12/replicas with the
    distributed optimizer (upstream's theoretical_memory_usage.py). bf16 moments: 2 + 4 + 6, because
    two bytes of the fp32 copy are the weight itself (store_param_remainders in
    megatron/core/optimizer/optimizer_config.py), but for fp8 that is scaled otherwise than delayed:
    4 + 2 + 2 (use_precision_aware_optimizer_no_fp8_or_ds_fp8 there). bf16 gradients: 2 of 4. Muon
    has one moment in place of two for a ``matrix``; embeddings, biases and norms stay with Adam
    (megatron/core/optimizer/emerging_optimizers.py). fp32: 4 + 4 + 8. FSDP: Rajbhandari et al. 2020
    (arXiv:1910.02054), section 5; both kinds keep gradients as weights, in bf16: 2 + 2 + 12
    (_resolve_group_grad_dtype in Megatron-FSDP's param_and_grad_buffer.py, where
    --megatron-fsdp-main-grads-dtype is not given; fully_shard without a precision policy).
    """
    weight, gradient, optimizer = (4, 4, 8) if e.precision == "fp32" else (2, 4, 12)
    if e.gradients == "bf16" or e.fully_sharded:
        gradient = weight
    if e.optimizer_state == "bf16":
        optimizer = 6 if e.fp8_recipe in (None, "delayed") else 8
    elif e.optimizer == "muon" and matrix:
        optimizer -= 4
    match e.sharding:
        case "no_shard":
            return State(weight, gradient, optimizer)
        case "optim" | "fsdp_optim":
            return State(weight, gradient, optimizer / replicas)
        case "fsdp_optim_grads":
            return State(weight, gradient / replicas, optimizer / replicas)
        case "fsdp_optim_grads_params" | "torch_fsdp2":
            return State(weight / replicas, gradient / replicas, optimizer / replicas)


def state_on(e: Experiment, stage: int) -> State:
    """Bytes of weights, gradients and optimizer state on a rank of pipeline stage ``stage``; no
    activations, no buffers.

    Shards are over data-parallel x context-parallel ranks; of experts, over the ranks that hold the
    same. Beside LoRA's adapters, weights are frozen: they have neither gradients nor optimizer
    state.
    """
    held, replicas = parameters_on(e, stage), e.dp * e.cp
    if e.lora:
        frozen = (held.dense + held.experts) * (4 if e.precision == "fp32" else 2)
        return State(frozen, 0, 0) + state_of_parameter(e, replicas).times(adapter_parameters(e))
    matrices = (held.matrices, replicas), (held.expert_matrices, e.expert_replicas)
    rest = (
        (held.dense - held.matrices, replicas),
        (held.experts - held.expert_matrices, e.expert_replicas),
    )
    parts = [state_of_parameter(e, among).times(count) for count, among in matrices]
    parts += [state_of_parameter(e, among, matrix=False).times(count) for count, among in rest]
    return sum(parts, State(0, 0, 0))


def state_gib(e: Experiment) -> float:
    """Weights, gradients and optimizer state on a rank of the first stage, in GiB."""
    return state_on(e, 0).total / 2**30


def adapter_parameters(e: Experiment) -> int:
    """Parameters of LoRA's adapters on a rank: factors [rank, in] and [out, rank] beside every
    target.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    rank = e.lora.rank if e.lora else 0
    return sum(map(sum, adapter_widths(e).values())) * rank * e.model.num_layers // e.pp


def adapter_widths(e: Experiment) -> dict[str, tuple[int, int]]:
    """In and out of the linear layers of a rank that have an adapter.

    Under tensor parallelism the factor on the split side is split, the other whole
    (harness/finetune/lora.py).
    """
    m = e.model
    widths = {
        "linear_qkv": (m.hidden_size, m.qkv_size // e.tp),
        "linear_proj": (m.query_size // e.tp, m.hidden_size),
        "linear_fc1": (m.hidden_size, m.ffn * m.fc1_matrices // e.tp),
        "linear_fc2": (m.ffn // e.tp, m.hidden_size),
    }
    return {target: widths[target] for target in e.lora.targets} if e.lora else {}


def _untied(e: Experiment) -> bool:
    """Whether the output layer has weights of its own: fully_shard cannot share them with the
    embedding."""
    return e.model.untie_embeddings or e.sharding == "torch_fsdp2"
