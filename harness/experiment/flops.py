"""Parameters, model FLOPs and state memory of an experiment, from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.experiment.catalog import Experiment


@dataclass(frozen=True)
class Parameters:
    """Parameters with the padded vocabulary; ``total`` and ``active`` count tied embeddings once."""

    total: int
    active: int
    """What one token passes through: of the experts, only those it is routed to."""
    per_rank: int
    """Held by a rank of the fullest pipeline stage, which is the first: it has both embeddings."""
    experts_per_rank: int
    """The part of ``per_rank`` in experts, whose replicas are fewer."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """``vocab_size`` rounded up to a multiple of 128 x tp.

    Source: vocab_size_with_padding in megatron/core/tokenizers/utils/build_tokenizer.py, core_v0.19.0.
    """
    return math.ceil(vocab_size / (128 * tp)) * 128 * tp


def count_parameters(e: Experiment) -> Parameters:
    """Parameters of upstream's GPT model: biases, norms, softmax sinks and learned positions included.

    Upstream's own estimate leaves out the linear layers' biases and the position embedding
    (compute_weight_and_optimizer_memory in megatron/training/theoretical_memory_usage.py, core_v0.19.0).
    """
    m, h = e.model, e.model.hidden_size
    bias, norm = int(m.add_bias_linear), h * (2 if m.normalization == "LayerNorm" else 1)
    routed, chosen = (m.num_experts, m.moe_router_topk) if m.num_experts else (0, 0)
    qkv = m.query_size * (2 if m.attention_output_gate else 1) + 2 * m.key_size

    column = (h + bias) * qkv + (m.num_attention_heads if m.attention_sinks else 0)
    row, row_bias = m.query_size * h, bias * h
    replicated = 2 * norm + _qk_norms(e)
    if routed:
        expert = (h + bias) * _fc1(e, m.moe_ffn) + h * m.moe_ffn
        expert_bias = bias * h
        replicated += (h + bias) * routed
    else:
        expert, expert_bias = 0, 0
        column += (h + bias) * _fc1(e, m.ffn)
        row += h * m.ffn
        row_bias += bias * h
    shared = column + row + row_bias + replicated

    words = h * padded_vocab_size(m.vocab_size, e.tp)
    output = words if _untied(e) else 0
    positions = h * e.seq_length if m.position_embedding == "learned_absolute" else 0
    ends = words + output + positions + norm

    layers = m.num_layers // e.pp
    experts_per_rank = layers * routed // e.ep * (expert // e.etp + expert_bias)
    first_stage = layers * ((column + row) // e.tp + row_bias + replicated) + words // e.tp + positions
    if e.pp == 1:
        first_stage += norm + output // e.tp
    return Parameters(
        total=m.num_layers * (shared + routed * (expert + expert_bias)) + ends,
        active=m.num_layers * (shared + chosen * (expert + expert_bias)) + ends,
        per_rank=first_stage + experts_per_rank,
        experts_per_rank=experts_per_rank,
    )


def _fc1(e: Experiment, width: int) -> int:
    """Outputs of an MLP's first matrix: a gated one makes two halves of ``width``."""
    return width * (2 if e.model.gated else 1)


def _qk_norms(e: Experiment) -> int:
    """Parameters of a layer's norms of queries and keys."""
    m = e.model
    weights = {"none": 0, "head": 2 * m.head_size, "projection": m.query_size + m.key_size}[m.qk_norm]
    return weights * (2 if m.normalization == "LayerNorm" else 1)


def step_flops(e: Experiment) -> int:
    """Model FLOPs of one training step over the whole batch, exactly as upstream counts them for its TFLOP/s.

    A token costs 6 x (weights of the matrix products + width of the queries x seq_length for causal attention) a
    layer, and 6 x hidden_size x padded vocabulary in the output layer. 6 is 2 for a multiply-add, once
    forward and twice backward. Of the experts, those a token is routed to count. Recomputation does not count.
    Upstream counts attention in a window as if it saw all tokens, a gated quick-GELU as two products where it is three,
    and leaves out the router.
    Source: num_floating_point_operations in megatron/training/training.py, core_v0.19.0.
    """
    m, h = e.model, e.model.hidden_size
    queries = m.query_size * (2 if m.attention_output_gate else 1)
    attention = h * (queries + 2 * m.key_size) + m.query_size * h
    products = 3 if m.activation == "swiglu" else 2
    mlp = products * h * (m.moe_ffn * (m.moe_router_topk or 1) if m.num_experts else m.ffn)
    output = h * padded_vocab_size(m.vocab_size, e.tp)
    per_token = 6 * (m.num_layers * (attention + mlp + m.query_size * e.seq_length) + output)
    return per_token * e.global_batch_size * e.seq_length


def tflops_per_gpu(e: Experiment, step_ms: float) -> float:
    """Model TFLOP/s of one GPU at this step time, as upstream's log prints it."""
    return step_flops(e) / (step_ms * 1e-3) / e.world_size / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation, from 0 to 1: model TFLOP/s per GPU / its dense peak at the run's precision."""
    return tflops / peak_tflops


def state_bytes_per_parameter(e: Experiment, replicas: int) -> float:
    """Bytes of one parameter on a rank: weight, fp32 gradient and optimizer state, sharded over ``replicas``.

    bf16: 2 + 4 + 12 (fp32 copy, two Adam moments), so 18 replicated and 6 + 12/replicas with the distributed
    optimizer (upstream's theoretical_memory_usage.py). bf16 moments: 2 + 4 + 6, because two bytes of the fp32 copy are
    the weight itself (store_param_remainders in megatron/core/optimizer/optimizer_config.py). bf16 gradients: 2 of 4.
    Muon has one moment in place of two; that its embeddings stay with Adam does not count. fp32: 4 + 4 + 8. The fp8
    copies of weights and what FSDP gathers do not count.
    """
    weight, gradient, optimizer = (4, 4, 8) if e.precision == "fp32" else (2, 4, 12)
    if e.gradients == "bf16":
        gradient = 2
    if e.optimizer_state == "bf16":
        optimizer = 6
    elif e.optimizer == "muon":
        optimizer -= 4
    match e.sharding:
        case "no_shard":
            return weight + gradient + optimizer
        case "optim" | "fsdp_optim":
            return weight + gradient + optimizer / replicas
        case "fsdp_optim_grads":
            return weight + (gradient + optimizer) / replicas
        case "fsdp_optim_grads_params" | "torch_fsdp2":
            return (weight + gradient + optimizer) / replicas


def state_gib(e: Experiment) -> float:
    """Weights, gradients and optimizer state on the fullest rank, in GiB; no activations, no buffers.

    Shards are over data-parallel x context-parallel ranks; of experts, over the ranks that hold the same.
    """
    count = count_parameters(e)
    expert_replicas = max(e.world_size // (e.pp * e.ep * e.etp), 1)
    dense = (count.per_rank - count.experts_per_rank) * state_bytes_per_parameter(e, e.dp * e.cp)
    return (dense + count.experts_per_rank * state_bytes_per_parameter(e, expert_replicas)) / 2**30


def _untied(e: Experiment) -> bool:
    """Whether the output layer has weights of its own: fully_shard cannot share them with the embedding."""
    return e.model.untie_embeddings or e.sharding == "torch_fsdp2"
