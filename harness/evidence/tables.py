"""Tables of rows: for the terminal, as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from harness import RECORDS
from harness.errors import UserError
from harness.evidence import markdown
from harness.evidence.columns import (
    EXPERIMENT,
    GPU_COLUMNS,
    MINIATURE_COLUMNS,
    STATUS,
    VALUES,
    Column,
    notes,
    values,
)
from harness.evidence.footnotes import footnotes
from harness.evidence.references import load_references
from harness.evidence.results import Results, collect
from harness.evidence.rows import Row
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.run import finding
from harness.system import screen

FORMATS = ("terminal", "markdown", "csv", "json")
NOTHING = "no runs yet: make 101"
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
        marks = notes(row) if column is STATUS else []
        return column.text(row) + "".join(f" [{self.notes.index(mark) + 1}]" for mark in marks)

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
    """The rows as text without a final newline, miniatures last.

    Each hardware and upstream version has a table of its own.

    Args:
        format: ``terminal``, ``markdown``, ``csv`` (one line a row) or ``json`` (a list of
        objects).
        width: columns of the terminal; what does not fit is left out, and named.
        colour: paint headings and verdicts with ANSI codes (``terminal`` only).
        titles: titles of the chapters by number.

    Raises:
        UserError: the format is unknown.
    """
    command_line.choice("FORMAT", format, FORMATS)
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


def print_table(settings: Mapping[str, str]) -> int:
    """``make table``: print the rows that ``settings`` choose; return 1 where there is no run.

    ``settings``: OUTDIR, CHAPTER, ID, HARDWARE, FORMAT, AGAINST (another group of references).
    Raises UserError where the settings choose none.
    """
    chapter = settings.get("CHAPTER")
    if chapter and not chapter.isdecimal():
        raise UserError(f"CHAPTER={chapter}: expected a number, such as 400")
    ids = settings.get("ID", "").replace(",", " ").split()
    results = collect_warned(settings)
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


def wrap(text: str, width: int) -> list[str]:
    """The lines of a paragraph; all but the first are indented."""
    return textwrap.wrap(
        text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def collect_warned(settings: Mapping[str, str]) -> Results:
    """All rows; print a warning for each file that could not be read."""
    outdir = finding.outdir(settings)
    results = collect(outdir, RECORDS, load_references(), settings.get("AGAINST"))
    for warning in results.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return results


def _order(row: Row) -> tuple[bool, str, str, int, str, str]:
    return row.device == "cpu", *_kind(row), row.experiment.chapter, row.id, row.label


def _kind(row: Row) -> tuple[str, str]:
    """Rows of different kinds never share a table."""
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
        notes=tuple(dict.fromkeys(note for row in rows for note in notes(row))),
        footer=tuple(footnotes(rows)),
    )


def _terminal(table: _Table, width: int, colour: bool) -> str:
    columns = list(table.columns)
    sizes = {
        id(c): max(len(c.title), *(len(table.cell(c, row)) for row in table.rows)) for c in columns
    }
    shortest = min(sizes[id(EXPERIMENT)], SHORTEST_NAME)

    def beside_name() -> int:
        return sum(sizes[id(c)] + len(GAP) for c in columns if c is not EXPERIMENT)

    left_out = []
    while beside_name() + shortest > width and len(columns) > 4:
        left_out.append(min(columns, key=lambda column: column.importance))
        columns.remove(left_out[-1])
    sizes[id(EXPERIMENT)] = max(min(sizes[id(EXPERIMENT)], width - beside_name()), shortest)

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
            text, status = line(table.cell(c, row) for c in columns), table.cell(STATUS, row)
            verdict = {True: screen.GREEN, False: screen.RED}.get(row.as_published, "")
            out.append(text.removesuffix(status) + screen.paint(status, verdict, colour))
    remarks = table.remarks
    if left_out:
        titles = ", ".join(dict.fromkeys(column.title for column in left_out))
        remarks.append(f"Left out at {width} columns: {titles}. FORMAT=markdown has all.")
    text_width = min(width, MOST_TEXT)
    return "\n".join([*out, "", *(text for remark in remarks for text in wrap(remark, text_width))])


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
