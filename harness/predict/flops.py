"""Parameters, model FLOPs and state memory of an experiment, from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

from harness.experiment import linear_layers
from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind, Linear
from harness.experiment.model import CONV_WIDTH, Mamba, Model
from harness.experiment.pipeline import predictor_chunk, stage_layers
from harness.predict import stages

MODEL_FLOPS = (
    "model FLOPs (Korthikanti et al. 2022, arXiv:2205.05198, with causal attention; frozen weights"
    " have no gradient, recomputation does not count)"
)
"""The count that TFLOP/s and MFU follow, for footnotes: see step_flops."""


@dataclass(frozen=True)
class Parameters:
    """Parameters with the padded vocabulary; all but ``per_rank`` count tied embeddings once."""

    total: int
    """Those of multi-token prediction included, which published sizes leave out."""
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
    """The part of ``dense`` in weights of linear layers: no biases, embeddings or output layer."""
    expert_matrices: int
    """The part of ``experts`` in weights of linear layers."""
    ends: int
    """The part of ``dense`` outside of transformer layers and multi-token prediction."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """``vocab_size`` rounded up to a multiple of 128 x tp.

    Source: vocab_size_with_padding in megatron/core/tokenizers/utils/build_tokenizer.py,
    core_v0.19.0.
    """
    return math.ceil(vocab_size / (128 * tp)) * 128 * tp


def count_parameters(experiment: Experiment) -> Parameters:
    """Parameters of upstream's model, with biases, norms, softmax sinks and learned positions.

    Upstream's own estimate leaves out the linear layers' biases and the position embedding
    (compute_weight_and_optimizer_memory in megatron/training/theoretical_memory_usage.py,
    core_v0.19.0).
    """
    model, layers = experiment.model, stages.of_model(experiment)
    per_rank = parameters_on(experiment, 0)
    embedding = model.hidden_size * padded_vocab_size(model.vocab_size, experiment.tp)
    ends = embedding * (2 if _untied(experiment) else 1) + _positions(experiment) + _norm(model)
    whole = _held(experiment.model_copy(update=_WHOLE), layers)
    dense = whole.dense + ends
    used = (model.moe_router_topk or 0) / (model.num_experts or 1)
    return Parameters(
        total=dense + whole.experts,
        active=dense + round(whole.experts * used),
        per_rank=per_rank.dense + per_rank.experts,
    )


def parameters_on(experiment: Experiment, stage: int) -> Held:
    """What a rank of pipeline stage ``stage`` (from 0) holds, before data parallelism shards it.

    The last stage has the output layer: with tied embeddings, a copy of the word embedding. The
    stage of multi-token prediction has the word embedding, too.
    """
    model, tp = experiment.model, experiment.tp
    first, last = stage == 0, stage == experiment.pp - 1
    embedding = model.hidden_size * padded_vocab_size(model.vocab_size, tp) // tp
    ends = (embedding + _positions(experiment) if first else 0) + (_norm(model) if last else 0)
    if last and (_untied(experiment) or not first):
        ends += embedding
    predicts = model.predictors and predictor_chunk(experiment)[0] == stage
    if predicts and not first and (_untied(experiment) or not last):
        ends += embedding
    held = _held(experiment, stages.on_stage(experiment, stage))
    return replace(held, dense=held.dense + ends, ends=ends)


def quantised_weights(experiment: Experiment, stage: int) -> int:
    """Weights that a rank of pipeline stage ``stage`` multiplies in fewer than 16 bits."""
    if not experiment.quantised:
        return 0
    layers = stages.on_stage(experiment, stage)
    if stages.of_predictors(experiment) != experiment:
        layers = layers._replace(predictors=0)
    held = _held(experiment, layers)
    return held.matrices + held.expert_matrices


_WHOLE = {"tp": 1, "ep": 1, "etp": 1}


def _held(experiment: Experiment, layers: stages.Layers) -> Held:
    """What a rank holds of ``layers``."""
    model = experiment.model
    numbers = {kind: getattr(layers, kind) for kind in get_args(LayerKind)}
    numbers[stages.predictor_kind(experiment)] += layers.predictors
    parts = {kind: _of_layer(experiment, kind) for kind, number in numbers.items() if number}
    joining = layers.predictors * (linear_layers.of_predictor(model).weights // experiment.tp)
    matrices = joining + sum(numbers[kind] * part.matrices for kind, part in parts.items())
    others = layers.predictors * 3 * _norm(model)
    others += sum(numbers[kind] * part.others for kind, part in parts.items())
    held = numbers["experts"] * (model.num_experts or 0) // experiment.ep
    expert = parts.get("experts", _Layer(0, 0))
    return Held(
        dense=matrices + others,
        experts=held * (expert.expert + expert.expert_bias),
        matrices=matrices,
        expert_matrices=held * expert.expert,
        ends=0,
    )


def dummy_gradients(experiment: Experiment, stage: int) -> list[int]:
    """Elements of the gradients that stand in for those that fused accumulation does not write.

    Autograd wants a gradient of each weight; Transformer Engine hands out one of each shape, which
    it never frees (get_dummy_wgrad in transformer_engine/pytorch/module/base.py; upstream's output
    layer uses it, too).
    """
    if not experiment.gradient_fusion or experiment.lora:
        return []
    model, layers = experiment.model, stages.on_stage(experiment, stage)
    shapes = set()
    predicting = {stages.predictor_kind(experiment)} if layers.predictors else set()
    for kind in {*layers.kinds} - {"predictors"} | predicting:
        shapes |= {
            one.on_rank(experiment.tp) for one in linear_layers.of_layer(model, kind).values()
        }
        if kind == "experts":
            expert = linear_layers.of_mlp(model, model.moe_ffn).values()
            shapes |= {one.on_rank(experiment.etp) for one in expert}
    if layers.predictors:
        shapes.add(linear_layers.of_predictor(model).on_rank(experiment.tp))
    if stage == experiment.pp - 1:
        vocabulary = padded_vocab_size(model.vocab_size, experiment.tp) // experiment.tp
        shapes.add((model.hidden_size, vocabulary))
    return [inputs * outputs for inputs, outputs in shapes]


@dataclass(frozen=True)
class _Layer:
    """A rank's parameters of one layer."""

    matrices: int
    """Weights of linear layers outside of experts."""
    others: int
    """Biases, norms, softmax sinks, the router; of Mamba what is not a linear layer."""
    expert: int = 0
    """Weights of one expert."""
    expert_bias: int = 0


def _of_layer(experiment: Experiment, kind: LayerKind) -> _Layer:
    model, tp, etp = experiment.model, experiment.tp, experiment.etp
    linears = linear_layers.of_layer(model, kind).values()
    matrices = sum(_weights(one, tp) for one in linears)
    others = _norm(model) + sum(_bias(one, tp) for one in linears)
    if kind in ("dense", "experts"):
        others += _norm(model)
    if kind not in ("mamba", "mlp"):
        sinks = model.num_attention_heads // tp if model.attention_sinks else 0
        others += _qk_norms(model) + sinks
    if kind == "mamba":
        others += sum(mamba_vectors(model.mamba, tp))
    if kind != "experts":
        return _Layer(matrices, others)
    router = (model.hidden_size + model.add_bias_linear) * (model.num_experts or 0)
    expert = linear_layers.of_mlp(model, model.moe_ffn).values()
    return _Layer(
        matrices,
        others + router,
        sum(_weights(one, etp) for one in expert),
        sum(_bias(one, etp) for one in expert),
    )


def mamba_vectors(mamba: Mamba, tp: int) -> tuple[int, ...]:
    """Elements of a Mamba layer's parameters on a rank besides its linear layers and their norm.

    The convolution's weight and bias, dt_bias, A_log and D, and the weight of the norm before
    out_proj, in the order of MambaMixer.__init__ in megatron/core/ssm/mamba_mixer.py.
    """
    heads, channels = mamba.num_heads // tp, mamba.conv_size // tp
    return (channels * CONV_WIDTH, channels, heads, heads, heads, mamba.inner_size // tp)


def _weights(linear: Linear, tp: int) -> int:
    """Weights of a linear layer on a rank."""
    return math.prod(linear.on_rank(tp))


def _bias(linear: Linear, tp: int) -> int:
    """A linear layer's bias on a rank, split as its outputs are."""
    return linear.bias * linear.outputs // (tp if linear.split == "outputs" else 1)


def _norm(model: Model) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def _positions(experiment: Experiment) -> int:
    model = experiment.model
    learned = model.position_embedding == "learned_absolute"
    return model.hidden_size * (experiment.positions or experiment.seq_length) if learned else 0


def _qk_norms(model: Model) -> int:
    """Parameters of a layer's norms of queries and keys, or of what these are rebuilt from."""
    latent = model.latent_attention
    sizes = {
        "none": 0,
        "head": 2 * model.head_size,
        "projection": model.query_size + model.key_size,
    }
    if latent:
        sizes["head"] = (latent.q_lora_rank or model.hidden_size) + latent.kv_lora_rank
    return sizes[model.qk_norm] * (2 if model.normalization == "LayerNorm" else 1)


def step_flops(
    experiment: Experiment, tokens: float | None = None, squares: float | None = None
) -> float:
    """Model FLOPs of one training step over the whole batch, without recomputation.

    As in Korthikanti et al. 2022 (arXiv:2205.05198, section 5 and appendix A), with causal
    attention. A token costs 6 FLOPs for each weight of the matrix products: 2 for a multiply-add,
    once forward and twice backward. So it does in the output layer, over the padded vocabulary, and
    again for each token that multi-token prediction predicts. A Mamba layer's recurrence costs 7 x
    width x state more, forward, and twice that backward, as upstream counts it; its convolution is
    left out. Attention costs 3 x (width of the
    queries + width of the values) x tokens seen x 2, for scores and values, where a token sees half
    of its sequence, or a window of it. Of experts, those a token is routed to count; routers do
    not. A frozen weight (LoRA) has no gradient and costs 4; what lies before the first adapter has
    no backward pass at all and costs 2.

    Args:
        tokens: of the batch; None: ``global_batch_size`` sequences of ``seq_length``.
        squares: sum of the squared lengths of the sequences that attention keeps apart, as upstream
            counts packed ones; None: as for ``tokens``.
    """
    tokens, squares = _batch(experiment, tokens, squares)
    model, layers = experiment.model, stages.of_model(experiment)
    windowed = (model.num_layers + 1) // 2 if model.window_size else 0
    in_window = _windowed_squares(experiment, tokens, squares)
    seen = squares * (layers.attending - windowed) + in_window * windowed
    output = model.hidden_size * padded_vocab_size(model.vocab_size, experiment.tp)
    attention = 3 * (model.query_size + model.context_size) * seen
    if model.mamba:
        inner = model.mamba.inner_size
        attention += 3 * layers.mamba * _SCAN * inner * model.mamba.state_dim * tokens
    weights = _weights_of_layers(model, layers)
    if experiment.lora is None:
        return tokens * 6 * (weights + (1 + model.predictors) * output) + attention
    whole = adapter_widths(experiment.model_copy(update={"tp": 1}))
    adapters = experiment.lora.rank * sum(map(sum, whole.values()))
    of_weights = 4 * weights + 6 * model.num_layers * adapters + 4 * output
    skipped = _without_backward(experiment, tokens, in_window if windowed else squares)
    return tokens * of_weights + attention - skipped


_SCAN = 7
"""FLOPs of a channel and a value of its state for a token, forward (mamba_layer_flops in
megatron/training/training.py)."""


def upstream_flops(
    experiment: Experiment, tokens: float | None = None, squares: float | None = None
) -> float:
    """The FLOPs of a step exactly as upstream counts them for its TFLOP/s; arguments as above.

    Upstream counts frozen weights as if they were trained, attention in a window as if it saw all
    tokens, a gated quick-GELU as two products where it is three, and Mamba layers as if their heads
    were always twice as wide as the hidden state; and it counts the norms within latent attention
    and multi-token prediction as products.
    Source: num_floating_point_operations in megatron/training/training.py, core_v0.19.0.
    """
    tokens, squares = _batch(experiment, tokens, squares)
    model, hidden, layers = (
        experiment.model,
        experiment.model.hidden_size,
        stages.of_model(experiment),
    )
    attention = sum(one.weights for one in linear_layers.of_attention(model).values())
    if model.mamba:
        return _upstream_hybrid_flops(experiment, tokens, squares)
    norms = 0
    if latent := model.latent_attention:
        norms = (latent.q_lora_rank or 0) + latent.kv_lora_rank
    matrices = 3 if model.activation == "swiglu" else 2
    kind = stages.predictor_kind(experiment)
    widths = {"dense": model.ffn, "experts": _routed_width(model) + _shared_width(model)}
    width = sum(widths[which] * getattr(layers, which) for which in widths)
    width += widths[kind] * layers.predictors
    output = hidden * padded_vocab_size(model.vocab_size, experiment.tp)
    joined = layers.predictors * (3 * hidden + linear_layers.of_predictor(model).weights)
    per_token = layers.total * (attention + norms) + matrices * hidden * width + joined
    return (
        tokens * 6 * (per_token + (1 + layers.predictors) * output)
        + 3 * layers.total * (model.query_size + model.context_size) * squares
    )


def _upstream_hybrid_flops(experiment: Experiment, tokens: float, squares: float) -> float:
    """``upstream_flops`` of a model with Mamba layers: hybrid_flops there."""
    model, layers = experiment.model, stages.of_model(experiment)
    hidden, mamba = model.hidden_size, model.mamba
    inner = 2 * hidden
    projected = 2 * inner + 2 * mamba.num_groups * mamba.state_dim + mamba.num_heads
    of_mamba = 2 * hidden * (projected + inner) + _SCAN * inner * mamba.state_dim
    matrices = 3 if model.activation == "swiglu" else 2
    per_token = (
        layers.mamba * of_mamba
        + 4 * layers.attention * hidden * (model.query_size + model.key_size)
        + 2 * layers.mlp * matrices * hidden * model.ffn
        + 2 * hidden * padded_vocab_size(model.vocab_size, experiment.tp)
    )
    return 3 * (tokens * per_token + 2 * layers.attention * model.query_size * squares)


def share_of_upstreams(
    experiment: Experiment, tokens: float | None = None, squares: float | None = None
) -> float:
    """Model FLOPs over upstream's count; 1 if all weights are trained with full attention."""
    ours = step_flops(experiment, tokens, squares)
    return ours / upstream_flops(experiment, tokens, squares)


def tflops_per_gpu(experiment: Experiment, step_ms: float) -> float:
    """Model TFLOP/s of one GPU at this step time."""
    return step_flops(experiment) / (step_ms * 1e-3) / experiment.world_size / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: model TFLOP/s per GPU over its dense peak."""
    return tflops / peak_tflops


def _batch(
    experiment: Experiment, tokens: float | None, squares: float | None
) -> tuple[float, float]:
    """Tokens and squared lengths of a batch, by default of whole sequences."""
    sequences, length = experiment.global_batch_size, experiment.seq_length
    return (
        sequences * length if tokens is None else tokens,
        sequences * length**2 if squares is None else squares,
    )


def _routed_width(model: Model) -> int:
    """Width of all experts that a token is routed to."""
    return model.moe_ffn * (model.moe_router_topk or 1)


def _shared_width(model: Model) -> int:
    return model.moe_shared_expert_intermediate_size or 0


def _products(model: Model, kind: LayerKind) -> dict[str, int]:
    """Weights that a token is multiplied with in a layer, by linear layer, in order.

    Of the experts, those that it is routed to, and the shared one.
    """
    linears = linear_layers.of_layer(model, kind)
    if kind == "experts":
        width = _routed_width(model) + _shared_width(model)
        linears |= linear_layers.of_mlp(model, width)
    return {name: linear.weights for name, linear in linears.items()}


def _weights_of_layers(model: Model, layers: stages.Layers) -> int:
    """Weights that a token is multiplied with in ``layers``."""
    kinds = [kind for kind in get_args(LayerKind) if getattr(layers, kind)]
    weights = sum(getattr(layers, kind) * sum(_products(model, kind).values()) for kind in kinds)
    if layers.predictors:
        last = sum(_products(model, "experts" if model.num_experts else "dense").values())
        weights += layers.predictors * (linear_layers.of_predictor(model).weights + last)
    return weights


def _windowed_squares(experiment: Experiment, tokens: float, squares: float) -> float:
    """``squares`` of a layer whose tokens see a window of w: for s tokens, s^2 becomes 2 s w - w^2.

    Of packed sequences, whose lengths are not known here, at most 2 w a token.
    """
    sequences, length = experiment.global_batch_size, experiment.seq_length
    window = min(experiment.model.window_size or length, length)
    if squares == sequences * length**2:
        return sequences * (2 * length * window - window**2)
    return min(squares, 2 * window * tokens)


def _without_backward(experiment: Experiment, tokens: float, squares: float) -> float:
    """FLOPs of gradients that nobody needs: of the first layer's input, down to its first adapter.

    With full recomputation they are computed all the same, since the embedding's output requires a
    gradient (harness/finetune/lora.py).
    """
    if experiment.recompute == "full":
        return 0
    products = _products(experiment.model, "experts" if experiment.model.num_experts else "dense")
    order = list(products)
    first = min(experiment.lora.targets, key=order.index)
    before = order[: order.index(first) + 1]
    inner, _ = adapter_widths(experiment.model_copy(update={"tp": 1}))[first]
    weights = sum(products[name] for name in before) + experiment.lora.rank * inner
    attention = 4 * experiment.model.query_size * squares if "linear_proj" in before else 0
    return 2 * tokens * weights + attention


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


def state_of_parameter(experiment: Experiment, replicas: int, *, matrix: bool = True) -> State:
    """Bytes of one trained parameter on a rank, sharded over ``replicas`` ranks.

    ``matrix``: it is a weight of a linear layer, which Muon optimizes; Adam has the rest
    (megatron/core/optimizer/emerging_optimizers.py).
    """
    # weight, gradient; fp32 copy and two Adam moments (theoretical_memory_usage.py in
    # megatron/training)
    weight, gradient, optimizer = (4, 4, 8) if experiment.precision == "fp32" else (2, 4, 12)
    # Both kinds of FSDP keep gradients as weights: _resolve_group_grad_dtype in Megatron-FSDP's
    # param_and_grad_buffer.py, without --megatron-fsdp-main-grads-dtype; fully_shard without a
    # precision policy
    if experiment.gradients == "bf16" or experiment.fully_sharded:
        gradient = weight
    if experiment.optimizer_state == "bf16":
        # Two bf16 moments, and of the fp32 copy the two bytes that the bf16 weight lacks
        # (store_param_remainders in megatron/core/optimizer/optimizer_config.py); tensorwise and
        # blockwise fp8 keep all four (use_precision_aware_optimizer_no_fp8_or_ds_fp8 there)
        optimizer = 6 if experiment.fp8_recipe in (None, "delayed") else 8
    elif experiment.optimizer == "muon" and matrix:
        optimizer -= 4  # one moment
    if experiment.fp8_params and matrix:
        weight = 0  # its copies in fp8 are all there is: _quantised_bytes in memory.py
    optimizer *= 1 - experiment.offload
    replicas = max(replicas // experiment.optimizer_instances, 1)
    # What each level shards: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5
    if experiment.optimizer == "muon" and not matrix:
        # the layer-wise optimizer gives whole tensors to ranks, so one has all of the embedding
        # (greedy by size: megatron/core/optimizer/layer_wise_optimizer.py)
        replicas = 1
    match experiment.sharding:
        case "no_shard":
            return State(weight, gradient, optimizer)
        case "optim" | "fsdp_optim":
            return State(weight, gradient, optimizer / replicas)
        case "fsdp_optim_grads":
            return State(weight, gradient / replicas, optimizer / replicas)
        case "fsdp_optim_grads_params" | "torch_fsdp2":
            return State(weight / replicas, gradient / replicas, optimizer / replicas)


def state_on(experiment: Experiment, stage: int) -> State:
    """Bytes of weights, gradients and optimizer state on a rank of pipeline stage ``stage``.

    Shards are over data-parallel x context-parallel ranks; of experts, over the ranks that hold the
    same. With LoRA the weights are frozen: they have neither gradients nor optimizer state.
    """
    held, replicas = parameters_on(experiment, stage), experiment.replicas
    if experiment.lora:
        size = 4 if experiment.precision == "fp32" else 2
        frozen = State((held.dense + held.experts) * size, 0, 0)
        adapter = state_of_parameter(experiment, replicas)
        return frozen + adapter.times(adapter_parameters(experiment, stage))
    of_experts = experiment.expert_replicas
    groups = (
        (held.matrices, replicas, True),
        (held.expert_matrices, of_experts, True),
        (held.dense - held.matrices, replicas, False),
        (held.experts - held.expert_matrices, of_experts, False),
    )
    parts = (
        state_of_parameter(experiment, among, matrix=matrix).times(count)
        for count, among, matrix in groups
    )
    return sum(parts, State(0, 0, 0))


def state_gib(experiment: Experiment) -> float:
    """Weights, gradients and optimizer state on a rank of the first stage, in GiB."""
    return state_on(experiment, 0).total / 2**30


def adapter_parameters(experiment: Experiment, stage: int = 0) -> int:
    """Parameters of LoRA's adapters on a rank of ``stage``: factors [rank, in], [out, rank] each.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    rank = experiment.lora.rank if experiment.lora else 0
    widths = sum(map(sum, adapter_widths(experiment).values()))
    return widths * rank * stage_layers(experiment)[stage]


def adapter_widths(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a rank that have an adapter.

    Under tensor parallelism the factor on the split side is split, the other one is whole
    (harness/finetune/lora.py).
    """
    model, tp = experiment.model, experiment.tp
    widths = {
        "linear_qkv": (model.hidden_size, model.qkv_size // tp),
        "linear_proj": (model.query_size // tp, model.hidden_size),
        "linear_fc1": (model.hidden_size, model.ffn * model.fc1_matrices // tp),
        "linear_fc2": (model.ffn // tp, model.hidden_size),
    }
    targets = experiment.lora.targets if experiment.lora else ()
    return {target: widths[target] for target in targets}


def _untied(experiment: Experiment) -> bool:
    """Whether the output layer has its own weights: fully_shard cannot share them."""
    return experiment.model.untie_embeddings or experiment.sharding == "torch_fsdp2"
