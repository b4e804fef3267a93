"""What a template may call: tables, lists and single numbers made from records, references and
formulas.

    {{ value("memory_gib[115]", ".1f") }}     one number, in Python's format
    {{ recorded("benchmarks/data", "mb_per_s.ours", ".0f") }}
                                              one number of a JSON file of records or benchmarks
    {% set found = summary() %}               what all records show together: found.experiments, …
    {{ records() }}                           every record with its published row
    {{ experiments(chapter=100) }}            what each experiment isolates
    {{ table("101 104") }}                    measured and published memory and step time
    {{ memory("111 115") }}                   predicted memory by piece, and what was measured
    {{ speed("408", machine="h200") }}        predicted step time by piece
    {{ faster("408", machine="h200") }}       the fastest layout predicted for the same work
    {{ gpus("611", card="h100-80gb") }}       the best layout predicted for each number of GPUs
    {{ machines() }}                          the constants of the predictions and their errors
    {{ unseen("h200-4gpu") }}                 predictions for references outside the calibration
    {{ pipeline("401 408") }}                 waiting and working time of each pipeline step
    {{ claims(chapter=100) }}                 which teaching points the numbers confirm
    {{ profile("282h 101") }}                 where the time of a traced step goes
    {{ slow_steps() }}                        steps much longer than the median of their run
    {{ weights("LlamaForCausalLM") }}         which tensors correspond in both formats
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from harness.errors import UserError
from harness.evidence import markdown, scaling, step_time_tables, tables, verdicts
from harness.evidence.facts import CARD, HARDWARE, Facts
from harness.evidence.quantities import NotMeasured, RanOutOfMemory
from harness.evidence.references import Reference
from harness.evidence.results import ended
from harness.evidence.rows import Row
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, find_card
from harness.pages import architectures, profiles
from harness.predict import formulas
from harness.predict.calibrations import machine_measured_by
from harness.predict.memory import predict

MISSING = "not measured yet"
REFERENCE_8 = "h200-8gpu"
RIGHT = ("GPUs", "MBS", "GBS", "tokens")
PIECES = ("weights", "gradients", "optimizer", "activations")


def functions(facts: Facts) -> dict[str, Callable[..., Any]]:
    """Every function by the name that templates use; all but ``summary`` return Markdown."""
    return {name: partial(function, facts) for name, function in FUNCTIONS.items()}


def value(facts: Facts, expression: str, form: str) -> str:
    """The number of an expression such as ``memory_gib[114] - memory_gib[115]`` in Python's format
    ``form``; where there is none, why: not measured yet, out of memory."""
    return _number(partial(facts.value, expression), form)


def recorded(facts: Facts, name: str, keys: str, form: str) -> str:
    """The number at ``keys``, joined by dots, of a record (``h200-141gb/101``) or a file of
    ``benchmarks/``."""
    return _number(partial(facts.record_value, name, keys), form)


def _number(find: Callable[[], float], form: str) -> str:
    try:
        number = find()
    except RanOutOfMemory:
        return "out of memory"
    except NotMeasured:
        return MISSING
    try:
        return format(number, form)
    except ValueError:
        raise UserError(f"{form} is no format of a number, such as .1f or .0%") from None


def records(facts: Facts) -> str:
    text = (
        tables.render(facts.rows, "markdown", titles=facts.catalog.chapters)
        if facts.rows
        else "No records yet."
    )
    return text.replace(" (record)", "")  # here, every row is one


@dataclass(frozen=True)
class Summary:
    """What all records on HARDWARE show together, ready to print; an experiment counts once,
    however often it is recorded."""

    experiments: int
    gpus: str
    """How many GPUs they ran on: ``1, 2 and 4``."""
    gpu: str
    compared: int
    """Experiments with a published row."""
    as_published: int
    """Those of them that ended as published, complete or out of memory."""
    memory_ratio: str
    """Median of measured over published memory."""
    memory_compared: int
    memory_close: int
    """Those within 1.5 % of the published memory."""
    driver: str
    """A note in brackets where measured memory includes what the driver reserves."""
    step_ratio: str
    """Median of measured over published step time."""
    memory_error_median: str
    memory_error_largest: str
    """Of predicted over allocated memory."""
    step_error_median: str
    """Of step times predicted by constants fitted without the row."""
    published_rows: int
    published_error_median: str
    published_error_90th_percentile: str
    """Of step times predicted for published rows, by constants fitted without the row."""
    claims: int
    verdicts: str
    """How many claims have which verdict on our records: ``30 hold, 5 fail``."""


def summary(facts: Facts) -> Summary | None:
    """What the records show together; None without records."""
    ids = sorted({row.id for row in facts.of_hardware})
    gpus = sorted({row.experiment.world_size for row in facts.of_hardware})
    rows = [row for row in map(facts.row, ids) if row]
    judged = ended(facts.of_hardware)
    memory = [row.memory_ratio for row in rows if row.memory_ratio]
    steps = [row.step_ratio for row in rows if row.step_ratio]
    if not memory or not steps:
        return None
    columns, found = facts.claims
    ours = [column.key for column in columns].index("ours")
    machine = machine_measured_by(facts.references.published.name)
    published_median, published_90th, _ = machine.misses()
    memory_errors = [
        abs(predict(row.experiment).total / row.memory_gib.allocated - 1)
        for row in rows
        if row.state == "ok" and row.memory_gib.allocated
    ]
    step_errors = [
        abs(row.predicted_step_ms / row.step.median - 1)
        for row in rows
        if row.step and row.predicted_step_ms
    ]
    return Summary(
        experiments=len(ids),
        gpus=f"{', '.join(map(str, gpus[:-1]))} and {gpus[-1]}",
        gpu=find_card(HARDWARE).name,
        compared=judged.experiments,
        as_published=judged.as_published,
        memory_ratio=f"{median(memory):.2f}",
        memory_compared=len(memory),
        memory_close=sum(abs(ratio - 1) <= 0.015 for ratio in memory),
        driver=_with_driver(rows),
        step_ratio=f"{median(steps):.2f}",
        memory_error_median=f"{median(memory_errors):.1%}",
        memory_error_largest=f"{max(memory_errors):.1%}",
        step_error_median=f"{median(step_errors):.1%}",
        published_rows=len(machine.rows),
        published_error_median=f"{published_median:.1%}",
        published_error_90th_percentile=f"{published_90th:.0%}",
        claims=len(found),
        verdicts=verdicts.counted(one.sides[ours] for one in found),
    )


def experiments(facts: Facts, ids: str = "", chapter: int | None = None) -> str:
    """What is the same for all of them is said in a sentence below."""
    half = {e.half_of: f"`{e.id}` {e.layout}" for e in facts.catalog.experiments if e.half_of}
    columns: dict[str, Callable[[Experiment], str]] = {
        "make": lambda e: f"`{e.id}`",
        "layout": lambda e: e.layout,
        "model": lambda e: e.model.name,
        "GPUs": lambda e: str(e.world_size),
        "MBS": lambda e: str(e.micro_batch_size),
        "GBS": lambda e: str(e.global_batch_size),
        "tokens": lambda e: f"{e.seq_length:,}",
        "what it isolates": lambda e: e.shows,
        "half size": lambda e: half.get(e.id, ""),
    }
    found = facts.catalog.in_chapter(chapter) if chapter else ()
    found = [e for e in found if not e.half_of] or [facts.catalog.find(id_) for id_ in ids.split()]
    same = {
        name: text(found[0]) for name, text in columns.items() if len(set(map(text, found))) == 1
    }
    shown = [name for name in columns if name not in same]
    lines = [[columns[name](e) for name in shown] for e in found]
    table = _filled(shown, lines, ["r" if name in RIGHT else "l" for name in shown])
    said = ", ".join(f"{name} {text}" for name, text in same.items() if text)
    return f"{table}\n\nThe same for all: {said}." if said else table


def table(facts: Facts, ids: str) -> str:
    rows = [
        (id_, facts.row(id_), facts.published(id_), _of_eight(facts, id_)) for id_ in ids.split()
    ]
    lines = []
    for id_, ours, published, reference in rows:
        if not (ours or published or reference):
            continue
        e = facts.catalog.find(id_)
        lines.append(
            [
                f"`{id_}`",
                e.layout,
                str(e.world_size),
                _memory(ours),
                _published(published, "memory_gib", ".1f"),
                _ratio(ours and ours.memory_ratio),
                _step(ours),
                _published(published, "step_ms", ",.0f"),
                _ratio(ours and ours.step_ratio),
                _foretold(ours),
                f"{ours.mfu:.0%}" if ours and ours.mfu else "",
                f"{reference.memory_gib:.1f} GiB, {reference.step_ms:,.0f} ms" if reference else "",
            ]
        )
    head = [
        "id",
        "layout",
        "GPUs",
        "GiB",
        "publ. GiB",
        "ratio",
        "ms/step",
        "publ. ms",
        "ratio",
        "formula",
        "MFU",
        "8x H200",
    ]
    if not lines:
        return _to_measure(facts, ids.split(), named=True)
    return "\n".join([_filled(head, lines, "llrrrrrrrrrl"), "", *_notes(facts, rows)])


def _notes(
    facts: Facts, rows: Sequence[tuple[str, Row | None, Reference | None, Reference | None]]
) -> list[str]:
    """What a reader must know about the columns and about single rows, small."""
    group, eight = facts.references.published, facts.references.group(REFERENCE_8)
    sources = []
    if any(ours for _, ours, _, _ in rows):
        sources.append(
            f"GiB{_with_driver([ours for _, ours, _, _ in rows if ours])}, ms/step and MFU:"
            f" measured on {find_card(HARDWARE).name}, ± half the interquartile range of a run's"
            " steps; formula: ms/step by constants fitted without the row (`docs/step-time.md`)"
        )
    if any(ours and ours.mfu for _, ours, _, _ in rows):
        sources.append("MFU: of model FLOPs, see `docs/records.md`")
    if any(published for _, _, published, _ in rows):
        sources.append(f"publ.: {group.hardware}, {group.software}")
    notes = (
        [f"{'; '.join(sources)}. Every column and source: `docs/records.md`."] if sources else []
    )
    if any(reference for *_, reference in rows):
        notes.append(
            f"8x H200: {eight.source}; {eight.method}. A reference, not one of the records."
        )
    for id_, ours, _, _ in rows:
        published = group.beside(id_)
        if published and published.remarks:
            notes.append(f"`{id_}`: {'; '.join(published.remarks)}.")
        if ours and ours.experiment.card:
            notes.append(
                f"`{id_}` ran with `CARD={ours.experiment.card}`: no more memory than that card"
                " has."
            )
        elif (capped := facts.capped(id_)) and capped.state == "oom":
            notes.append(
                f"`{id_}` runs out of memory with `CARD={CARD}`: no more memory than that card has."
            )
    if shared := [id_ for id_, ours, _, _ in rows if ours and (ours.runs_on_node or 1) > 1]:
        notes.append(
            f"{_named(shared)} shared the node with other runs: `docs/records.md` says with how"
            " many."
        )
    notes += filter(None, [_to_measure(facts, [id_ for id_, *_ in rows])])
    return [f"<sub>{note}</sub><br>" for note in notes]


def _with_driver(rows: Sequence[Row]) -> str:
    """Of runs that counted what the driver keeps for itself, in brackets, that they did: published
    GiB leave it out."""
    counted = [row for row in rows if row.counts_driver]
    if not counted:
        return ""
    of_some = " of some" if len(counted) < len(rows) else ""
    return (
        f" ({DRIVER_RESERVED_MIB / 1024:.1f} GiB{of_some} are the driver's, which nvidia-smi leaves"
        " out)"
    )


def _to_measure(facts: Facts, ids: Sequence[str], *, named: bool = False) -> str:
    """Which experiments of a table have no record, in a sentence; nothing where all have one.

    One that was measured with other settings alone stands in no column, and is not called
    unmeasured either.
    """
    without = [id_ for id_ in ids if facts.row(id_) is None]
    missing = [id_ for id_ in without if not facts.otherwise(id_)]
    changed = [f"`{row.origin.stem}`" for id_ in without for row in facts.otherwise(id_)]
    said = []
    if len(missing) == len(ids) and not named:
        said.append(f"None of these is {MISSING.removeprefix('not ')}.")
    elif missing:
        said.append(f"{MISSING.capitalize()}: {_named(missing)}.")
    if changed:
        said.append(f"Measured with other settings only: {', '.join(changed)} (`docs/records.md`).")
    return " ".join(said)


def _named(ids: Iterable[str]) -> str:
    return ", ".join(f"`{id_}`" for id_ in ids)


def memory(facts: Facts, ids: str) -> str:
    lines = []
    for id_ in ids.split():
        e, ours = facts.catalog.find(id_), facts.row(id_)
        predicted = predict(e)
        memory = ours.memory_gib if ours and ours.state == "ok" else None
        allocated = memory and memory.allocated
        lines.append(
            [
                f"`{id_}`",
                e.layout,
                *(_gib(getattr(predicted, piece)) for piece in PIECES),
                _gib(predicted.total),
                _gib(allocated) if memory else _memory(ours),
                f"{predicted.total / allocated - 1:+.1%}" if allocated else "",
                _gib(memory and memory.reserved),
                _gib(memory and memory.nvml),
            ]
        )
    head = ["id", "layout", *PIECES, "sum", "allocated", "off by", "reserved", "in use"]
    table = _filled(head, lines, "ll" + "r" * 9)
    return "\n\n".join(filter(None, [table, _to_measure(facts, ids.split())]))


def pipeline(facts: Facts, ids: str) -> str:
    lines = []
    for id_ in ids.split():
        e, ours, published = facts.catalog.find(id_), facts.row(id_), facts.published(id_)
        idle = formulas.idle_share(e)
        times_ms = (
            published and not published.in_doubt and published.step_ms,
            ours and ours.step and ours.step.median,
        )
        lines.append(
            [
                f"`{id_}`",
                str(e.pp),
                str(e.vpp),
                str(e.num_microbatches),
                str(e.micro_batch_size),
                f"{formulas.bubble(e):.3f}",
                f"{idle:.0%}",
                *(f"{share * ms:,.0f}" if ms else "" for ms in times_ms for share in (1, 1 - idle)),
            ]
        )
    head = [
        "id",
        "p",
        "v",
        "m",
        "MBS",
        "(p-1)/(vm)",
        "waits",
        "publ. ms",
        "of it work",
        "ms here",
        "of it work",
    ]
    return _filled(head, lines, "l" + "r" * 10)


def profile(facts: Facts, ids: str) -> str:
    wanted = ids.split()
    published = [facts.published(facts.catalog.find(id_).half_of or id_) for id_ in wanted]
    return profiles.profiles(facts.records / HARDWARE, wanted, published)


def claims(facts: Facts, chapter: int) -> str:
    columns, found = facts.claims
    wanted = [one for one in found if str(one.claim.chapter) == str(chapter)]
    return verdicts.render(wanted, columns, "markdown").partition("\n\n")[2]  # without its title


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "value": value,
    "recorded": recorded,
    "summary": summary,
    "records": records,
    "experiments": experiments,
    "table": table,
    "memory": memory,
    "speed": lambda facts, ids, machine: step_time_tables.parts_table(
        facts.catalog, machine, ids.split()
    ),
    "faster": lambda _, ids, machine: step_time_tables.faster_table(machine, *ids.split()),
    "gpus": lambda _, ids, card: scaling.table(card, *ids.split()),
    "machines": lambda _: step_time_tables.machines_table(),
    "unseen": lambda facts, group: step_time_tables.unseen_table(
        facts.catalog, facts.references, group
    ),
    "pipeline": pipeline,
    "claims": claims,
    "profile": profile,
    "slow_steps": lambda facts: profiles.slow_steps(facts.of_hardware),
    "weights": lambda _, architecture: architectures.page(architecture),
}


def _filled(head: Sequence[str], lines: Sequence[Sequence[str]], sides: Iterable[str]) -> str:
    """A Markdown table without its empty columns."""
    columns = [column for column in zip(head, sides, *lines, strict=True) if any(column[2:])]
    head, sides, *lines = zip(*columns, strict=True)
    return markdown.table(head, lines, sides)


def _of_eight(facts: Facts, id_: str) -> Reference | None:
    rows = facts.references.group(REFERENCE_8).rows
    return next((row for row in rows if row.id == id_ and row.gpus == 8 and not row.variant), None)


def _memory(ours: Row | None) -> str:
    if ours is None:
        return ""
    return "OOM" if ours.state == "oom" else _gib(ours.memory_gib.nvml)


def _step(ours: Row | None) -> str:
    return f"{ours.step.median:,.1f} ± {ours.step.half_iqr:,.1f}" if ours and ours.step else ""


def _foretold(ours: Row | None) -> str:
    return f"{ours.predicted_step_ms:,.0f}" if ours and ours.step and ours.predicted_step_ms else ""


def _published(reference: Reference | None, key: str, form: str) -> str:
    if reference is None:
        return ""
    return (
        "OOM" if reference.oom else format(getattr(reference, key), form) + "?" * reference.in_doubt
    )


def _ratio(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio else ""


def _gib(gib: float | None) -> str:
    return f"{gib:.1f}" if gib is not None else ""
