"""Memory and step time of every layout of a table, by the formulas of harness/predict.

All terms are those of the formulas. Two things are not: which stage needs most memory is judged
without what CUDA graphs hide, and a pipeline takes its slowest stage's passes, and one pass through
the others before and after (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), where the
prediction simulates the schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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

COMBINED = {"at_most", "layer", "dense_layer", "gradients_s", "pipeline_messages"}
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


def least_gib(table: Table, kept: bool) -> np.ndarray:
    """The part of it that stays from step to step; what is kept of micro-batches too, if ``kept``,
    as the rows recompute."""
    state = [
        table.together(lambda rows, stage=stage: _Tensors(rows, stage).least(kept))
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


def _terms(formula: type) -> Iterator[str]:
    """The methods of ``formula`` without arguments that are not COMBINED of others."""
    for name, method in inspect.getmembers(formula, inspect.isfunction):
        if name not in COMBINED and len(inspect.signature(method).parameters) == 1:
            yield name


class _Tensors(StageTensors):
    """The tensors of many layouts on their ``stage``, one of STAGES."""

    def least(self, kept: bool) -> np.ndarray:
        """What stays from step to step, and what attention keeps of micro-batches if ``kept``."""
        state = self.state()
        least = state.weights + state.optimizer
        if kept:  # what FSDP2 keeps may lie where gradients come
            layers = zip(self.kept()[0], self.in_flight(), strict=True)
            least = least + sum(size * number for size, number in layers)
            least = least + state.gradients * (1 - self.gradients_grow())
        else:
            least = least + state.gradients
        return np.broadcast_to(least, len(self.experiment.rows))


def _tensors_term(name: str) -> Callable[[_Tensors], Any]:
    """A term that is asked of one stage where it is the same for all."""

    def term(self: _Tensors) -> Any:
        rows, asked = self.experiment, []

        def said(one: Experiment) -> Any:
            tensors = _OnStage(one, self.stage)
            found = getattr(tensors, name)()
            asked.append(tensors.asked)
            return found

        if rows.knows(f"any {name}"):
            return rows.each(f"any {name}", said)
        found = rows.each(f"{self.stage} {name}", said)
        if asked and not any(asked):
            rows.rename(f"{self.stage} {name}", f"any {name}")
        return found

    return term


class _OnStage(StageTensors):
    """The tensors of one layout; sees whether anything depends on the stage."""

    def __init__(self, experiment: Experiment, at: str) -> None:
        self.experiment, self.at, self.asked = experiment, at, False

    @property
    def stage(self) -> int:
        self.asked = True
        return STAGES[self.at](self.experiment)


class _Steps(StepWork):
    """The work of the ranks of many layouts."""

    def __init__(self, rows: Rows, speed: Speed) -> None:
        self.experiment, self.model = rows, rows.model
        self.speed, self.rates, self.constants = speed, speed.rates, speed.constants

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


def _steps_term(name: str) -> Callable[[_Steps], Any]:
    def term(self: _Steps) -> Any:
        speed = self.speed
        return self.experiment.each(
            f"step {name}", lambda one: getattr(StepWork(one, speed), name)()
        )

    return term


for _name in _terms(StageTensors):
    setattr(_Tensors, _name, _tensors_term(_name))
for _name in _terms(StepWork):
    setattr(_Steps, _name, _steps_term(_name))
