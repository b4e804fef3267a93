"""Rows as people and programs read them: terminal, Markdown, CSV, JSON; and two runs side by
side."""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.data.data_sets import MOCK
from harness.errors import UserError
from harness.evidence import markdown
from harness.evidence.references import load_references
from harness.evidence.results import Results, collect, ended
from harness.evidence.rows import Row, launch_rate_remark, losses
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.hardware import DRIVER_RESERVED_MIB
from harness.predict.flops import MODEL_FLOPS
from harness.run.directory import changes_in_words, perplexity
from harness.system import screen

FORMATS = ("terminal", "markdown", "csv", "json")
NOTHING = "no runs yet: make 101"
SAME_LOSS = 2e-6
"""Relative difference up to which two fp32 losses count as equal."""

VALUES: dict[str, Callable[[Row], Any]] = {
    "hardware": lambda row: row.hardware,
    "chapter": lambda row: row.experiment.chapter,
    "id": lambda row: row.id,
    "slug": lambda row: row.experiment.slug,
    "label": lambda row: row.label,
    "kind": lambda row: row.kind,
    "miniature": lambda row: row.experiment.miniature,
    "gpus": lambda row: row.experiment.world_size,
    "nodes": lambda row: row.experiment.nodes,
    "card": lambda row: row.experiment.card,
    "precision": lambda row: row.experiment.precision,
    "data": lambda row: row.experiment.data,
    "status": lambda row: row.state,
    "as_published": lambda row: row.as_published,
    "steps_done": lambda row: row.steps_done,
    "steps": lambda row: row.experiment.steps,
    "window_first_step": lambda row: row.window and row.window[0],
    "window_last_step": lambda row: row.window and row.window[1],
    "step_ms": lambda row: row.step and row.step.median,
    "step_ms_half_iqr": lambda row: row.step and row.step.half_iqr,
    "step_ms_min": lambda row: row.step and row.step.min,
    "step_ms_max": lambda row: row.step and row.step.max,
    "forward_backward_ms": lambda row: row.result and row.result.forward_backward_ms,
    "optimizer_ms": lambda row: row.result and row.result.optimizer_ms,
    "predicted_step_ms": lambda row: row.predicted_step_ms,
    "published_step_ms": lambda row: row.reference and row.reference.step_ms,
    "step_ratio": lambda row: row.step_ratio,
    "memory_gib": lambda row: row.memory_gib.nvml,
    "reserved_gib": lambda row: row.memory_gib.reserved,
    "allocated_gib": lambda row: row.memory_gib.allocated,
    "published_memory_gib": lambda row: row.reference and row.reference.memory_gib,
    "memory_ratio": lambda row: row.memory_ratio,
    "published_oom": lambda row: row.reference and row.reference.oom,
    "published_as": lambda row: row.reference and row.reference.id,
    "published_ran": lambda row: row.reference and row.reference.ran,
    "published_hardware": lambda row: row.reference and row.reference.hardware,
    "tflops": lambda row: row.tflops,
    "peak_tflops": lambda row: row.peak_tflops,
    "mfu": lambda row: row.mfu,
    "tokens_per_s": lambda row: row.result and row.result.tokens_per_s,
    "loss_first": lambda row: row.result and row.result.loss.first,
    "loss_last": lambda row: row.result and row.result.loss.last,
    "validation_loss": lambda row: row.validation and row.validation.loss,
    "perplexity": lambda row: row.validation and perplexity(row.validation.loss),
    "validation_step": lambda row: row.validation and row.validation.step,
    "resumed_at": lambda row: " ".join(map(str, row.result.resumed_at)) if row.result else "",
    "changed": lambda row: changes_in_words(row.result.changed) if row.result else "",
    "launch_add_us": lambda row: row.launch and row.launch.add_us,
    "launch_operation_us": lambda row: row.launch and row.launch.operation_us,
    "runs_on_node": lambda row: row.runs_on_node,
    "notes": lambda row: "; ".join(_notes(row)),
    "origin": lambda row: str(row.origin),
}
"""Everything about a row as plain values, units in the names: what CSV and JSON hold."""


@dataclass(frozen=True)
class Column:
    """A column for people. Where the terminal is narrow, the least important ones are left out."""

    title: str
    text: Callable[[Row], str]
    importance: int
    left: bool = False


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _ms(value: float | None) -> str:
    return _number(value, 1 if value is not None and value < 1000 else 0)


def _published(row: Row, number: str) -> str:
    if not row.reference:
        return ""
    return "OOM" if row.reference.oom else number + "?" * row.reference.in_doubt


def _window(row: Row) -> str:
    return f"{row.window[0]}-{row.window[1]}" if row.window and row.step else ""


def _loss(row: Row) -> str:
    loss = row.result and row.result.loss
    return (
        f"{loss.first:.3f} → {loss.last:.3f}"
        if loss and None not in (loss.first, loss.last)
        else ""
    )


def _held_out(row: Row) -> str:
    """Loss and perplexity on data that was held out; on mock data only where the run was to reach
    one."""
    if not row.validation or (row.experiment.data == MOCK and not row.experiment.until):
        return ""
    return f"{row.validation.loss:.3f} ({_number(perplexity(row.validation.loss), 1)})"


def _name(row: Row) -> str:
    if row.kind == "run":
        return row.label.removeprefix(f"{row.id}-")
    changes = row.label.rpartition("/")[2].removeprefix(row.id)
    return f"{row.experiment.slug}{changes} (record)"


def _status(row: Row) -> str:
    state, certain = row.state, row.reference and not row.reference.in_doubt
    oom_published = certain and row.reference.oom
    if state == "oom":
        return "OOM as published" if oom_published else "OOM (publ. ran)" if certain else "OOM"
    if state == "ok":
        return "ok (publ. OOM)" if oom_published else "ok"
    word = {"nan": "NaN", "oom-host": "host OOM", "bad-configuration": "bad configuration"}.get(
        state, state
    )
    return f"{word} at {row.steps_done}/{row.experiment.steps}"


_ID = Column("id", lambda row: row.id, 100)
_EXPERIMENT = Column("experiment", _name, 99, left=True)
_STEP = Column("ms/step", lambda row: _ms(row.step and row.step.median), 95)
_SPREAD = Column("±", lambda row: _ms(row.step and row.step.half_iqr), 50)
_STEPS = Column("steps", _window, 40, left=True)
_HELD_OUT = Column("held-out loss (perplexity)", _held_out, 75, left=True)
_SHARED = Column("shared", lambda row: _number(row.runs_on_node), 20)
_DATA = Column("data", lambda row: row.experiment.data, 30, left=True)
_STATUS = Column("status", _status, 98, left=True)

GPU_COLUMNS = (
    _ID,
    _EXPERIMENT,
    Column("GPUs", lambda row: str(row.experiment.world_size), 60),
    Column("GiB", lambda row: _number(row.memory_gib.nvml, 1), 90),
    Column(
        "publ.",
        lambda row: _published(row, _number(row.reference and row.reference.memory_gib, 1)),
        70,
    ),
    Column("ratio", lambda row: _number(row.memory_ratio, 2), 80),
    _STEP,
    _SPREAD,
    Column(
        "publ.", lambda row: _published(row, _number(row.reference and row.reference.step_ms)), 71
    ),
    Column("ratio", lambda row: _number(row.step_ratio, 2), 85),
    Column("formula", lambda row: _ms(row.step and row.predicted_step_ms), 55),
    Column("TFLOP/s", lambda row: _number(row.tflops), 65),
    Column("MFU", lambda row: f"{row.mfu:.1%}" if row.mfu else "", 66),
    _HELD_OUT,
    _STEPS,
    _SHARED,
    _DATA,
    _STATUS,
)
MINIATURE_COLUMNS = (
    _ID,
    _EXPERIMENT,
    Column("ranks", lambda row: str(row.experiment.world_size), 60),
    _STEP,
    _SPREAD,
    _STEPS,
    Column("loss", _loss, 80, left=True),
    _HELD_OUT,
    _SHARED,
    _DATA,
    _STATUS,
)

GAP = "  "
SHORTEST_NAME = 16
MOST_TEXT = 120


@dataclass(frozen=True)
class _Table:
    """Rows on the same hardware, with their notes numbered."""

    title: str
    columns: tuple[Column, ...]
    chapters: tuple[tuple[str, tuple[Row, ...]], ...]
    notes: tuple[str, ...]
    footer: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for _, rows in self.chapters for row in rows)

    def cell(self, column: Column, row: Row) -> str:
        notes = _notes(row) if column is _STATUS else []
        return column.text(row) + "".join(f" [{self.notes.index(note) + 1}]" for note in notes)

    @property
    def remarks(self) -> list[str]:
        return [*(f"[{number}] {note}" for number, note in enumerate(self.notes, 1)), *self.footer]


def render(
    rows: Sequence[Row],
    format: str = "terminal",
    width: int = 100,
    *,
    colour: bool = False,
    titles: Mapping[int, str] | None = None,
) -> str:
    """The rows as text without a final newline, one table for each hardware and upstream version,
    miniatures last.

    Args:
        format: ``terminal``, ``markdown``, ``csv`` (one line a row) or ``json`` (a list of
        objects).
        width: columns of the terminal; what does not fit is left out, and named.
        colour: paint headings and verdicts with ANSI codes (``terminal`` only).
        titles: titles of the chapters by number.

    Raises:
        UserError: the format is unknown.
    """
    overrides.choice("FORMAT", format, FORMATS)
    if format == "json":
        return json.dumps([values(row) for row in rows], indent=1)
    if format == "csv":
        return _csv(rows)
    kinds = [(kind, list(group)) for kind, group in groupby(sorted(rows, key=_order), key=_kind)]
    hardware = [kind[0] for kind, _ in kinds]
    tables = [_table(group, titles or {}, hardware.count(kind[0]) > 1) for kind, group in kinds]
    if format == "markdown":
        return "\n\n".join(map(_markdown, tables)) or NOTHING
    return "\n\n".join(_terminal(table, width, colour) for table in tables) or NOTHING


def values(row: Row) -> dict[str, Any]:
    """Everything about a row as plain values (see VALUES)."""
    return {name: value(row) for name, value in VALUES.items()}


def render_compare(a: Row, b: Row, format: str = "terminal") -> str:
    """Two runs: the settings that differ, their numbers with the ratio B/A, and whether their
    losses agree.

    Raises:
        UserError: the format is unknown, or cannot show this (CSV).
    """
    overrides.choice("FORMAT", format, [name for name in FORMATS if name != "csv"])
    settings = {
        key: pair for key, pair in _pairs(_settings(a), _settings(b)).items() if pair[0] != pair[1]
    }
    numbers = {
        key: pair for key, pair in _pairs(_numbers(a), _numbers(b)).items() if pair != (None, None)
    }
    losses_differ, sentence = _agreement(losses(a), losses(b))
    if format == "json":
        return json.dumps(
            {
                "a": a.label,
                "b": b.label,
                "settings": {key: {"a": x, "b": y} for key, (x, y) in settings.items()},
                "numbers": {
                    key: {"a": x, "b": y, "ratio": _ratio(x, y)} for key, (x, y) in numbers.items()
                },
                "loss_largest_relative_difference": losses_differ,
            },
            indent=1,
        )
    head = ("", f"A  {a.label}", f"B  {b.label}", "B/A")
    lines = [(key, _plain(x), _plain(y), "") for key, (x, y) in settings.items()]
    lines += [
        (key, _plain(x), _plain(y), _number(_ratio(x, y), 3)) for key, (x, y) in numbers.items()
    ]
    remarks = [sentence] if settings else ["settings: the same", sentence]
    if a.hardware != b.hardware:
        remarks.append(
            f"Different hardware ({a.hardware}, {b.hardware}): times and memory do not compare."
        )
    if a.software != b.software:
        remarks.append(
            f"Different upstream ({a.software}, {b.software}): times and memory do not compare."
        )
    if rates := launch_rate_remark(b, a):
        remarks.append(rates)
    if format == "markdown":
        return "\n".join([markdown.table(head, lines, "lrrr"), "", *remarks])
    text_width = min(screen.width(piped=MOST_TEXT), MOST_TEXT)
    return "\n".join(
        [
            *screen.grid([head, *lines]),
            "",
            *(text for remark in remarks for text in _wrap(remark, text_width)),
        ]
    )


def print_table(outdir: Path, records_dir: Path, settings: Mapping[str, str]) -> int:
    """``make table``: print the rows of CHAPTER, ID and HARDWARE, in FORMAT, AGAINST a group of
    references.

    Returns the exit status: 1 where there is no row at all. Raises UserError where the settings
    choose none.
    """
    chapter = settings.get("CHAPTER")
    if chapter and not chapter.isdecimal():
        raise UserError(f"CHAPTER={chapter}: expected a number, such as 400")
    ids = settings.get("ID", "").replace(",", " ").split()
    results = _collect(outdir, records_dir, settings.get("AGAINST"))
    rows = results.select(chapter and int(chapter), ids, settings.get("HARDWARE")).rows
    width, colour = screen.width(piped=1000), screen.colour()
    print(
        render(
            rows,
            settings.get("FORMAT", "terminal"),
            width,
            colour=colour,
            titles=load_catalog().chapters,
        )
    )
    return 0 if rows else 1


def print_compare(outdir: Path, records_dir: Path, settings: Mapping[str, str]) -> int:
    """``make compare A=… B=…``. Raises UserError where one of them is not there."""
    results = _collect(outdir, records_dir)
    a, b = (results.find(settings[key]) for key in "AB")
    print(render_compare(a, b, settings.get("FORMAT", "terminal")))
    return 0


def _collect(outdir: Path, records_dir: Path, against: str | None = None) -> Results:
    results = collect(outdir, records_dir, load_references(), against)
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return results


def _order(row: Row) -> tuple[bool, str, str, int, str, str]:
    return row.device == "cpu", *_kind(row), row.experiment.chapter, row.id, row.label


def _kind(row: Row) -> tuple[str, str]:
    """Rows of another kind are never in the same column."""
    return row.hardware, row.software


def _table(rows: list[Row], titles: Mapping[int, str], name_software: bool) -> _Table:
    first = rows[0]
    kind = f"{first.hardware}, {first.software}" if name_software else first.hardware
    columns = MINIATURE_COLUMNS if first.device == "cpu" else GPU_COLUMNS
    chapters = groupby(rows, key=lambda row: row.experiment.chapter)
    return _Table(
        title=f"{kind} (not comparable with GPU runs)" if first.device == "cpu" else kind,
        columns=tuple(column for column in columns if any(map(column.text, rows))),
        chapters=tuple((f"{n} {titles.get(n, '')}".strip(), tuple(group)) for n, group in chapters),
        notes=tuple(dict.fromkeys(note for row in rows for note in _notes(row))),
        footer=tuple(_footer(rows)),
    )


def _notes(row: Row) -> list[str]:
    """What a reader must know about this row alone."""
    e, result = row.experiment, row.result
    remarks = row.published.remarks if row.published else ()
    found = [f"{row.id}: {'; '.join(remarks)}"] if remarks else []
    if result and row.state != "ok" and not (row.state == "oom" and row.as_published):
        where = "" if result.rank is None else f"rank {result.rank}: "
        said = "; ".join(filter(None, (result.detail, result.advice)))
        found.append(f"{row.label}: {where}{' '.join(said.split())}")
    if row.other_memory_decided:
        than = "less than published" if row.state == "oom" else "more than published"
        emulate = "" if row.state == "oom" else f"; CARD={row.against.gpu} emulates that card"
        found.append(f"{row.memory_mib:,} MiB here, {than}{emulate}")
    if row.state == "ok" and row.device == "cuda" and row.memory_gib.nvml is None:
        found.append(f"{row.label}: NVML could not be read: the used memory is unknown")
    if e.card:
        found.append(f"CARD={e.card}: memory capped as on that card")
    if row.result and row.result.mixed:
        found.append(f"{row.label}: {changes_in_words(row.result.mixed)}")
    elif not row.against and not e.miniature:
        changed = " ".join(f"{key}={value}" for key, value in e.overrides.items())
        found.append(f"{changed}: not the published work, so nothing to compare with")
    return found


def _footer(rows: list[Row]) -> Iterable[str]:
    """What a reader must know about the columns: windows, formulas with their values, sources."""
    if any(row.step for row in rows):
        yield (
            "ms/step: median over the steps named in column steps; ±: half their interquartile"
            " range."
        )
    if any((row.runs_on_node or 1) > 1 for row in rows):
        yield (
            "shared: runs on the node at the same time, this one included; they can slow each other"
            " down."
        )
    if any(row.memory_gib.nvml for row in rows):
        yield (
            "GiB: used memory of the fullest GPU as nvidia-smi shows it, CUDA context and NCCL"
            " included."
        )
    if any(row.counts_driver for row in rows):
        yield (
            "Runs whose result.json has no memory_gib.driver count in GiB what the driver keeps"
            f" for itself, too, {DRIVER_RESERVED_MIB / 1024:.1f} GiB of an H200; nvidia-smi leaves"
            " that out."
        )
    if any(row.step and row.predicted_step_ms for row in rows):
        yield (
            "formula: ms/step predicted from sizes, by constants fitted without the row (make"
            " speed-101)."
        )
    for gpu, precision in dict.fromkeys(
        (row.gpu, row.experiment.precision) for row in rows if row.mfu
    ):
        yield (
            f"MFU = TFLOP/s / {getattr(gpu, precision):g}, the dense {precision} peak of {gpu.name}"
            f" ({gpu.source}). TFLOP/s: per GPU, {MODEL_FLOPS}."
        )
    if any(row.tflops and not row.mfu for row in rows if row.device == "cuda"):
        yield (
            f"No MFU: harness/experiment/hardware.py has no peak of {rows[0].hardware} at the"
            " precision of these runs."
        )
    timed = sorted(
        (row for row in rows if row.launch and row.step), key=lambda row: row.launch.operation_us
    )
    if timed and (rates := launch_rate_remark(timed[-1], timed[0])):
        yield rates
    if group := next((row.against for row in rows if row.reference), None):
        yield f"Here: {rows[0].hardware}, {rows[0].software}."
        yield f"publ.: {group.hardware}, {group.software}; {group.method}. Source: {group.source}."
        yield "ratio: here / publ." + " A number with ? is in doubt and gets no ratio." * _doubt(
            rows
        )
    replaced = dict.fromkeys(
        row.experiment.published_data for row in rows if row.reference and _is_mock(row)
    )
    if replaced:
        yield (
            f"data mock: synthetic tokens in place of {', '.join(replaced)}: "
            "time and memory compare, losses do not."
        )
    if (found := ended(rows)).experiments:
        yield (
            f"Ended as published: {found.as_published} of the {found.experiments} with a"
            " published row"
            + f", {found.out_of_memory} of them out of memory" * (found.out_of_memory > 0)
            + "."
        )


def _is_mock(row: Row) -> bool:
    return row.experiment.data == MOCK and row.experiment.published_data is not None


def _doubt(rows: list[Row]) -> bool:
    return any(row.reference and row.reference.in_doubt for row in rows)


def _terminal(table: _Table, width: int, colour: bool) -> str:
    columns = list(table.columns)
    sizes = {
        id(c): max(len(c.title), *(len(table.cell(c, row)) for row in table.rows)) for c in columns
    }
    shortest = min(sizes[id(_EXPERIMENT)], SHORTEST_NAME)

    def beside_name() -> int:
        return sum(sizes[id(c)] + len(GAP) for c in columns if c is not _EXPERIMENT)

    left_out = []
    while beside_name() + shortest > width and len(columns) > 4:
        left_out.append(min(columns, key=lambda column: column.importance))
        columns.remove(left_out[-1])
    sizes[id(_EXPERIMENT)] = max(min(sizes[id(_EXPERIMENT)], width - beside_name()), shortest)

    def line(cells: Iterable[str]) -> str:
        fitted = (_fit(cell, sizes[id(c)], c.left) for c, cell in zip(columns, cells, strict=True))
        return GAP.join(fitted).rstrip()

    out = [
        screen.paint(head, screen.BOLD, colour)
        for head in (table.title, line(c.title for c in columns))
    ]
    for title, rows in table.chapters:
        out.append(title)
        for row in rows:
            text, status = line(table.cell(c, row) for c in columns), table.cell(_STATUS, row)
            verdict = {True: screen.GREEN, False: screen.RED}.get(row.as_published, "")
            out.append(text.removesuffix(status) + screen.paint(status, verdict, colour))
    remarks = table.remarks
    if left_out:
        titles = ", ".join(dict.fromkeys(column.title for column in left_out))
        remarks.append(f"Left out at {width} columns: {titles}. FORMAT=markdown has all.")
    text_width = min(width, MOST_TEXT)
    return "\n".join(
        [*out, "", *(text for remark in remarks for text in _wrap(remark, text_width))]
    )


def _markdown(table: _Table) -> str:
    out = [f"### {table.title}"]
    for title, rows in table.chapters:
        head = [column.title for column in table.columns]
        lines = [[table.cell(column, row) for column in table.columns] for row in rows]
        sides = ["l" if column.left else "r" for column in table.columns]
        out += ["", f"**{title}**", "", markdown.table(head, lines, sides)]
    return "\n".join([*out, "", *(f"- {remark}" for remark in table.remarks)])


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, VALUES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(values, rows))
    return out.getvalue().rstrip("\n")


def _fit(text: str, size: int, left: bool) -> str:
    text = text if len(text) <= size else text[: size - 1] + "…"
    return text.ljust(size) if left else text.rjust(size)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _settings(row: Row) -> dict[str, Any]:
    """Settings with what they ran on, flat."""
    settings = row.experiment.model_dump(
        mode="json", exclude={"id", "slug", "chapter", "shows", "overrides"}
    )
    model, extra = settings.pop("model"), settings.pop("extra_args")
    upstream = row.result.upstream if row.result else None
    return {
        "experiment": row.experiment.name,
        **{f"model.{key}": value for key, value in model.items()},
        **settings,
        "extra_args": " ".join(extra),
        "hardware": row.hardware,
        "upstream": upstream and f"{upstream.version} ({upstream.source})",
        "status": row.state,
    }


def _numbers(row: Row) -> dict[str, float | None]:
    names = (
        "step_ms",
        "step_ms_half_iqr",
        "memory_gib",
        "reserved_gib",
        "allocated_gib",
        "tflops",
        "mfu",
        "tokens_per_s",
        "steps_done",
        "loss_first",
        "loss_last",
        "validation_loss",
        "perplexity",
        "launch_add_us",
        "launch_operation_us",
    )
    return {name: VALUES[name](row) for name in names}


def _agreement(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float | None, str]:
    """The largest relative difference of two loss curves over their common steps, and a sentence
    about it."""
    common = sorted(a.keys() & b.keys())
    if not common:
        return None, "losses: no step in common"
    differences = {step: abs(a[step] - b[step]) / (abs(a[step]) or 1.0) for step in common}
    worst = max(common, key=differences.__getitem__)
    largest = f"{differences[worst]:.1e}"
    first = next((step for step in common if differences[step] > SAME_LOSS), None)
    steps = f"steps {common[0]} to {common[-1]}"
    if first is None:
        return (
            differences[worst],
            f"losses: equal over {steps} (largest relative difference {largest})",
        )
    return (
        differences[worst],
        (
            f"losses: apart from step {first} on; over {steps} the largest relative difference is"
            f" {largest}, at step {worst} (equal means {SAME_LOSS:.0e} or less)"
        ),
    )


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in a | b}


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.5g}"
    return "-" if value in (None, "") else str(value)
