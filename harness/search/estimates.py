"""Memory and step time of every layout of a table, by the formulas of harness/predict.

All terms are those of the formulas. Two things are not: which stage needs most memory is judged
without what CUDA graphs hide, and a pipeline takes its slowest stage's passes, and one pass through
the others before and after (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), where the
prediction simulates the schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from harness.experiment.experiment import Experiment
from harness.predict import stages
from harness.predict.context import context_gib
from harness.predict.memory import GIB, StageTensors
from harness.predict.step_time import StepWork
from harness.predict.work import Speed
from harness.search.table import Rows, Table

COMBINED = {"at_most", "layer", "gradients_s", "pipeline_messages"}
"""Methods that put together what the other methods of their class say, arrays too."""


class Sizes(NamedTuple):
    """GiB of every layout, as of ``memory.Memory``."""

    all_tensors: np.ndarray
    context: np.ndarray


def sizes(table: Table) -> Sizes:
    """What every layout takes on its fullest rank."""
    tensors = [
        table.together(lambda rows, stage=stage: sum(_Tensors(rows, stage).at_most().values()))
        for stage in STAGES
    ]
    return Sizes(np.max(tensors, axis=0) / GIB, table.each(context_gib))


def resident_gib(table: Table) -> np.ndarray:
    """The part of it that stays from step to step."""
    state = [
        table.together(lambda rows, stage=stage: _Tensors(rows, stage).resident())
        for stage in STAGES
    ]
    return np.max(state, axis=0) / GIB


def steps_ms(table: Table, speed: Speed) -> np.ndarray:
    """How long a step of every layout takes."""
    return 1e3 * table.together(lambda rows: _Steps(rows, speed).step_s())


STAGES = {
    "first": lambda one: 0,
    "second": lambda one: min(1, one.pp - 1),
    "last": lambda one: one.pp - 1,
}
"""The stages of which one needs most memory, and one most time: those after the second have as many
layers, and fewer micro-batches in flight."""


def _by_terms(formula: type) -> Callable[[type], type]:
    """Makes a class ask each term of ``formula`` once for each combination of fields it reads.

    A term is a method without arguments that is not COMBINED of others.
    """

    def with_terms(cls: type) -> type:
        for name, method in inspect.getmembers(formula, inspect.isfunction):
            if (
                name not in COMBINED
                and name not in vars(cls)
                and len(inspect.signature(method).parameters) == 1
            ):
                setattr(cls, name, _term(name))
        return cls

    return with_terms


def _term(name: str) -> Callable[[Any], Any]:
    def term(self: Any) -> Any:
        return self.experiment.each(
            f"{self.kind} {name}", lambda one: getattr(self.of(one), name)()
        )

    return term


@_by_terms(StageTensors)
class _Tensors(StageTensors):
    """The tensors of many layouts on their ``stage``, one of STAGES."""

    @property
    def kind(self) -> str:
        return self.stage

    def of(self, one: Experiment) -> StageTensors:
        return StageTensors(one, STAGES[self.stage](one))

    def resident(self) -> np.ndarray:
        """What stays from step to step."""
        return np.broadcast_to(self.state().total, len(self.experiment.rows))


@_by_terms(StepWork)
class _Steps(StepWork):
    """The work of the ranks of many layouts."""

    kind = "step"

    def __init__(self, rows: Rows, speed: Speed) -> None:
        self.experiment, self.model = rows, rows.model
        self.speed, self.rates, self.constants = speed, speed.rates, speed.constants

    def of(self, one: Experiment) -> StepWork:
        return StepWork(one, self.speed)

    def step_s(self) -> np.ndarray:
        """A step, with the bubble by formula."""
        rows = self.experiment
        layers = {
            name: rows.each(f"layers {name}", partial(_layers, at=at))
            for name, at in STAGES.items()
        }
        if not rows.is_pipelined:
            passes = [(self.stage(layers["first"], True, True), 1)]
        else:
            passes = [
                (self.stage(layers["first"], True, False), 1),
                (self.stage(layers["second"], False, False), rows.array("pp") - 2),
                (self.stage(layers["last"], False, True), 1),
            ]
        slowest_s = forward_s = backward_s = np.zeros(len(rows.rows))
        whole_s = 0.0
        for both, number in passes:
            forward, backward = map(self.elapsed_s, both)
            slower = (forward + backward > slowest_s) & (number > 0)
            forward_s = np.where(slower, forward, forward_s)
            backward_s = np.where(slower, backward, backward_s)
            slowest_s = forward_s + backward_s
            whole_s = whole_s + number * (forward + backward)
        others_s = (whole_s - slowest_s) / rows.array("vpp")
        step_s = rows.array("num_microbatches") * slowest_s + others_s + self.optimizer_s()
        step_s = step_s + self.gradients_s(forward_s, backward_s)
        return step_s * (1 + self.late_share())


def _layers(one: Experiment, at: Callable[[Experiment], int]) -> stages.Layers:
    return stages.on_stage(one, at(one))
