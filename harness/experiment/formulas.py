"""The textbook formulas that the chapters quote, each with its source: activations, pipeline bubbles, bytes exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.experiment import timeline
from harness.experiment.flops import count_parameters, padded_vocab_size, state_gib, step_flops

if TYPE_CHECKING:
    from harness.experiment.catalog import Experiment, Model

GIB = 2**30


def activations_per_sbh(e: Experiment) -> float | None:
    """Bytes of activations that a transformer layer keeps for its backward pass, in units of s x b x h.

    On one GPU 34. Tensor parallel 10 + 24/t, because the inputs of norms and the outputs of dropouts stay whole; with
    sequence parallelism 34/t. Full recomputation: 2, the layer's input. What a score matrix would add (5as/h) is left out:
    flash and fused attention never store it. None for layers other than GPT-2's, which are what the paper counts.
    Source: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
    """
    if not _has_gpt2_layers(e.model):
        return None
    if e.recompute == "full":
        return 2 / (e.tp if e.sequence_parallel else 1)
    mlp = 19 * e.model.ffn / (4 * e.model.hidden_size)
    whole, split = 10, 5 + mlp
    return (whole + split) / e.tp if e.sequence_parallel else whole + split / e.tp


def activations_gib(e: Experiment) -> float | None:
    """Activations on a rank of the first pipeline stage, in GiB; None for layers other than GPT-2's.

    The first stage holds p micro-batches of L/p layers: as much as one micro-batch of the whole model, times 1 + (p-1)/(pv)
    with interleaving; never more than all m. Of recomputed layers, one is whole at a time. Without a pipeline, the last
    layer norm, the output layer's input and fp32 logits come on top: 4sbh(1 + V/h). Source: Korthikanti et al. 2022,
    section 4.2.3, and compute_activation_memory in megatron/training/theoretical_memory_usage.py, core_v0.19.0, which do
    not mind that there may be no more than m.
    """
    m = e.model
    if not _has_gpt2_layers(m):
        return None
    sbh = e.seq_length // e.cp * e.micro_batch_size * m.hidden_size
    in_flight = min(1 + (e.pp - 1) / (e.pp * e.vpp) if e.vpp > 1 else 1, e.num_microbatches / e.pp)
    layers = sbh * activations_per_sbh(e) * m.num_layers * in_flight
    if e.recompute == "full":
        layers += sbh * activations_per_sbh(e.with_changes(recompute="none"))
    ends = 4 * sbh * (1 + padded_vocab_size(m.vocab_size, e.tp) / m.hidden_size) / e.tp if e.pp == 1 else 0
    return (layers + ends) / GIB


def bubble(e: Experiment) -> float:
    """Time a stage waits over the time it works."""
    return timeline.bubble_fraction(e.pp, e.num_microbatches, e.vpp)


def idle_share(e: Experiment) -> float:
    """Share of a step that a stage waits: the bubble over bubble and work, (p-1)/(p-1 + v m)."""
    return bubble(e) / (1 + bubble(e))


def attention_exchange_mib(e: Experiment) -> float | None:
    """MiB that a rank receives in one layer's forward pass under context parallelism, bf16; None without it.

    Ring and all-gather: everyone else's keys and values, 2 x (n-1)/n x s b h. All-to-all: of queries, keys, values and
    outputs only its own heads, 4 x (n-1)/n x s b h / n, so that it falls as ranks are added.
    Source: Jacobs et al. 2023 (arXiv:2309.14509), section 3.2; Liu et al. 2023 (arXiv:2310.01889), section 3.
    """
    if e.cp == 1:
        return None
    keys_and_values, queries_and_outputs = 2 * e.model.key_size, 2 * e.model.query_size
    width = (keys_and_values + queries_and_outputs) / e.cp if e.cp_comm_type == "a2a" else keys_and_values
    return 2 * e.seq_length * e.micro_batch_size * width / e.tp * (e.cp - 1) / e.cp / 2**20


def weights_gib(e: Experiment) -> float | None:
    """Weights on the fullest rank in GiB; None where FSDP shards them."""
    return None if _fsdp(e) else count_parameters(e).per_rank * (4 if e.precision == "fp32" else 2) / GIB


def gradients_gib(e: Experiment) -> float | None:
    """Gradients on the fullest rank in GiB, in fp32 and held whole; None where FSDP shards them."""
    return None if _fsdp(e) else count_parameters(e).per_rank * 4 / GIB


def optimizer_gib(e: Experiment) -> float | None:
    """Optimizer state on the fullest rank in GiB, sharded or not; None under FSDP."""
    return None if _fsdp(e) else state_gib(e) - weights_gib(e) - gradients_gib(e)


def _has_gpt2_layers(m: Model) -> bool:
    return not (m.num_experts or m.gated or m.num_query_groups or m.kv_channels or m.attention_output_gate)


def _fsdp(e: Experiment) -> bool:
    return e.sharding not in ("no_shard", "optim")


OF_EXPERIMENT: dict[str, Callable[[Experiment], float | None]] = {
    "parameters_b": lambda e: count_parameters(e).total / 1e9,
    "active_b": lambda e: count_parameters(e).active / 1e9,
    "parameters_per_rank_b": lambda e: count_parameters(e).per_rank / 1e9,
    "state_gib": state_gib,
    "weights_gib": weights_gib,
    "gradients_gib": gradients_gib,
    "optimizer_gib": optimizer_gib,
    "activations_per_sbh": activations_per_sbh,
    "activations_gib": activations_gib,
    "bubble": bubble,
    "idle_share": idle_share,
    "attention_exchange_mib": attention_exchange_mib,
    "step_pflop": lambda e: step_flops(e) / 1e15,
    "gpus": lambda e: e.world_size,
    "microbatches": lambda e: e.num_microbatches,
}
"""What a document may ask of an experiment by name, units in the names."""
