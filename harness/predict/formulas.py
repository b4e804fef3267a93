"""The textbook formulas that the chapters quote, each with its source: activations, pipeline
bubbles, bytes exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.predict import timeline
from harness.predict.flops import count_parameters, state_gib, step_flops
from harness.predict.memory import predict

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment
    from harness.experiment.model import Model


def activations_per_sbh(e: Experiment) -> float | None:
    """Bytes of activations that a transformer layer keeps for its backward pass, in units of s x b
    x h.

    On one GPU 34. Tensor parallel 10 + 24/t, because norms' inputs and outputs and dropouts' masks
    stay whole; with sequence parallelism 34/t. Full recomputation: 2, the layer's input. What a
    score matrix would add (5as/h) is left out: flash and fused attention never store it. None for
    layers other than GPT-2's, which are what the paper counts.
    Source: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
    """
    if not _has_gpt2_layers(e.model):
        return None
    if e.recompute == "full":
        return 2 / (e.tp if e.sequence_parallel else 1)
    # of attention 8, of the MLP two tensors of its width
    whole, split = 10, 8 + 4 * e.model.ffn / e.model.hidden_size
    return (whole + split) / e.tp if e.sequence_parallel else whole + split / e.tp


def bubble(e: Experiment) -> float:
    """Time a stage waits over the time it works."""
    return timeline.bubble_fraction(e.pp, e.num_microbatches, e.vpp)


def idle_share(e: Experiment) -> float:
    """Share of a step that a stage waits: the bubble over bubble and work, (p-1)/(p-1 + v m)."""
    return bubble(e) / (1 + bubble(e))


def attention_exchange_mib(e: Experiment) -> float | None:
    """MiB that a rank receives in one layer's forward pass under context parallelism, bf16; None
    without it.

    Ring and all-gather: everyone else's keys and values, 2 x (n-1)/n x s b h. All-to-all: of
    queries, keys, values and outputs only its own heads, 4 x (n-1)/n x s b h / n, so that it falls
    as ranks are added.
    Source: Jacobs et al. 2023 (arXiv:2309.14509), section 3.2; Liu et al. 2023 (arXiv:2310.01889),
    section 3.
    """
    if e.cp == 1:
        return None
    keys_and_values, queries_and_outputs = 2 * e.model.key_size, 2 * e.model.query_size
    width = (
        (keys_and_values + queries_and_outputs) / e.cp
        if e.cp_comm_type == "a2a"
        else keys_and_values
    )
    return 2 * e.seq_length * e.micro_batch_size * width / e.tp * (e.cp - 1) / e.cp / 2**20


def _has_gpt2_layers(m: Model) -> bool:
    return not (
        m.num_experts or m.gated or m.num_query_groups or m.kv_channels or m.attention_output_gate
    )


OF_EXPERIMENT: dict[str, Callable[[Experiment], float | None]] = {
    "parameters_b": lambda e: count_parameters(e).total / 1e9,
    "active_b": lambda e: count_parameters(e).active / 1e9,
    "parameters_per_rank_b": lambda e: count_parameters(e).per_rank / 1e9,
    "state_gib": state_gib,
    "weights_gib": lambda e: predict(e).weights,
    "gradients_gib": lambda e: predict(e).gradients,
    "optimizer_gib": lambda e: predict(e).optimizer,
    "activations_gib": lambda e: predict(e).activations,
    "predicted_gib": lambda e: predict(e).total,
    "activations_per_sbh": activations_per_sbh,
    "bubble": bubble,
    "idle_share": idle_share,
    "attention_exchange_mib": attention_exchange_mib,
    "step_pflop": lambda e: step_flops(e) / 1e15,
    "gpus": lambda e: e.world_size,
    "microbatches": lambda e: e.num_microbatches,
}
"""What a document may ask of an experiment by name, units in the names."""
