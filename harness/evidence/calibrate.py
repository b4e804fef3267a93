"""``make calibrate``: fit the constants of harness/predict/work.py to measured step times.

Least squares of log(predicted / measured) by SciPy, with a soft L1 loss so that single outliers
count little. A constant that the rows do not determine stays near its start: the default, or the
constant of the machine that this one is ``like``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harness import RECORDS
from harness.errors import UserError
from harness.evidence.records import day_of, same_work
from harness.evidence.references import References, load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment import command_line, overrides
from harness.experiment.catalog import Catalog, load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.predict import calibrations, step_time
from harness.predict.calibrations import Fitted, Machine
from harness.predict.work import RATES, Calibration
from harness.system.files import write_text
from harness.system.orphans import end_with

NAMES = tuple(Calibration.model_fields)
NOISE = 0.03
"""Relative error of the formula itself. It exceeds the noise of steps, so all rows weigh alike."""
SURE = frozenset({*RATES, "host", "exposed"})
"""Constants whose order of magnitude is known."""
WIDTH, SURE_WIDTH, LIKE = 0.8, 0.3, 0.5
"""Prior width of a constant: standard deviation of its logarithm around its start.

LIKE scales it for a machine that is ``like`` another.
"""
WRITTEN = ("gpu", "rates", "measured_by", "switch_reduces", "like")
"""Keys of a machine that people write."""
HEADER = """\
# Machines whose measured steps calibrate predictions. harness/predict/work.py has the constants.
# People write gpu, rates, measured_by, switch_reduces and like; `make calibrate` writes the rest.
# Each row: ms measured, ms predicted, and ms predicted with constants fitted without its chapter.
"""


@dataclass(frozen=True)
class Measured:
    """The measured step time of one run."""

    name: str
    experiment: Experiment
    step_ms: float
    operation_us: float | None = None
    """Host time of an operation, where the run measured it."""
    day: str | None = None
    """Where it did not: the day of the run; None for published steps."""

    @property
    def chapter(self) -> str:
        """The first digit of the experiment's id."""
        return self.experiment.id[0]


def calibrate(path: Path = calibrations.FILE) -> int:
    """Fit every machine to the records, write ``path`` and print how sure the predictions are.

    Raises:
        UserError: records or references cannot be read, a machine has no measured step, or SciPy is
            missing.
    """
    if find_spec("scipy") is None:
        raise UserError(
            "SciPy is not installed, which fits the constants: scripts/setup.sh calibrate"
        )
    catalog, references = load_catalog(), load_references()
    rows = collect_records(RECORDS, references).rows
    machines = calibrations.load(path)
    steps = {
        name: steps_of(machine, rows, references, catalog) for name, machine in machines.items()
    }
    for name, machine in machines.items():
        if not steps[name]:
            raise UserError(
                f"{path.name}: {name}: {machine.measured_by} has no step on {machine.card.name} "
                "that the formula covers\n"
                f"make record RUN=… keeps a run of yours; or remove {name} from the file"
            )
    fitted: dict[str, Machine] = {}
    for name, machine in machines.items():
        print(f"{name}: fitting, once for each chapter left out …", file=sys.stderr)
        fitted[name] = fit_machine(
            machine, fitted[machine.like] if machine.like else None, steps[name]
        )
    write_text(path, render(fitted))
    calibrations.load.cache_clear()
    for name, machine in fitted.items():
        half, most, _ = machine.misses()
        print(
            f"{name}: {len(machine.rows)} rows; with their chapter left out, off by {half:.1%}"
            f" median, {most:.0%} 90th percentile"
        )
    return 0


def fit_machine(machine: Machine, like: Machine | None, steps: Sequence[Measured]) -> Machine:
    """``machine`` with constants fitted to ``steps``, and a row for each step."""
    whole = fit(machine, like, steps)
    chapters = sorted({step.chapter for step in steps})
    others = [unseen_by(chapter, steps) for chapter in chapters]
    with ProcessPoolExecutor(initializer=_begin_worker, initargs=(os.getpid(),)) as pool:
        again = pool.map(
            fit, [machine] * len(others), [like] * len(others), others, [whole] * len(others)
        )
        left_out = dict(zip(chapters, again, strict=True))
    rows = {}
    for step in steps:
        command = overrides.command_of(step.experiment)
        rows[step.name] = Fitted(
            measured_ms=round(step.step_ms, 1),
            predicted_ms=round(predicted_ms(whole, step), 1),
            left_out_ms=round(predicted_ms(left_out[step.chapter], step), 1),
            operation_us=step.operation_us and round(step.operation_us, 1),
            day=step.day,
            make=command if command != step.name else None,
        )
    return whole.model_copy(update={"rows": rows})


def unseen_by(chapter: str, steps: Sequence[Measured]) -> list[Measured]:
    """The steps of other chapters, without those of work that this chapter has, too.

    211 and 231 are the same work, for example: one would foretell the other.
    """
    ours = [step.experiment for step in steps if step.chapter == chapter]
    return [
        step
        for step in steps
        if step.chapter != chapter
        and not any(same_work(_unnamed(step.experiment), _unnamed(one)) for one in ours)
    ]


def _unnamed(experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"id": "", "name": "", "shows": ""})


def _begin_worker(parent: int) -> None:
    end_with(parent)
    # Python's handler would end one fit and leave the worker waiting for the next
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def fit(
    machine: Machine,
    like: Machine | None,
    steps: Sequence[Measured],
    near: Machine | None = None,
) -> Machine:
    """``machine`` with the constants that predict ``steps`` best, to four digits.

    The search begins ``near``. Rates that machine files state are not fitted. Days on which runs
    did not measure their launch rate get one.
    """
    import numpy as np
    from scipy.optimize import least_squares

    names = [name for name in NAMES if not (machine.rates_hold and name in RATES)]
    days = sorted({step.day for step in steps if step.day})
    begin = like.constants if like else Calibration()
    usual_us = machine.speed().rates.operation_us
    expected = np.log([*(getattr(begin, name) for name in names), *[usual_us] * len(days)])
    start = expected
    if near:
        known = [*(getattr(near.constants, name) for name in names)]
        start = np.log([*known, *(near.launch_us.get(day, usual_us) for day in days)])
    width = np.array(
        [(SURE_WIDTH if name in SURE else WIDTH) * (LIKE if like else 1) for name in names]
        + [WIDTH] * len(days)
    )

    def made_of(values: Iterable[float]) -> Machine:
        values = list(values)
        constants = begin.model_copy(update=dict(zip(names, values, strict=False)))
        launch_us = dict(zip(days, values[len(names) :], strict=True))
        return machine.model_copy(update={"constants": constants, "launch_us": launch_us})

    def residuals(logarithms):
        exact = made_of(map(math.exp, logarithms))
        off = [math.log(predicted_ms(exact, step) / step.step_ms) / NOISE for step in steps]
        return np.concatenate([off, (logarithms - expected) / width])

    best = least_squares(residuals, start, loss="soft_l1", max_nfev=100).x
    return made_of(float(f"{math.exp(logarithm):.4g}") for logarithm in best)


def steps_of(
    machine: Machine, rows: Sequence[Row], references: References, catalog: Catalog
) -> list[Measured]:
    """The steps that were measured on ``machine`` and can be predicted, with any settings."""
    ours = machine.measured_by == "records"
    found = _recorded(machine, rows, catalog) if ours else _published(machine, references, catalog)
    known = (step for step in found if not step_time.unknown(step.experiment))
    # what ARGS change is not in the formula, so such rows would bend the constants
    return [step for step in known if not step.experiment.extra_args]


def _recorded(machine: Machine, rows: Sequence[Row], catalog: Catalog) -> Iterator[Measured]:
    for row in rows:
        settings = {
            key: value
            for key, value in row.experiment.overrides.items()
            if key not in command_line.SAME_WORK
        }
        now = overrides.admitted(catalog.find(row.id), settings)
        solo = row.runs_on_node == 1 or row.experiment.world_size > 1
        undisturbed = row.state == "ok" and row.step and solo and not row.experiment.profile
        if row.gpu == machine.card and undisturbed and now and same_work(row.experiment, now):
            operation_us = row.launch.operation_us if row.launch else None
            day = None if row.launch else day_of(row.result.started)
            yield Measured(row.origin.stem, now, row.step.median, operation_us, day)


def _published(machine: Machine, references: References, catalog: Catalog) -> Iterator[Measured]:
    group = references.group(machine.measured_by)
    if find_card(group.gpu) != machine.card:
        return
    for row, experiment in group.ran(catalog):
        if row.id:
            yield Measured(row.id, experiment, row.step_ms)


def predicted_ms(machine: Machine, step: Measured) -> float:
    """What ``machine`` foretells for a measured step, on the host that it ran on."""
    operation_us = step.operation_us or machine.launch_us.get(step.day)
    return machine.predict(step.experiment, operation_us).total


def render(machines: Mapping[str, Machine]) -> str:
    """The text of calibrations.yaml: a line for each constant and each row."""
    lines = [HEADER]
    for name, machine in machines.items():
        given, constants = machine.model_dump(exclude_none=True), machine.constants.model_dump()
        rows = {
            f"'{row}'": fitted.model_dump(exclude_none=True) for row, fitted in machine.rows.items()
        }
        lines += [f"{name}:", *(f"  {key}: {_yaml(given[key])}" for key in WRITTEN if key in given)]
        if machine.launch_us:
            lines += [
                "  launch_us:",
                *(f"    '{day}': {us}" for day, us in machine.launch_us.items()),
            ]
        lines += ["  constants:", *(f"    {key}: {value:g}" for key, value in constants.items())]
        lines += ["  rows:", *(f"    {row}: {_yaml(fitted)}" for row, fitted in rows.items()), ""]
    return "\n".join(lines)


def _yaml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {item!r}' for key, item in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
