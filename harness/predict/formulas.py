"""The formulas that documents may quote of an experiment, each by name and with its source."""

from __future__ import annotations

from collections.abc import Callable

from harness.experiment.experiment import Experiment
from harness.predict import timeline
from harness.predict.flops import count_parameters, state_gib, step_flops
from harness.predict.memory import predict


def activations_per_sbh(experiment: Experiment) -> float | None:
    """Bytes of activations that a layer keeps for its backward pass, in units of s x b x h.

    On one GPU 34. Tensor parallel 10 + 24/t, because norms' inputs and outputs and dropouts' masks
    stay whole; with sequence parallelism 34/t. Full recomputation: 2, the layer's input. What a
    score matrix would add (5as/h) is left out: flash and fused attention never store it. None for
    layers other than GPT-2's, which are what the paper counts.
    Source: Korthikanti et al. 2022 (arXiv:2205.05198), table 2.
    """
    model, tp = experiment.model, experiment.tp
    gpt2_layers = not (
        model.num_experts
        or model.gated
        or model.num_query_groups
        or model.kv_channels
        or model.attention_output_gate
    )
    if not gpt2_layers:
        return None
    if experiment.recompute == "full":
        return 2 / (tp if experiment.sequence_parallel else 1)
    # split are 8 of attention, and of the MLP two tensors of its width
    whole, split = 10, 8 + 4 * model.ffn / model.hidden_size
    return (whole + split) / tp if experiment.sequence_parallel else whole + split / tp


def bubble(experiment: Experiment) -> float:
    """Time that a stage waits over the time it works."""
    return timeline.bubble_fraction(experiment.pp, experiment.num_microbatches, experiment.vpp)


def idle_share(experiment: Experiment) -> float:
    """Share of a step that a stage waits: (p-1)/(p-1 + v m)."""
    return bubble(experiment) / (1 + bubble(experiment))


def attention_exchange_mib(experiment: Experiment) -> float | None:
    """MiB that a rank receives in a layer's forward pass under context parallelism, in bf16.

    Ring and all-gather: everyone else's keys and values, 2 x (n-1)/n x s b h. All-to-all: of
    queries, keys, values and outputs only its own heads, 4 x (n-1)/n x s b h / n, which falls as
    ranks are added. All-to-all of a ranks and a ring of n/a: 4 x (a-1)/a x s b h / n, and then
    2 x (n/a - 1) x s b h / n. None without context parallelism.
    Source: Jacobs et al. 2023 (arXiv:2309.14509), section 3.2; Liu et al. 2023 (arXiv:2310.01889),
    section 3.
    """
    model, cp = experiment.model, experiment.cp
    if cp == 1:
        return None
    heads, keys = experiment.cp_levels
    width = 2 * (model.key_size + model.query_size) * (heads - 1) / heads
    width += 2 * model.key_size * (keys - 1)
    return 2 * experiment.rank_tokens * width / experiment.tp / 2**20


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
