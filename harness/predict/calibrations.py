"""The machines whose measured steps calibrate predictions: experiments/calibrations.yaml, written
by ``make calibrate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

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


class Fitted(BaseModel):
    """One measured step beside two predictions, all in ms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured_ms: Positive
    predicted_ms: Positive
    left_out_ms: Positive
    """By constants fitted without this row, and without others of the same experiment."""
    make: str | None = None
    """What ran, where it is not the experiment that the row is called: ``446``, or ``111
    FP8=tensorwise``."""


class Machine(BaseModel):
    """One kind of machine: where its steps were measured, and the constants that they give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    """A GPU's short name (hardware.py)."""
    measured_by: str
    """``records``, or a group of references.yaml."""
    switch_reduces: bool
    """Whether the NVLink switch adds up all-reduces (NVLS)."""
    like: str | None = None
    """The machine, further up in the file, whose constants stay where its own steps say nothing."""
    constants: Calibration = Calibration()
    rows: dict[str, Fitted] = {}
    """Empty until ``make calibrate`` has fitted the constants."""

    @cached_property
    def card(self) -> Card:
        """The GPU's data. Raises UserError where no GPU is called so, or it has no bf16."""
        gpu = required_card(self.gpu, f"gpu = {self.gpu!r}")
        if gpu.bf16_tflops is None:
            raise UserError(
                f"gpu = {self.gpu!r}: {gpu.name} has no bf16, and steps are predicted in bf16 only"
            )
        return gpu

    def predict(self, e: Experiment) -> StepTime:
        """A step of ``e`` here, solo; where ``step_time.unknown(e)`` is empty.

        Raises UserError where ``e`` computes in fp8 and the card does not.
        """
        if e.precision == "fp8" and self.card.fp8_tflops is None:
            raise UserError(
                f"{e.id} computes in fp8, which {self.card.name} does not (Ada, Hopper and"
                " later do)"
            )
        return step_time.predict(e, self.card, self.constants, switch_reduces=self.switch_reduces)

    def stage_times(self, e: Experiment) -> Times:
        """Each pipeline stage's passes of one micro-batch, in ms; where ``step_time.unknown(e)`` is
        empty."""
        return step_time.stage_times(
            e, self.card, self.constants, switch_reduces=self.switch_reduces
        )

    def row_of(self, e: Experiment) -> Fitted | None:
        """The row in which ``e`` ran, labelled so if there is one."""
        ran = {
            name: row
            for name, row in self.rows.items()
            if (row.make or name) == overrides.command_of(e)
        }
        return ran.get(e.id) or next(iter(ran.values()), None)

    def misses(self) -> tuple[float, float, float]:
        """How far off it is for rows that it has not seen, relative: half of them, nine in ten, all
        stay within."""
        off = sorted(abs(row.left_out_ms / row.measured_ms - 1) for row in self.rows.values())
        return median(off), off[math.ceil(0.9 * len(off)) - 1], off[-1]

    def how_sure(self, *experiments: Experiment) -> str:
        """How far off it is for rows that it has not seen, in words, where its rows say so much of
        ``experiments``.

        No row tells of an experiment with work that none of them has: its error is unknown.
        """
        half, most, _ = self.misses()
        said = (
            f"error on rows left out of the fit: median {half:.1%}, 90th percentile {most:.0%} "
            f"({len(self.rows)} rows)"
        )
        missing = {e.label: self.unmeasured(e) for e in experiments}
        if not any(missing.values()):
            return said
        *others, last = dict.fromkeys(kind for found in missing.values() for kind in found)
        kinds = f"{', '.join(others)} or {last}" if others else last
        if all(missing.values()):
            return f"no measured row has {kinds}: error unknown"
        return f"{said}; error unknown with {kinds}, which no measured row has"

    def unmeasured(self, e: Experiment) -> tuple[str, ...]:
        """Kinds of work in ``e`` that no row of this machine has, and pairs of methods that no row
        has together."""
        ran = [_made(row.make or name) for name, row in self.rows.items()]
        alone = sorted(step_time.kinds(e).difference(*map(step_time.kinds, ran)))
        known = sorted(step_time.methods(e).difference(alone))
        together = [set(step_time.methods(one)) for one in ran]
        pairs = [
            f"{a} with {b}"
            for a, b in combinations(known, 2)
            if not any({a, b} <= both for both in together)
        ]
        return (*alone, *pairs)


@cache
def _made(words: str) -> Experiment:
    """What ran in a row: ``111 FP8=tensorwise``."""
    return overrides.experiment_of(words, load_catalog())


@cache
def load(path: Path = FILE) -> Mapping[str, Machine]:
    """Every machine by its name. Raises UserError where the file makes no sense."""
    machines: dict[str, Machine] = {}
    for key, fields in (entries := yaml_files.read(path)).items():
        with yaml_files.entry(path, entries, key):
            machines[str(key)] = _machine(f"{path.name}: {key}", fields, list(machines))
    return machines


def _machine(where: str, fields: Any, above: Sequence[str]) -> Machine:
    """One entry of the file; ``above``: the names of those further up. Raises UserError where it
    makes no sense."""
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
            f"{where}: like = {machine.like!r}: no entry further up is called so; "
            f"{nearest(machine.like, above)}"
        )
    return machine


def fitted() -> Mapping[str, Machine]:
    """The machines that ``make calibrate`` has fitted."""
    return {name: machine for name, machine in load().items() if machine.rows}


def in_a_line(e: Experiment, card: Card) -> str | None:
    """What a step of ``e`` will take, as a run says it before it begins; None where no formula
    covers it."""
    machine = machine_of(card)
    if machine is None or step_time.unknown(e):
        return None
    return (
        f"step by formula: {machine.predict(e).total:,.0f} ms alone on the node;"
        f" {machine.how_sure(e)}"
    )


def machine_measured_by(group: str) -> Machine | None:
    """The machine whose steps are those of this group of references.yaml, where it was
    calibrated."""
    return next((machine for machine in fitted().values() if machine.measured_by == group), None)


def machine_of(card: Card) -> Machine | None:
    """The machine with cards of this kind, where one was calibrated; of several, the last in the
    file."""
    return next((machine for machine in reversed(fitted().values()) if machine.card == card), None)
