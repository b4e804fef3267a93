"""What a step takes by formula, beside what it took; which layouts are faster: ``make speed-408``,
``make faster-408``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from harness.errors import UserError, nearest
from harness.evidence import markdown
from harness.evidence.memory import cards_of, heading
from harness.evidence.records import same_work
from harness.evidence.references import Reference, ReferenceGroup, References, load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment import overrides
from harness.experiment.catalog import Catalog, load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, find_card, peak_tflops
from harness.planning import resolved
from harness.predict.calibrations import Machine, fitted, machine_of
from harness.predict.capacity import verdict
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.layouts import faster
from harness.predict.memory import predict
from harness.predict.step_time import StepTime, unknown
from harness.predict.work import Calibration
from harness.system.screen import say

SHOWN = 6
"""Faster layouts that are printed."""
MEANING = {
    "products": "matrix products",
    "attention": "scores, weights and values",
    "passes": "what memory bandwidth bounds: norms, activations, sums of gradients, the loss",
    "exchange": "activations, keys and values, tokens on the way to other GPUs",
    "launches": "the GPU waits for the CPU to launch",
    "bubble": "a pipeline stage waits for another",
    "gradients": "gradients and weights on the way to other replicas",
    "optimizer": "Adam, and what is done once a step",
}


def print_speed(id_: str, settings: Mapping[str, str], records: Path) -> int:
    """Print what a step of experiment ``id_`` with ``settings`` takes, and how that stands to what
    was measured.

    Raises UserError where the experiment or a setting makes no sense, or no constants cover it.
    """
    e = _known(resolved.of_catalogue(id_, settings))
    machines, references = _machines(e), load_references()
    rows = collect_records(records, references).rows
    say(heading(e))
    for machine in machines:
        step = machine.predict(e)
        print(f"\nms of a step on {machine.card.name}, by formula")
        for piece in _pieces(step):
            say(piece, hang=30)
        tflops = tflops_per_gpu(e, step.total)
        say(
            f"  {'step':12}{step.total:8.1f}  {_measured(e, machine, step, rows, references)}".rstrip(),  # noqa: E501
            hang=24,
        )
        share = mfu(tflops, peak_tflops(machine.card.name, e.precision))
        say(f"  {tflops:.0f} TFLOP/s a GPU of model FLOPs, MFU {share:.0%}; {machine.how_sure(e)}")
        if verdict(predict(e), machine.card) == "does not fit":
            print(
                f"  it does not fit there: make memory-{overrides.command_of(e)} CARD={machine.gpu}"
                " says what would"
            )
    return 0


def print_faster(id_: str, settings: Mapping[str, str]) -> int:
    """Print the layouts of the same work over the same GPUs that fit and are faster by formula, or
    fit at all.

    Raises UserError as ``print_speed``.
    """
    e = _known(resolved.of_catalogue(id_, settings))
    machines = _machines(e)
    say(heading(e))
    for machine in machines:
        now, found, fits = (
            machine.predict(e).total,
            faster(e, machine),
            verdict(predict(e), machine.card),
        )
        print(f"\n{machine.card.name}: {now:,.0f} ms by formula; it {fits}")
        if not found:
            print("  no layout that fits is faster" if fits == "fits" else "  no other layout fits")
            continue
        print(
            f"  layouts of the same work that fit{' and are faster' * (fits == 'fits')}:"
            f" {len(found)}; fastest first"
        )
        print(f"  {'ms':>7} {'of now':>6} {'GiB':>6}")
        for layout in found[:SHOWN]:
            ms, gib = layout.step.total, layout.memory.total
            print(f"  {ms:7,.0f} {ms / now:6.2f} {gib:6.1f}  make {e.id} {layout.settings}")
        say(
            f"  {machine.how_sure(*(layout.experiment for layout in found[:SHOWN]))}: run the"
            " first few"
        )
    return 0


def pieces_table(catalog: Catalog, name: str, ids: Sequence[str]) -> str:
    """Markdown: where a step's time goes by formula on machine ``name``, beside what was measured
    there."""
    machine, lines = _machine(name), []
    for id_ in ids:
        e = catalog.find(id_)
        step, row = machine.predict(e), machine.row_of(e)
        lines.append(
            [
                f"`{id_}`",
                e.layout,
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
    """Markdown: beside each row as measured on machine ``name``, the fastest layout of the same
    work by formula."""
    machine, catalog, lines = _machine(name), load_catalog(), []
    for id_ in ids:
        e = catalog.find(id_)
        now, found = machine.predict(e).total, faster(e, machine)
        row, best = machine.row_of(e), found[0] if found else None
        lines.append(
            [
                f"`{id_}`",
                e.layout,
                f"{row.measured_ms:,.0f}" if row else "",
                f"{now:,.0f}",
                best.experiment.layout if best else "none",
                f"{best.step.total:,.0f}" if best else "",
                f"{best.step.total / now:.2f}" if best else "",
                f"{best.memory.total:.0f}" if best else "",
                f"`make {id_} {best.settings}`" if best else "",
            ]
        )
    head = ["id", "layout", "measured", "formula", "fastest", "formula", "of it", "GiB", "command"]
    return markdown.table(head, lines, "llrrlrrrl")


def machines_table() -> str:
    """Markdown: the constants of every machine, and how good they are."""
    machines = fitted()
    lines = [
        [f"`{name}`", *(f"{getattr(machine.constants, name):.3g}" for machine in machines.values())]
        for name in Calibration.model_fields
    ]
    lines.append(["rows", *(str(len(machine.rows)) for machine in machines.values())])
    for i, statistic in enumerate(("median", "90th percentile", "largest")):
        errors = [f"{machine.misses()[i]:.1%}" for machine in machines.values()]
        lines.append([f"error on rows left out, {statistic}", *errors])
    return markdown.table(
        ["", *(machine.card.name for machine in machines.values())],
        lines,
        "l" + "r" * len(machines),
    )


def unseen_table(catalog: Catalog, references: References, group: str) -> str:
    """Markdown: steps of a group of references.yaml that no constant was fitted to, beside the
    formula."""
    found = references.group(group)
    machine, lines = machine_of(find_card(found.gpu)), []
    for row, e in same_as(found, catalog):
        ms = machine.predict(e).total
        lines.append(
            [
                row.id or row.workload,
                f"`make {row.make or row.id}`",
                e.layout,
                f"{row.step_ms:,.0f}",
                f"{ms:,.0f}",
                f"{ms / row.step_ms - 1:+.1%}",
            ]
        )
    return markdown.table(
        ["row", "same as", "layout", "measured", "formula", "off by"], lines, "lllrrr"
    )


def same_as(group: ReferenceGroup, catalog: Catalog) -> Iterator[tuple[Reference, Experiment]]:
    """The rows of a group that a command of ours runs alike and that can be predicted, each with
    its experiment."""
    return ((row, e) for row, e in group.ran(catalog) if not unknown(e))


def _known(e: Experiment) -> Experiment:
    if missing := unknown(e):
        raise UserError(
            f"{e.id}: no formula for its step yet, since none was measured with"
            f" {' or '.join(missing)}\nmake memory-{overrides.command_of(e)} says what it takes;"
            f" make {overrides.command_of(e)} STEPS=20 how long"
        )
    return e


def _machines(e: Experiment) -> list[Machine]:
    cards = cards_of(e)
    machines = [machine for card in cards if (machine := machine_of(card))]
    if not machines:
        raise UserError(
            f"no steps on {_names(cards)} were measured to calibrate the formula; CARD= may be "
            f"{', '.join(dict.fromkeys(machine.gpu for machine in fitted().values()))}\n"
            "records of your own runs (make record) calibrate it: docs/step-time.md"
        )
    return machines


def _machine(name: str) -> Machine:
    if name not in fitted():
        raise UserError(f"no machine is called {name}; {nearest(name, fitted())}")
    return fitted()[name]


def _names(cards: Sequence[Card]) -> str:
    return " or ".join(card.name for card in cards)


def _pieces(step: StepTime) -> Iterator[str]:
    most = max(step.pieces.values())
    for name, ms in step.pieces.items():
        if ms >= 0.05:
            said = "; ".join(filter(None, ["the most" if ms == most else "", MEANING[name]]))
            yield f"  {name:12}{ms:8.1f}  {ms / step.total:4.0%}  {said}"


def _measured(
    e: Experiment, machine: Machine, step: StepTime, rows: Sequence[Row], references: References
) -> str:
    said = [
        f"measured {row.step.median:,.1f}, off by {step.total / row.step.median - 1:+.1%}"
        for row in rows
        if row.gpu == machine.card
        and row.state == "ok"
        and row.step
        and same_work(row.experiment, e)
    ]
    published, beside = references.published, references.published.beside(e.id)
    row = beside and beside.reference
    if (
        row
        and row.step_ms
        and not row.in_doubt
        and find_card(published.gpu) == machine.card
        and overrides.is_same_work(e)
    ):
        said.append(f"published {row.step_ms:,.0f}, off by {step.total / row.step_ms - 1:+.1%}")
    return "; ".join(said)
