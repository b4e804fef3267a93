"""The machines whose measured steps calibrate predictions (experiments/calibrations.yaml).

``make calibrate`` writes the file; harness/evidence/calibrate.py fits its constants.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, InstanceOf

from harness.errors import UserError, first_line, nearest
from harness.experiment import overrides
from harness.experiment.catalog import EXPERIMENTS, load_catalog
from harness.experiment.constraints import without_nvfp4
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, required_card
from harness.experiment.model import Positive
from harness.predict import machine_file, rates, step_time
from harness.predict.machine_file import Machine as MachineFile
from harness.predict.network import Network
from harness.predict.step_time import StepTime
from harness.predict.timeline import Times
from harness.predict.work import RATES, Calibration, Speed
from harness.system import yaml_files

FILE = EXPERIMENTS / "calibrations.yaml"


USUAL_RATES = "h200-141gb"
"""The card whose rates, scaled by the data sheets, stand for those of cards without machine files.
"""
SURE_ROWS = 5
"""Of fewer rows, the largest error stands for the 90th percentile."""


class Fitted(BaseModel, frozen=True, extra="forbid"):
    """One measured step and two predictions of it."""

    measured_ms: Positive
    predicted_ms: Positive
    left_out_ms: Positive
    """Predicted by constants fitted without the chapter of this row and without the same work."""
    operation_us: Positive | None = None
    """Host time of an operation, where the run measured it."""
    day: str | None = None
    """Where it did not: the day of the run."""
    make: str | None = None
    """What ran, if it is not the row's name: ``446``, or ``111 FP8=tensorwise``."""

    @property
    def error(self) -> float:
        """Of the prediction by constants fitted without it, relative to what was measured."""
        return abs(self.left_out_ms / self.measured_ms - 1)


@dataclass(frozen=True)
class Band:
    """How far predictions of a kind of work were off, on rows left out of the fit."""

    kind: str
    rows: int
    median: float
    most: float
    """90th percentile; of fewer than ``SURE_ROWS`` rows, the largest."""

    def __str__(self) -> str:
        most = (
            f"{self.most:.0%} 90th percentile"
            if self.rows >= SURE_ROWS
            else f"{self.most:.0%} at most"
        )
        many = f"{self.rows} row{'s' * (self.rows > 1)}"
        return f"{self.kind}: off by {self.median:.1%} median, {most} ({many} left out of the fit)"


class Machine(BaseModel, frozen=True, extra="forbid"):
    """One kind of machine: where its steps were measured, and the constants fitted to them."""

    gpu: str
    """A card's short name (hardware.py)."""
    measured_by: str
    """``records``, or a group of references.yaml."""
    switch_reduces: bool
    """Whether the NVLink switch may compute all-reduces (NCCL's NVLS), if it can."""
    rates: str | None = None
    """A card's short name: its machine files say how fast this machine is. None: this card's own,
    or those of ``USUAL_RATES``."""
    launch_us: dict[str, Positive] = {}
    """Host time of an operation on days when runs did not measure it yet: fitted."""
    like: str | None = None
    """The machine, earlier in the file, whose constants it takes where its own steps do not
    determine one."""
    constants: Calibration = Calibration()
    rows: dict[str, Fitted] = {}
    """Empty until ``make calibrate`` has fitted the constants."""
    borrowed_by: str | None = None
    """A card without measured steps that is predicted by these constants; never in the file."""
    scatters_messages: bool = False
    """As of ``Speed``: of an upstream before 2022; never in the file."""
    here: InstanceOf[MachineFile] | None = None
    """The machine file of this very machine; never in the file of calibrations."""

    @cached_property
    def card(self) -> Card:
        """The GPU's data. Raises UserError if ``gpu`` is unknown or has no bf16."""
        key = self.borrowed_by or self.gpu
        gpu = required_card(key, f"gpu = {key!r}")
        if gpu.bf16_tflops is None:
            raise UserError(
                f"gpu = {self.gpu!r}: {gpu.name} has no bf16, and steps are predicted in bf16 only"
            )
        return gpu

    @cached_property
    def rated_card(self) -> Card:
        """The card whose machine files say how fast this machine is.

        Raises UserError if ``rates`` is unknown.
        """
        own = self.gpu if (rates.FOLDER / self.gpu).is_dir() else USUAL_RATES
        return required_card(self.rates or own, f"rates = {self.rates!r}")

    @property
    def rates_hold(self) -> bool:
        """Whether the rates are those of this card, or of one with the same arithmetic, which
        differs in memory only and so by the data sheets."""
        return self.rated_card.bf16_tflops == self.card.bf16_tflops

    @property
    def is_borrowed(self) -> bool:
        """Whether its card has no measured step, and it stands in."""
        return self.borrowed_by is not None

    def lent_to(self, card: Card) -> Machine:
        """This machine with ``card`` instead: its constants and, by the data sheets, its rates."""
        changed = {
            "borrowed_by": card.key,
            "rates": self.rated_card.key,
            "switch_reduces": True,
        }
        return self.model_copy(update=changed)

    def speed(self, operation_us: float | None = None, nodes: int = 1) -> Speed:
        """How fast it is.

        Args:
            operation_us: host time of an operation; None: that of the machine file. Several
                ``nodes`` without one are assumed to have the fastest host of the calibrations.
        """
        if operation_us is None and nodes > 1 and not self.here:
            operation_us = fastest_operation_us()
        if operation_us is None:
            return self._usual_speed
        return self._usual_speed._replace(operation_us=operation_us)

    @cached_property
    def _usual_speed(self) -> Speed:
        found = rates.of_card_like(self.rated_card, self.card)
        constants, usual_us = self.constants, found.operation_us
        if self.here:
            found, usual_us = rates.with_file(found, self.here), self.here.launch.operation_us
            constants = constants.model_copy(update=dict.fromkeys(RATES, 1.0))
        found = found.with_fp4(self.card)
        network = Network.of(self.card, found.link_gb_s, found.network_gb_s)
        if not self.switch_reduces:
            network = replace(network, reduce_gb_s=None)
        return Speed(found, constants, network, usual_us, self.scatters_messages)

    def predict(self, experiment: Experiment, operation_us: float | None = None) -> StepTime:
        """A step of ``experiment`` here, with no other run on the node.

        Only where ``step_time.unknown(experiment)`` is empty; ``operation_us`` as of ``speed``.
        Raises UserError if ``experiment`` computes in fp8 or fp4 and the card does not.
        """
        if experiment.precision == "fp8" and self.card.fp8_tflops is None:
            raise UserError(
                f"{experiment.id} computes in fp8, which {self.card.name} does not (Ada, Hopper and"
                " later do)"
            )
        if experiment.precision == "fp4" and self.card.fp4_tflops is None:
            raise UserError(
                f"{experiment.id}: FP4={experiment.fp4_recipe}: {without_nvfp4(self.card)}"
            )
        return step_time.predict(experiment, self.speed(operation_us, experiment.nodes))

    def launch_rate_behind(self, steps: Sequence[tuple[Experiment, float]]) -> float:
        """Host time of an operation in µs that explains these step times in ms best.

        Least absolute error of their logarithms, to 2 %: steps that no launch bounds say nothing.
        """

        def off(operation_us: float) -> float:
            return sum(
                abs(math.log(self.predict(experiment, operation_us).total / ms))
                for experiment, ms in steps
            )

        return min((5 * 1.02**power for power in range(150)), key=off)

    def stage_times(self, experiment: Experiment) -> Times:
        """Each pipeline stage's passes of one micro-batch, in ms; where ``predict`` applies."""
        return step_time.stage_times(experiment, self.speed(nodes=experiment.nodes))

    def row_of(self, experiment: Experiment, operation_us: float | None = None) -> Fitted | None:
        """The row in which ``experiment`` ran.

        Of several, the one of the host whose operations take most nearly ``operation_us``; without
        it, the one with the experiment's id as name.
        """
        if self.is_borrowed:
            return None
        command = overrides.command_of(experiment)
        ran = {name: row for name, row in self.rows.items() if (row.make or name) == command}
        if operation_us and ran:
            return min(
                ran.values(),
                key=lambda row: rates.launch_rates_apart(self.operation_us_of(row), operation_us),
            )
        return ran.get(experiment.id) or next(iter(ran.values()), None)

    def operation_us_of(self, row: Fitted) -> float | None:
        """Host time of an operation in the run of this row, measured or fitted to its day."""
        return row.operation_us or self.launch_us.get(row.day or "")

    def misses(self) -> tuple[float, float, float]:
        """Relative errors on rows left out of the fit: median, 90th percentile, largest."""
        off = [row.error for row in self.rows.values()]
        return median(off), ninetieth(off), max(off)

    def model_copy(self, **changes: Any) -> Machine:
        """A copy with ``update``, without what was derived from the fields before."""
        copied = super().model_copy(**changes)
        for derived in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[derived]
        return copied

    @cached_property
    def bands(self) -> Mapping[str, Band]:
        """How sure it is, by kind of work."""
        errors: dict[str, list[float]] = {}
        for name, row in self.rows.items():
            errors.setdefault(step_time.work_kind(_ran(row.make or name)), []).append(row.error)
        return {
            kind: Band(
                kind, len(off), median(off), ninetieth(off) if len(off) >= SURE_ROWS else max(off)
            )
            for kind, off in errors.items()
        }

    def band(self, experiment: Experiment) -> Band | None:
        """The band of its kind of work; None where no measured row has all of its work."""
        if self.unmeasured(experiment):
            return None
        return self.bands.get(step_time.work_kind(experiment))

    def error(self, experiment: Experiment) -> float:
        """The 90th percentile of rows of its kind; the largest of all kinds where there are none,
        or no row shards as it does."""
        band = self.bands.get(step_time.work_kind(experiment))
        if band and (not experiment.fully_sharded or experiment.sharding in self._shardings):
            return band.most
        return max(band.most for band in self.bands.values())

    @cached_property
    def _shardings(self) -> frozenset[str]:
        return frozenset(_ran(row.make or name).sharding for name, row in self.rows.items())

    def how_sure(self, *experiments: Experiment) -> str:
        """The error of predictions for ``experiments``, as a phrase: a band for each kind of work.

        Where an experiment has work that no row has, its error is unknown.
        """
        known = dict.fromkeys(
            str(band) for experiment in experiments if (band := self.band(experiment))
        )
        missing = dict.fromkeys(
            kind for experiment in experiments for kind in self.unmeasured(experiment)
        )
        said = list(known)
        if missing:
            *others, last = missing
            kinds = f"{', '.join(others)} or {last}" if others else last
            said.append(f"no measured row has {kinds}: error unknown")
        return "; ".join(said)

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
        unknown_card = [f"steps on {self.card.name}"] if self.is_borrowed else []
        return (*unknown_card, *alone, *pairs)


def ninetieth(off: Sequence[float]) -> float:
    """The 90th percentile: nine tenths are at most as large."""
    return sorted(off)[math.ceil(0.9 * len(off)) - 1]


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
        _ = machine.card, machine.rated_card
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


def fastest_operation_us() -> float | None:
    """Host time of an operation in µs on the fastest host that any steps were measured on.

    Hosts of one kind of machine differ by two; clusters for training have fast ones. None where no
    host is known by its day.
    """
    days = (us for machine in load().values() for us in machine.launch_us.values())
    return min(days, default=None)


def summary(experiment: Experiment, card: Card, outdir: Path, uuids: Collection[str]) -> str | None:
    """One line on the step time of ``experiment``, printed before a run; None without a formula.

    Arguments as of ``machine_here``. A machine file that cannot be read holds up no run.
    """
    try:
        machine, _ = machine_here(card, outdir, uuids)
    except UserError as error:
        return f"step time not predicted: {first_line(error)}"
    if machine is None or step_time.unknown(experiment):
        return None
    return (
        f"step by formula: {machine.predict(experiment).total:,.0f} ms alone on the node;"
        f" {machine.how_sure(experiment)}"
    )


def machine_here(card: Card, outdir: Path, uuids: Collection[str]) -> tuple[Machine | None, str]:
    """The calibrated machine with cards of this kind, as fast as the machine file in ``outdir``
    says, and a line on where its rates come from.

    A machine file of another machine, or of another card, is not used, and the line says so.

    Args:
        uuids: of this machine's GPUs.
    """
    machine, path = machine_of(card), outdir / machine_file.NAME
    if machine is None:
        return None, ""
    usual = f"rates of {machine.card.name} in experiments/machines"
    if machine.rated_card != machine.card:
        usual = (
            f"rates of {machine.rated_card.name} in experiments/machines, scaled by the data sheets"
        )
    if machine.card.key in rates.published():
        usual += "; those that others measured, in experiments/rates.yaml"
    if not path.exists():
        return machine, f"{usual}; make preflight measures this machine"
    file = machine_file.read(path)
    if reason := machine_file.foreign(file, card, uuids):
        return machine, f"{usual}; {path} {reason}: not used"
    when = file.measured[:16].replace("T", " ")
    line = f"rates: {path}, measured on {file.host} at {when} UTC"
    if file.quick:
        line += "; attention and layers, which QUICK=1 leaves out, as usual for the card"
    return machine.model_copy(update={"here": file}), line


def machine_measured_by(group: str) -> Machine | None:
    """The calibrated machine whose steps are those of this group of references.yaml."""
    return next((machine for machine in fitted().values() if machine.measured_by == group), None)


def machine_of(card: Card) -> Machine | None:
    """The calibrated machine with cards of this kind; of several, the last in the file.

    A card without measured steps borrows the first machine of the file; None if it has no bf16, or
    no machine is calibrated.
    """
    machines = list(fitted().values())
    ours = [machine for machine in machines if machine.card == card]
    if ours or not machines or card.bf16_tflops is None:
        return ours[-1] if ours else None
    return machines[0].lent_to(card)
