"""The machines whose measured steps calibrate predictions (experiments/calibrations.yaml).

``make calibrate`` writes the file; harness/evidence/calibrate.py fits its constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel

from harness.errors import UserError, nearest
from harness.experiment import overrides
from harness.experiment.catalog import EXPERIMENTS, load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, required_card
from harness.predict import step_time
from harness.predict.step_time import StepTime
from harness.predict.timeline import Times
from harness.predict.work import Calibration, Positive
from harness.system import yaml_files

FILE = EXPERIMENTS / "calibrations.yaml"


class Fitted(BaseModel, frozen=True, extra="forbid"):
    """One measured step and two predictions of it."""

    measured_ms: Positive
    predicted_ms: Positive
    left_out_ms: Positive
    """Predicted by constants fitted without this row and others of the same experiment."""
    make: str | None = None
    """What ran, if it is not the row's name: ``446``, or ``111 FP8=tensorwise``."""


class Machine(BaseModel, frozen=True, extra="forbid"):
    """One kind of machine: where its steps were measured, and the constants fitted to them."""

    gpu: str
    """A card's short name (hardware.py)."""
    measured_by: str
    """``records``, or a group of references.yaml."""
    switch_reduces: bool
    """Whether the NVLink switch computes all-reduces (NCCL's NVLS)."""
    like: str | None = None
    """The machine, earlier in the file, whose constants it takes where its own steps do not
    determine one."""
    constants: Calibration = Calibration()
    rows: dict[str, Fitted] = {}
    """Empty until ``make calibrate`` has fitted the constants."""

    @cached_property
    def card(self) -> Card:
        """The GPU's data. Raises UserError if ``gpu`` is unknown or has no bf16."""
        gpu = required_card(self.gpu, f"gpu = {self.gpu!r}")
        if gpu.bf16_tflops is None:
            raise UserError(
                f"gpu = {self.gpu!r}: {gpu.name} has no bf16, and steps are predicted in bf16 only"
            )
        return gpu

    def predict(self, experiment: Experiment) -> StepTime:
        """A step of ``experiment`` here, with no other run on the node.

        Only where ``step_time.unknown(experiment)`` is empty. Raises UserError if ``experiment``
        computes in fp8 and the card does not.
        """
        if experiment.precision == "fp8" and self.card.fp8_tflops is None:
            raise UserError(
                f"{experiment.id} computes in fp8, which {self.card.name} does not (Ada, Hopper and"
                " later do)"
            )
        return step_time.predict(
            experiment, self.card, self.constants, switch_reduces=self.switch_reduces
        )

    def stage_times(self, experiment: Experiment) -> Times:
        """Each pipeline stage's passes of one micro-batch, in ms; where ``predict`` applies."""
        return step_time.stage_times(
            experiment, self.card, self.constants, switch_reduces=self.switch_reduces
        )

    def row_of(self, experiment: Experiment) -> Fitted | None:
        """The row in which ``experiment`` ran; of several, the one with its id as name."""
        command = overrides.command_of(experiment)
        ran = {name: row for name, row in self.rows.items() if (row.make or name) == command}
        return ran.get(experiment.id) or next(iter(ran.values()), None)

    def misses(self) -> tuple[float, float, float]:
        """Relative errors on rows left out of the fit: median, 90th percentile, largest."""
        off = sorted(abs(row.left_out_ms / row.measured_ms - 1) for row in self.rows.values())
        return median(off), off[math.ceil(0.9 * len(off)) - 1], off[-1]

    def how_sure(self, *experiments: Experiment) -> str:
        """The error of predictions for ``experiments``, as a phrase.

        Where an experiment has work that no row has, its error is unknown.
        """
        half, most, _ = self.misses()
        known = (
            f"error on rows left out of the fit: median {half:.1%}, 90th percentile {most:.0%} "
            f"({len(self.rows)} rows)"
        )
        missing = {one.label: self.unmeasured(one) for one in experiments}
        if not any(missing.values()):
            return known
        *others, last = dict.fromkeys(kind for found in missing.values() for kind in found)
        kinds = f"{', '.join(others)} or {last}" if others else last
        if all(missing.values()):
            return f"no measured row has {kinds}: error unknown"
        return f"{known}; error unknown with {kinds}, which no measured row has"

    def unmeasured(self, experiment: Experiment) -> tuple[str, ...]:
        """The work in ``experiment`` that no row has, and pairs of methods that no row combines."""
        ran = [_ran(row.make or name) for name, row in self.rows.items()]
        alone = sorted(step_time.kinds(experiment).difference(*map(step_time.kinds, ran)))
        measured = sorted(step_time.methods(experiment).difference(alone))
        together = [step_time.methods(one) for one in ran]
        pairs = [
            f"{a} with {b}"
            for a, b in combinations(measured, 2)
            if not any({a, b} <= both for both in together)
        ]
        return (*alone, *pairs)


@cache
def _ran(command: str) -> Experiment:
    """What ran in a row, such as ``111 FP8=tensorwise``."""
    return overrides.experiment_of(command, load_catalog())


@cache
def load(path: Path = FILE) -> Mapping[str, Machine]:
    """Every machine by its name. Raises UserError if the file is not valid."""
    machines: dict[str, Machine] = {}
    for key, fields in (entries := yaml_files.read(path)).items():
        with yaml_files.entry(path, entries, key):
            machines[str(key)] = _machine(f"{path.name}: {key}", fields, list(machines))
    return machines


def _machine(where: str, fields: Any, above: Sequence[str]) -> Machine:
    """One entry of the file, after those named ``above``. Raises UserError if it is not valid."""
    fields = dict(yaml_files.mapping(fields, where))
    if isinstance(fields.get("rows"), dict):
        fields["rows"] = {str(key): row for key, row in fields["rows"].items()}
    machine = yaml_files.build(Machine, fields, where)
    try:
        _ = machine.card
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if machine.like is not None and machine.like not in above:
        raise UserError(
            f"{where}: like = {machine.like!r}: no earlier entry has this name; "
            f"{nearest(machine.like, above)}"
        )
    return machine


def fitted() -> Mapping[str, Machine]:
    """The machines that ``make calibrate`` has fitted."""
    return {name: machine for name, machine in load().items() if machine.rows}


def summary(experiment: Experiment, card: Card) -> str | None:
    """One line on the step time of ``experiment``, printed before a run; None without a formula."""
    machine = machine_of(card)
    if machine is None or step_time.unknown(experiment):
        return None
    return (
        f"step by formula: {machine.predict(experiment).total:,.0f} ms alone on the node;"
        f" {machine.how_sure(experiment)}"
    )


def machine_measured_by(group: str) -> Machine | None:
    """The calibrated machine whose steps are those of this group of references.yaml."""
    return next((machine for machine in fitted().values() if machine.measured_by == group), None)


def machine_of(card: Card) -> Machine | None:
    """The calibrated machine with cards of this kind; of several, the last in the file."""
    return next((machine for machine in reversed(fitted().values()) if machine.card == card), None)
