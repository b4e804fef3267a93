"""Markdown tables of docs/step-time.md: predicted step times, calibrations, and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from harness.errors import UserError, nearest
from harness.evidence import markdown
from harness.evidence.facts import Facts
from harness.evidence.references import Reference, ReferenceGroup
from harness.evidence.speed import MEANING
from harness.experiment import overrides
from harness.experiment.catalog import Catalog, load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.predict.calibrations import Band, Machine, fitted, machine_of
from harness.predict.step_time import unknown
from harness.predict.work import Calibration
from harness.search.layouts import faster


def parts_table(facts: Facts, ids: str, machine: str) -> str:
    """Predicted parts of a step on ``machine``, with the measured step time."""
    calibrated, lines = _machine(machine), []
    for experiment in map(facts.catalog.find, ids.split()):
        row = calibrated.row_of(experiment)
        step = calibrated.predict(experiment, row and calibrated.operation_us_of(row))
        lines.append(
            [
                f"`{experiment.id}`",
                experiment.layout,
                *(f"{ms:,.0f}" if ms >= 0.5 else "" for ms in step.pieces.values()),
                f"{step.total:,.0f}",
                f"{row.measured_ms:,.0f}" if row else "",
                f"{row.left_out_ms / row.measured_ms - 1:+.1%}" if row else "",
            ]
        )
    head = ["id", "layout", *MEANING, "step", "measured", "unseen"]
    return markdown.table(head, lines, "ll" + "r" * (len(head) - 2))


@cache
def faster_table(name: str, *ids: str) -> str:
    """For each experiment on machine ``name``, the layout of the same work predicted fastest."""
    machine, lines = _machine(name), []
    for experiment in map(load_catalog().find, ids):
        now_ms, row = machine.predict(experiment).total, machine.row_of(experiment)
        first = [
            f"`{experiment.id}`",
            experiment.layout,
            f"{row.measured_ms:,.0f}" if row else "",
            f"{now_ms:,.0f}",
        ]
        found = faster(experiment, machine, most=1)
        if not found:
            lines.append([*first, "none", "", "", "", ""])
            continue
        best = found[0]
        lines.append(
            [
                *first,
                best.experiment.layout,
                f"{best.step.total:,.0f}",
                f"{best.step.total / now_ms:.2f}",
                f"{best.memory.in_all:.0f}",
                f"`make {experiment.id} {best.settings}`",
            ]
        )
    head = ["id", "layout", "measured", "formula", "fastest", "formula", "of it", "GiB", "command"]
    return markdown.table(head, lines, "llrrlrrrl")


def tried_table(name: str, commands: str) -> str:
    """Measured on machine ``name``: layouts that were suggested, and what ran before.

    Args:
        commands: what ``make`` took, such as ``101 CUDA_GRAPHS=1``, separated by ``|``. The row
            before is that of the host most like the suggestion's.
    """
    machine, catalog, lines = _machine(name), load_catalog(), []
    for command in map(str.strip, commands.split("|")):
        after = overrides.experiment_of(command, catalog)
        before = catalog.find(after.id)
        tried = machine.row_of(after)
        if tried is None:
            raise UserError(f"{command} has no record: make it, then make record")
        operation_us = machine.operation_us_of(tried)
        replaced = machine.row_of(before, operation_us)
        foretold = [machine.predict(one, operation_us).total for one in (before, after)]
        lines.append(
            [
                f"`{after.id}`",
                f"`make {command}`",
                f"{replaced.measured_ms:,.0f}",
                f"{tried.measured_ms:,.0f}",
                f"{tried.measured_ms / replaced.measured_ms:.2f}",
                f"{foretold[1] / foretold[0]:.2f}",
            ]
        )
    head = ["id", "suggested first", "ms before", "ms after", "of it", "of it, by formula"]
    return markdown.table(head, lines, "llrrrr")


def machines_table() -> str:
    """The constants of every calibrated machine, and the error on rows left out of the fit."""
    machines = fitted().values()
    lines = [
        [f"`{name}`", *(f"{getattr(machine.constants, name):.3g}" for machine in machines)]
        for name in Calibration.model_fields
    ]
    lines.append(["rows", *(str(len(machine.rows)) for machine in machines)])
    for i, statistic in enumerate(("median", "90th percentile", "largest")):
        errors = [f"{machine.misses()[i]:.1%}" for machine in machines]
        lines.append([f"error on rows left out, {statistic}", *errors])
    head = ["", *(machine.card.name for machine in machines)]
    return markdown.table(head, lines, "l" + "r" * len(machines))


def bands_table() -> str:
    """For every kind of work and machine: rows, median and 90th percentile of errors."""
    machines = fitted()
    kinds = dict.fromkeys(kind for machine in machines.values() for kind in machine.bands)
    lines = []
    for kind in kinds:
        found = [machine.bands.get(kind) for machine in machines.values()]
        lines.append([kind, *(cell for band in found for cell in _band_cells(band))])
    head = ["kind of work"]
    for machine in machines.values():
        head += [f"{machine.card.name}: rows", "median", "90th percentile"]
    return markdown.table(head, lines, "l" + "rrr" * len(machines))


def _band_cells(band: Band | None) -> tuple[str, str, str]:
    if band is None:
        return "", "", ""
    return str(band.rows), f"{band.median:.1%}", f"{band.most:.0%}"


def unseen_table(facts: Facts, group: str) -> str:
    """Measured steps of a group of references that calibrated no machine, with predictions.

    Fitted to them is one number, how fast the group's host launches.
    """
    found = facts.references.group(group)
    machine, lines = machine_of(find_card(found.gpu)), []
    rows = list(predictable_rows(found, facts.catalog))
    operation_us = machine.launch_rate_behind(
        [(experiment, row.step_ms) for row, experiment in rows]
    )
    for row, experiment in rows:
        ms = machine.predict(experiment, operation_us).total
        lines.append(
            [
                row.id or row.workload,
                f"`make {row.make or row.id}`",
                experiment.layout,
                f"{row.step_ms:,.0f}",
                f"{ms:,.0f}",
                f"{ms / row.step_ms - 1:+.1%}",
            ]
        )
    head = ["row", "same as", "layout", "measured", "formula", "off by"]
    return markdown.table(head, lines, "lllrrr")


def predictable_rows(
    group: ReferenceGroup, catalog: Catalog
) -> Iterator[tuple[Reference, Experiment]]:
    """The group's rows whose step time can be predicted, each with its experiment."""
    return (pair for pair in group.ran(catalog) if not unknown(pair[1]))


def _machine(name: str) -> Machine:
    if name not in fitted():
        raise UserError(f"no machine is called {name}; {nearest(name, fitted())}")
    return fitted()[name]
