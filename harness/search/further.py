"""What settings that the search leaves alone would bring, each by itself, in a layout it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.experiment import overrides
from harness.experiment.command_line import FIELDS
from harness.experiment.constraints import divisors, violations
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card
from harness.predict.capacity import surely_fits
from harness.predict.memory import Memory, predict
from harness.predict.step_time import StepTime
from harness.search.layouts import WORTH, Layout, Search

Option = Mapping[str, str]
SAME_RESULTS: tuple[Option, ...] = (
    {"TP_OVERLAP": "1"},
    {"EP_OVERLAP": "1"},
    {"MOE_DISPATCHER": "flex"},
    {"MOE_DISPATCHER": "allgather"},
    {"GRAD_FUSION": "1"},
    {"GROUPED_GEMM": "cublas"},
    {"GROUPED_GEMM": "fused"},
    {"ROUTER_FUSION": "1"},
    {"SHARED_EXPERT_OVERLAP": "1"},
    {"ATTENTION_MASK": "0"},
    {"RECOMPUTE": "selective", "RECOMPUTE_MODULES": "core_attn"},
    {"RECOMPUTE": "selective", "RECOMPUTE_MODULES": "mlp"},
    {"RECOMPUTE": "selective", "RECOMPUTE_MODULES": "layernorm,moe_act"},
    {"RECOMPUTE": "selective", "RECOMPUTE_MODULES": "layernorm,moe_act,mla_up_proj"},
    {"OFFLOAD": "1"},
)
OTHER_ARITHMETIC: tuple[Option, ...] = (
    {"GRADIENTS": "bf16"},
    {"OPTIMIZER_STATE": "bf16"},
    {"GRADIENTS": "bf16", "OPTIMIZER_STATE": "bf16"},
    {"FP8": "tensorwise"},
    {"FP8": "blockwise"},
    {"FP8": "mxfp8"},
    {"FP4": "nvfp4"},
    {"FP8": "tensorwise", "FP8_PARAMS": "1"},
)
LEAST_GIB = 1.0
"""Less memory saved is not worth a line, unless the step is faster."""


@dataclass(frozen=True)
class Further:
    """A setting, or several that belong together, and the layout with it."""

    option: Option
    experiment: Experiment
    memory: Memory
    step: StepTime
    other_arithmetic: bool
    """Losses differ, within what such precision brings."""

    @property
    def settings(self) -> str:
        """What is typed."""
        return overrides.typed(self.option)


def further(layout: Layout, search: Search) -> list[Further]:
    """The settings that make ``layout``'s step faster by formula or save memory; fastest first.

    What is typed already does not vary. None where no step time is known.
    """
    if not layout.step:
        return []
    same = (*SAME_RESULTS, *_instances(layout.experiment))
    found = [
        one
        for options, other in ((same, False), (OTHER_ARITHMETIC, True))
        for option in options
        if (one := _with(option, layout, search, other))
    ]
    return sorted(_best_of_each(found), key=lambda one: one.step.total)


def _instances(experiment: Experiment) -> Iterator[Option]:
    """Hybrid sharding: each number of copies of the sharded optimizer that divides the replicas."""
    for copies in divisors(experiment.replicas)[1:]:
        yield {"OPTIM_INSTANCES": str(copies)}


def _with(option: Option, layout: Layout, search: Search, other: bool) -> Further | None:
    """``layout`` with ``option``, where constraints allow it, it fits, and it is worth a line."""
    before, machine = layout.experiment, search.machine
    if any(key in search.experiment.overrides or FIELDS[key] in search.fixed for key in option):
        return None
    changed = overrides.admitted(search.row, before.overrides | option)
    if not changed or changed == before or not _has(search.card, changed):
        return None
    step, memory = machine.predict(changed), predict(changed)
    faster = step.total <= WORTH * layout.step.total
    smaller = memory.total <= layout.memory.total - LEAST_GIB
    if not (faster or smaller) or (search.card and not surely_fits(memory, search.card)):
        return None
    return Further(option, changed, memory, step, other)


def _has(card: Card | None, experiment: Experiment) -> bool:
    """Whether ``card`` has the kernels of ``experiment``."""
    return not card or not any(violations(experiment.model_copy(update={"card": card.key})))


def _best_of_each(found: list[Further]) -> list[Further]:
    """Of options that differ in their values only, or lead to the same experiment, the fastest."""
    best: dict[tuple[str, ...], Further] = {}
    for one in sorted(found, key=lambda one: one.step.total, reverse=True):
        best[(*one.option,)] = one
    alike = {
        one.experiment.model_copy(update={"overrides": {}}).model_dump_json(): one
        for one in reversed(best.values())
    }
    return [*alike.values()]
