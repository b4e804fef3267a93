"""Tables of experiments in the documents: sizes, results, memory, pipeline bubbles.

Columns that are empty in every line are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.evidence import markdown
from harness.evidence.facts import CARD, HARDWARE, Facts
from harness.evidence.references import Reference
from harness.evidence.rows import Row
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, find_card
from harness.predict import formulas
from harness.predict.memory import predict

MISSING = "not measured yet"
CAPPED = "memory capped as on that card"
EIGHT_GPUS = "h200-8gpu"
"""The group of references with results of another machine, of eight H200."""

Column = tuple[str, str, Callable[[Any], str]]
"""Heading, alignment (``l`` or ``r``), and the cell of an item."""


@dataclass(frozen=True)
class Entry:
    """An experiment and where it was measured."""

    experiment: Experiment
    record: Row | None
    published: Reference | None
    eight_gpus: Reference | None


def experiments(facts: Facts, chapter: int) -> str:
    """What each full-size experiment of a chapter isolates; sizes that are all equal below."""
    rows = facts.catalog.in_chapter(chapter)
    halves = {e.half_of: f"`{e.id}` {e.layout}" for e in rows if e.half_of}
    columns: list[Column] = [
        ("make", "l", lambda experiment: f"`{experiment.id}`"),
        ("layout", "l", _of("layout")),
        ("model", "l", _of("model.name")),
        ("GPUs", "r", _of("world_size")),
        ("MBS", "r", _of("micro_batch_size")),
        ("GBS", "r", _of("global_batch_size")),
        ("tokens", "r", _of("seq_length", ",")),
        ("what it isolates", "l", _of("shows")),
        ("half size", "l", lambda experiment: halves.get(experiment.id, "")),
    ]
    whole = [experiment for experiment in rows if not experiment.half_of]
    varying = [column for column in columns if len(set(map(column[2], whole))) > 1]
    constant = [column for column in columns if column not in varying]
    equal = [f"{name} {cell(whole[0])}" for name, _, cell in constant if cell(whole[0])]
    said = f"\n\nThe same for all: {', '.join(equal)}." if equal else ""
    return _table(varying, whole) + said


def results(facts: Facts, ids: str) -> str:
    """Measured and published memory and step time, with remarks on columns and rows."""
    entries = [_entry(facts, id_) for id_ in ids.split()]
    measured = [e for e in entries if e.record or e.published or e.eight_gpus]
    if not measured:
        return _unmeasured(facts, ids.split(), no_table=True)
    remarks = (f"<sub>{remark}</sub><br>" for remark in _remarks(facts, entries))
    return "\n".join([_table(_RESULTS, measured), "", *remarks])


def memory(facts: Facts, ids: str) -> str:
    """Predicted memory by part, and what was allocated, reserved and in use."""
    entries = [_entry(facts, id_) for id_ in ids.split()]
    return "\n\n".join(filter(None, [_table(_MEMORY, entries), _unmeasured(facts, ids.split())]))


def pipeline(facts: Facts, ids: str) -> str:
    """The bubble of each pipeline, and its step time with and without it."""
    return _table(_PIPELINE, [_entry(facts, id_) for id_ in ids.split()])


def driver_remark(rows: Sequence[Row]) -> str:
    """In brackets, that used memory includes what the driver reserves; published GiB do not."""
    counted = [row for row in rows if row.counts_driver]
    if not counted:
        return ""
    of_some = " of some" if len(counted) < len(rows) else ""
    return (
        f" ({DRIVER_RESERVED_MIB / 1024:.1f} GiB{of_some} are the driver's, which nvidia-smi leaves"
        " out)"
    )


def _entry(facts: Facts, id_: str) -> Entry:
    eight_gpus = [
        reference
        for reference in facts.references.group(EIGHT_GPUS).rows
        if reference.id == id_ and reference.gpus == 8 and not reference.variant
    ]
    return Entry(
        facts.catalog.find(id_),
        facts.row(id_),
        facts.published(id_),
        eight_gpus[0] if eight_gpus else None,
    )


def _of(path: str, form: str = "") -> Callable[[Any], str]:
    """Cells with the attribute at ``path``, such as ``record.mfu``; empty where one lacks it."""

    def cell(item: Any) -> str:
        for name in path.split("."):
            item = getattr(item, name, None)
        return _number(item, form)

    return cell


def _number(number: float | str | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _out_of_memory(entry: Entry) -> bool:
    return entry.record is not None and entry.record.state == "oom"


def _gib(name: str, oom: str = "") -> Callable[[Entry], str]:
    """Cells with a peak of memory; ``oom`` where the run ran out of it."""
    cell = _of(f"record.memory_gib.{name}", ".1f")
    return lambda entry: oom if _out_of_memory(entry) else cell(entry)


def _step_ms(entry: Entry) -> str:
    step = entry.record and entry.record.step
    return f"{step.median:,.1f} ± {step.half_iqr:,.1f}" if step else ""


def _predicted_ms(entry: Entry) -> str:
    measured = entry.record and entry.record.step
    return _number(entry.record.predicted_step_ms if measured else None, ",.0f")


def _published(name: str, form: str) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        published = entry.published
        if published is None:
            return ""
        if published.oom:
            return "OOM"
        return format(getattr(published, name), form) + "?" * published.in_doubt

    return cell


def _eight_gpus(entry: Entry) -> str:
    found = entry.eight_gpus
    return f"{found.memory_gib:.1f} GiB, {found.step_ms:,.0f} ms" if found else ""


def _part_gib(name: str) -> Callable[[Entry], str]:
    return lambda entry: _number(getattr(predict(entry.experiment), name), ".1f")


def _memory_error(entry: Entry) -> str:
    complete = entry.record and not _out_of_memory(entry)
    allocated = entry.record.memory_gib.allocated if complete else None
    return f"{predict(entry.experiment).total / allocated - 1:+.1%}" if allocated else ""


def _busy_ms(step_ms: Callable[[Entry], float | None]) -> Callable[[Entry], str]:
    """Step time without the pipeline bubble."""

    def cell(entry: Entry) -> str:
        ms = step_ms(entry)
        return _number(ms and ms * (1 - formulas.idle_share(entry.experiment)), ",.0f")

    return cell


def _published_ms(entry: Entry) -> float | None:
    published = entry.published
    return published.step_ms if published and not published.in_doubt else None


def _measured_ms(entry: Entry) -> float | None:
    return entry.record.step.median if entry.record and entry.record.step else None


_ID: list[Column] = [
    ("id", "l", lambda entry: f"`{entry.experiment.id}`"),
    ("layout", "l", _of("experiment.layout")),
]
_RESULTS: list[Column] = [
    *_ID,
    ("GPUs", "r", _of("experiment.world_size")),
    ("GiB", "r", _gib("nvml", oom="OOM")),
    ("publ. GiB", "r", _published("memory_gib", ".1f")),
    ("ratio", "r", _of("record.memory_ratio", ".2f")),
    ("ms/step", "r", _step_ms),
    ("publ. ms", "r", _published("step_ms", ",.0f")),
    ("ratio", "r", _of("record.step_ratio", ".2f")),
    ("formula", "r", _predicted_ms),
    ("MFU", "r", _of("record.mfu", ".0%")),
    ("8x H200", "l", _eight_gpus),
]
_MEMORY: list[Column] = [
    *_ID,
    ("weights", "r", _part_gib("weights")),
    ("gradients", "r", _part_gib("gradients")),
    ("optimizer", "r", _part_gib("optimizer")),
    ("activations", "r", _part_gib("activations")),
    ("sum", "r", _part_gib("total")),
    ("allocated", "r", _gib("allocated", oom="OOM")),
    ("error", "r", _memory_error),
    ("reserved", "r", _gib("reserved")),
    ("in use", "r", _gib("nvml")),
]
_PIPELINE: list[Column] = [
    ("id", "l", lambda entry: f"`{entry.experiment.id}`"),
    ("p", "r", _of("experiment.pp")),
    ("v", "r", _of("experiment.vpp")),
    ("m", "r", _of("experiment.num_microbatches")),
    ("MBS", "r", _of("experiment.micro_batch_size")),
    ("(p-1)/(vm)", "r", lambda entry: f"{formulas.bubble(entry.experiment):.3f}"),
    ("idle", "r", lambda entry: f"{formulas.idle_share(entry.experiment):.0%}"),
    ("publ. ms", "r", lambda entry: _number(_published_ms(entry), ",.0f")),
    ("busy ms", "r", _busy_ms(_published_ms)),
    ("ms here", "r", lambda entry: _number(_measured_ms(entry), ",.0f")),
    ("busy ms", "r", _busy_ms(_measured_ms)),
]


def _table(columns: Sequence[Column], items: Sequence[Any]) -> str:
    """A Markdown table of ``items`` without the columns that are empty in every line."""
    filled = [(name, side, list(map(cell, items))) for name, side, cell in columns]
    head, sides, cells = zip(*[column for column in filled if any(column[2])], strict=True)
    return markdown.table(head, zip(*cells, strict=True), sides)


def _remarks(facts: Facts, entries: Sequence[Entry]) -> Iterator[str]:
    """What a reader must know about the columns and about single rows."""
    group, eight = facts.references.published, facts.references.group(EIGHT_GPUS)
    records = [entry.record for entry in entries if entry.record]
    sources = []
    if records:
        sources.append(
            f"GiB{driver_remark(records)}, ms/step and MFU: measured on"
            f" {find_card(HARDWARE).name}; ±: half the interquartile range of a run's steps;"
            " formula: ms/step by constants fitted without its chapter (`docs/step-time.md`)"
        )
    if any(record.mfu for record in records):
        sources.append("MFU: of model FLOPs, see `docs/records.md`")
    if any(entry.published for entry in entries):
        sources.append(f"publ.: {group.hardware}, {group.software}")
    if sources:
        yield f"{'; '.join(sources)}. Every column and source: `docs/records.md`."
    if any(entry.eight_gpus for entry in entries):
        yield f"8x H200: {eight.source}; {eight.method}. A reference, not one of the records."
    for entry in entries:
        yield from _row_remarks(facts, entry)
    shared = [record.id for record in records if (record.runs_on_node or 1) > 1]
    if shared:
        yield f"{_code(shared)} shared the node with other runs: `docs/records.md` says how many."
    if unmeasured := _unmeasured(facts, [entry.experiment.id for entry in entries]):
        yield unmeasured


def _row_remarks(facts: Facts, entry: Entry) -> Iterator[str]:
    id_, capped = entry.experiment.id, facts.capped(entry.experiment.id)
    published = facts.references.published.matching(id_)
    if published and published.remarks:
        yield f"`{id_}`: {'; '.join(published.remarks)}."
    if entry.record and entry.record.experiment.card:
        yield f"`{id_}` ran with `CARD={entry.record.experiment.card}`: {CAPPED}."
    elif capped and capped.state == "oom":
        yield f"`{id_}` runs out of memory with `CARD={CARD}`: {CAPPED}."


def _unmeasured(facts: Facts, ids: Sequence[str], *, no_table: bool = False) -> str:
    """Which experiments have no record, in a sentence; nothing where all have one.

    One that was measured with other settings only is in no line of a table, yet not unmeasured.
    """
    without = [id_ for id_ in ids if facts.row(id_) is None]
    missing = [id_ for id_ in without if not facts.otherwise(id_)]
    changed = [row.origin.stem for id_ in without for row in facts.otherwise(id_)]
    said = []
    if len(missing) == len(ids) and not no_table:
        said.append("None of these is measured yet.")
    elif missing:
        said.append(f"{MISSING.capitalize()}: {_code(missing)}.")
    if changed:
        said.append(f"Measured with other settings only: {_code(changed)} (`docs/records.md`).")
    return " ".join(said)


def _code(ids: Iterable[str]) -> str:
    return ", ".join(f"`{id_}`" for id_ in ids)
