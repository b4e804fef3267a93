"""The generated parts of PAGES: tables, lists and single numbers, between two comments of the
page's source.

    <!-- value: memory_gib[115] .1f -->…<!-- /value -->        one number
                                                               (harness/evidence/facts.py) in
                                                               Python's format
    <!-- records: make docs -->…<!-- /records -->              every record beside its published row
    <!-- summary: records -->…<!-- /summary -->                how many there are, and how they
                                                               stand beside the published
    <!-- experiments: 101 104 -->…<!-- /experiments -->        what each target isolates, from the
                                                               catalogue
    <!-- table: 101 104 -->…<!-- /table -->                    their results, where measured, beside
                                                               the published rows
    <!-- memory: 111 115 -->…<!-- /memory -->                  where the memory goes, by formula,
                                                               beside the record
    <!-- speed: h100-80gb 101 408 -->…<!-- /speed -->        where the time of a step goes, by
                                                             formula
    <!-- faster: h100-80gb 408 -->…<!-- /faster -->           the fastest layout of the same work,
                                                              by formula
    <!-- gpus: h100-80gb 128 611 -->…<!-- /gpus -->       the best layout for each number of GPUs,
                                                          by formula
    <!-- machines: constants -->…<!-- /machines -->           the constants of these formulas, and
                                                              how good they are
    <!-- unseen: h200-4gpu -->…<!-- /unseen -->               the formula beside a group of
                                                              references it was not fitted to
    <!-- pipeline: 401 408 -->…<!-- /pipeline -->              each step taken apart into waiting
                                                               and working
    <!-- claims: 100 -->…<!-- /claims -->                     do the numbers show what they must?
    <!-- profile: 282h 101 -->…<!-- /profile -->              where the time of a traced step goes
                                                              (harness/profiling/)
    <!-- slow_steps: records -->…<!-- /slow_steps -->         steps that took much longer than their
                                                              run's median
    <!-- weights: LlamaForCausalLM -->…<!-- /weights -->      which tensors are which
                                                              (harness/convert/)

A value may also be a file of records or benchmarks and a key in it: ``h200-141gb/601_args
loss.first .2f``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from harness import ROOT
from harness.errors import UserError, nearest
from harness.evidence import markdown, scaling, speed, tables, verdicts
from harness.evidence.facts import CARD, HARDWARE, Facts, NotMeasured, RanOutOfMemory
from harness.evidence.references import Reference
from harness.evidence.results import ended
from harness.evidence.rows import Row
from harness.experiment.catalog import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, find_gpu
from harness.pages import architectures, diagrams, plots, profiles, step_drawings
from harness.pages.plots import IMAGES
from harness.predict import formulas
from harness.predict.calibrations import machine_measured_by
from harness.predict.memory import predict
from harness.system.files import write_text

PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "saves.md",
)
VALUE = re.compile(r"(<!-- value: (.+?) (\S+) -->).*?(<!-- /value -->)")
BLOCK = re.compile(r"^(<!-- (\w+): ([^\n]+) -->\n).*?^(<!-- /\2 -->)$", re.DOTALL | re.MULTILINE)
IN_A_FILE = re.compile(r"(\S+/\S+) (\w[\w.: -]*)")
DRAWINGS = diagrams.DRAWINGS | step_drawings.DRAWINGS
MISSING = "not measured yet"
REFERENCE_8 = "h200-8gpu"
RIGHT = ("GPUs", "MBS", "GBS", "tokens")
PIECES = ("weights", "gradients", "optimizer", "activations")


def render(page: str, facts: Facts) -> str:
    """``page`` with its marked parts made anew.

    Raises:
        UserError: a mark names an experiment, a value or a block that does not exist.
    """
    page = VALUE.sub(lambda v: f"{v[1]}{value(v[2], v[3], facts)}{v[4]}", page)
    return BLOCK.sub(lambda b: f"{b[1]}\n{block(b[2], b[3], facts)}\n\n{b[4]}", page)


def block(name: str, words: str, facts: Facts) -> str:
    """The Markdown between ``<!-- name: words -->`` and ``<!-- /name -->``."""
    if name not in BLOCKS:
        raise UserError(f"<!-- {name}: {words} -->: no such block; {nearest(name, BLOCKS)}")
    return BLOCKS[name](facts, words.split()).strip()


def value(expression: str, form: str, facts: Facts) -> str:
    """One number in Python's format ``form``, or why there is none: not measured yet, out of
    memory.

    Raises UserError where it makes no sense.
    """
    in_a_file = IN_A_FILE.fullmatch(expression)
    try:
        return format(
            facts.record_value(*in_a_file.groups()) if in_a_file else facts.value(expression), form
        )
    except RanOutOfMemory:
        return "out of memory"
    except NotMeasured:
        return MISSING
    except ValueError:
        raise UserError(
            f"{expression}: {form} is no format of a number, such as .1f or .0%"
        ) from None


def write(records: Path, *, check: bool = False) -> list[Path]:
    """Bring every page and picture up to date and return those that changed; with ``check``, those
    that would."""
    facts = Facts.load(records)
    fresh = {path: render(path.read_text(encoding="utf-8"), facts) for path in PAGES}
    drawn, _ = plots.pictures(None, records)
    fresh |= {IMAGES / name: svg for name, svg in (drawings(facts) | drawn).items()}
    stale = [
        path
        for path, text in fresh.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if not check:
        for path in stale:
            write_text(path, fresh[path])
    return stale


def drawings(facts: Facts) -> dict[str, str]:
    """Every diagram by file name."""
    return {f"diagram-{name}.svg": draw(facts).svg() for name, draw in DRAWINGS.items()}


def _records(facts: Facts, _: Sequence[str]) -> str:
    text = (
        tables.render(facts.rows, "markdown", titles=facts.catalog.chapters)
        if facts.rows
        else "No records yet."
    )
    return text.replace(" (record)", "")  # here, every row is one


def _summary(facts: Facts, _: Sequence[str]) -> str:
    """An experiment counts once, however often it is recorded."""
    ids = sorted({row.id for row in facts.of_hardware})
    gpus = sorted({row.experiment.world_size for row in facts.of_hardware})
    rows = [row for row in map(facts.row, ids) if row]
    judged = ended(facts.of_hardware)
    memory = [row.memory_ratio for row in rows if row.memory_ratio]
    steps = [row.step_ratio for row in rows if row.step_ratio]
    if not memory or not steps:
        return "No records yet."
    columns, found = facts.claims
    here = [
        side
        for one in found
        for side, column in zip(one.sides, columns, strict=True)
        if column.key == "ours"
    ]
    steps_apart = [
        abs(row.predicted_step_ms / row.step.median - 1)
        for row in rows
        if row.step and row.predicted_step_ms
    ]
    machine = machine_measured_by(facts.references.published.name)
    half, most, _ = machine.misses()
    apart = [
        abs(predict(row.experiment).total / row.memory_gib.allocated - 1)
        for row in rows
        if row.state == "ok" and row.memory_gib.allocated
    ]
    return (
        f"* **Reproduced.** {len(ids)} experiments on {', '.join(map(str, gpus[:-1]))} and"
        f" {gpus[-1]} GPUs ({find_gpu(HARDWARE).name}): {judged.as_published} of the"
        f" {judged.experiments} with a published row end as published, complete or out of memory."
        f" Memory is {median(memory):.2f} times the published{_with_driver(rows)},"
        f" {sum(abs(ratio - 1) <= 0.015 for ratio in memory)} of {len(memory)} within 1.5 %; a step"
        f" takes {median(steps):.2f} times the published, on a newer GPU and Megatron-LM.\n*"
        " **Predicted.** `make memory-620` says by formula, before a run, what PyTorch will"
        f" allocate: for these at most {max(apart):.1%} off, {median(apart):.1%} in the median."
        f" `make speed-408` says how long a step will take: for these {median(steps_apart):.1%} off"
        f" in the median, by constants that had not seen the row; for the {len(machine.rows)}"
        f" published rows, on another GPU, {half:.1%}, 90th percentile {most:.0%}"
        f" ([how](docs/step-time.md)).\n* **Checked.** {len(found)} teaching points are formulas"
        f" over these numbers: {verdicts.counted(here)} (`make claims`; where one fails, its"
        " chapter says why)."
    )


def _experiments(facts: Facts, ids: Sequence[str]) -> str:
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
    found = [facts.catalog.find(id_) for id_ in ids]
    same = {
        name: text(found[0]) for name, text in columns.items() if len(set(map(text, found))) == 1
    }
    shown = [name for name in columns if name not in same]
    lines = [[columns[name](e) for name in shown] for e in found]
    table = _filled(shown, lines, ["r" if name in RIGHT else "l" for name in shown])
    said = ", ".join(f"{name} {text}" for name, text in same.items() if text)
    return f"{table}\n\nThe same for all: {said}." if said else table


def _table(facts: Facts, ids: Sequence[str]) -> str:
    rows = [(id_, facts.row(id_), facts.published(id_), _of_eight(facts, id_)) for id_ in ids]
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
        return _to_measure(facts, ids, named=True)
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
            f" measured on {find_gpu(HARDWARE).name}, ± half the interquartile range of a run's"
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


def _memory_pieces(facts: Facts, ids: Sequence[str]) -> str:
    lines = []
    for id_ in ids:
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
    return f"{_filled(head, lines, 'll' + 'r' * 9)}\n\n{_to_measure(facts, ids)}"


def _pipeline(facts: Facts, ids: Sequence[str]) -> str:
    lines = []
    for id_ in ids:
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


def _profile(facts: Facts, ids: Sequence[str]) -> str:
    published = [facts.published(facts.catalog.find(id_).half_of or id_) for id_ in ids]
    return profiles.profiles(facts.records / HARDWARE, ids, published)


def _claims(facts: Facts, chapters: Sequence[str]) -> str:
    columns, found = facts.claims
    wanted = [one for one in found if str(one.claim.chapter) in chapters]
    return verdicts.render(wanted, columns, "markdown").partition("\n\n")[2]  # without its title


BLOCKS: dict[str, Callable[[Facts, Sequence[str]], str]] = {
    "records": _records,
    "summary": _summary,
    "experiments": _experiments,
    "table": _table,
    "memory": _memory_pieces,
    "speed": lambda facts, words: speed.pieces_table(facts.catalog, words[0], words[1:]),
    "faster": lambda _, words: speed.faster_table(*words),
    "gpus": lambda _, words: scaling.table(*words),
    "machines": lambda _, words: speed.machines_table(),
    "unseen": lambda facts, words: speed.unseen_table(facts.catalog, facts.references, *words),
    "pipeline": _pipeline,
    "claims": _claims,
    "profile": _profile,
    "slow_steps": lambda facts, _: profiles.slow_steps(facts.of_hardware),
    "weights": lambda _, words: "\n\n".join(map(architectures.page, words)),
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
