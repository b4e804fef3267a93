"""Claims as people and programs read them: terminal, Markdown, JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError, nearest
from harness.evidence import markdown
from harness.evidence.claims import Evaluated, Side, evaluate, load_claims, sources
from harness.evidence.expressions import spell
from harness.evidence.quantities import NumberSource, unit_of
from harness.evidence.references import load_references
from harness.evidence.results import collect_records
from harness.evidence.tables import MOST_TEXT
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.system import screen

FORMATS = ("terminal", "markdown", "json")
COLOURS = {"holds": screen.GREEN, "fails": screen.RED}
PLURALS = {
    "holds": "hold",
    "fails": "fail",
    "undecided": "undecided",
    "not measured": "not measured",
}
INDENT = "  "


def render(
    found: Sequence[Evaluated],
    sources: Sequence[NumberSource],
    format: str = "terminal",
    width: int = 100,
    *,
    colour: bool = False,
    titles: Mapping[int, str] | None = None,
) -> str:
    """The claims by chapter as text without a final newline.

    Args:
        format: ``terminal``, ``markdown`` (a table for each chapter) or ``json`` (a list of
        objects).
        width: columns of the terminal.
        colour: paint verdicts with ANSI codes (``terminal`` only).
        titles: titles of the chapters by number.

    Raises:
        UserError: the format is unknown.
    """
    command_line.choice("FORMAT", format, FORMATS)
    if format == "json":
        return json.dumps(values(found, sources), indent=1)
    chapters = {}
    for one in found:
        chapters.setdefault(one.claim.chapter, []).append(one)
    named = {
        f"{number} {(titles or {}).get(number, '')}".strip(): chapters[number]
        for number in sorted(chapters)
    }
    names = _names(sources)
    if format == "markdown":
        parts = [_markdown(title, ones, sources, names) for title, ones in named.items()]
    else:
        width = min(width, MOST_TEXT)
        parts = [
            _terminal(title, ones, sources, names, width, colour) for title, ones in named.items()
        ]
    summary = _summary(found, sources, names, "- " if format == "markdown" else "")
    if format == "terminal":
        summary = [
            text
            for line in summary
            for text in textwrap.wrap(line, width, subsequent_indent=INDENT)
        ]
    return "\n\n".join([*parts, "\n".join(summary)])


def print_claims(records: Path, settings: Mapping[str, str]) -> int:
    """``make claims``: how every claim stands on our records and on the published table.

    ``settings``: CHAPTER, HARDWARE, AGAINST (another group of references), FORMAT.

    Returns 0 whenever the claims could be evaluated: one that fails is a finding, not an error.
    Raises UserError where claims.yaml is wrong or the settings choose nothing.
    """
    catalog, references = load_catalog(), load_references()
    group = references.group(settings["AGAINST"]) if "AGAINST" in settings else references.published
    kept = collect_records(records, references, group.name)
    for warning in kept.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    columns = sources(
        kept.select(hardware=settings.get("HARDWARE")).rows, catalog, references, group
    )
    wanted, chapter = load_claims(catalog), settings.get("CHAPTER")
    chapters = sorted({str(claim.chapter) for claim in wanted})
    if chapter is not None and chapter not in chapters:
        raise UserError(f"no claims of chapter {chapter}; {nearest(chapter, chapters)}")
    found = evaluate([claim for claim in wanted if chapter in (None, str(claim.chapter))], columns)
    width, colour = screen.width(piped=MOST_TEXT), screen.colour()
    print(
        render(
            found,
            columns,
            settings.get("FORMAT", "terminal"),
            width,
            colour=colour,
            titles=catalog.chapters,
        )
    )
    return 0


def _names(sources: Sequence[NumberSource]) -> list[str]:
    """Short names of the columns: ``ours`` and ``published``, with the hardware where there are
    several of ours."""
    ours = sum(source.key == "ours" for source in sources)
    return [source.title if source.key == "ours" and ours > 1 else source.key for source in sources]


def _terminal(
    title: str,
    ones: Sequence[Evaluated],
    sources: Sequence[NumberSource],
    names: Sequence[str],
    width: int,
    colour: bool,
) -> str:
    out = [screen.paint(title, screen.BOLD, colour)]
    column = max(map(len, names))
    for one in ones:
        claim = one.claim
        out += ["", *textwrap.wrap(f"{claim.name}: {claim.says}", width)]
        out += textwrap.wrap(
            f"{claim.formula.text} must be {claim.bound.text}",
            width,
            initial_indent=INDENT,
            subsequent_indent=2 * INDENT,
            break_long_words=False,
        )
        for source, name, side in zip(sources, names, one.sides, strict=True):
            start, hang = f"{INDENT}{name:{column}}  ", " " * (len(INDENT) + column + 2)
            line = f"{start}{_verdict(side)}{INDENT}{_numbers(side)}".rstrip()
            wrapped = textwrap.wrap(
                line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False
            )
            painted = screen.paint(side.verdict, COLOURS.get(side.verdict, ""), colour)
            out += [wrapped[0].replace(f"  {side.verdict}", f"  {painted}", 1), *wrapped[1:]]
            if reason := _reason(one, source, side):
                out += textwrap.wrap(
                    f"because {reason}", width, initial_indent=hang, subsequent_indent=hang
                )
    return "\n".join(out)


def _markdown(
    title: str, ones: Sequence[Evaluated], sources: Sequence[NumberSource], names: Sequence[str]
) -> str:
    """A table of those columns in which something is measured; the others have their line below
    it."""
    shown = [i for i in range(len(names)) if any(one.sides[i].value is not None for one in ones)]
    lines, reasons = [], []
    for one in ones:
        cells = [_cell(one, one.sides[i]) for i in shown]
        lines.append(
            [
                f"`{one.claim.name}` {one.claim.says}",
                f"`{one.claim.formula.text}` {one.claim.bound.text}",
                *cells,
            ]
        )
        for source, name, side in zip(sources, names, one.sides, strict=True):
            if reason := _reason(one, source, side):
                reasons.append(f"- {one.claim.name} {side.verdict} ({name}): {reason}")
    table = markdown.table(
        ["claim", "must hold", *(names[i] for i in shown)], lines, "l" * (2 + len(shown))
    )
    return "\n".join([f"**{title}**", "", table, *([""] if reasons else []), *reasons])


def _cell(one: Evaluated, side: Side) -> str:
    """The verdict, and what the formula does not say: what was measured in place of its
    experiments, and remarks."""
    if side.value is None:
        doubts = [experiment for experiment in side.missing if "(" in experiment]
        return f"{side.verdict}: {', '.join(doubts)}" if doubts else side.verdict
    others = dict.fromkeys(
        quantity.of for quantity in side.numbers if f"[{quantity.of}]" not in one.claim.formula.text
    )
    said = "; ".join([*([f"by {', '.join(others)}"] if others else []), *side.remarks])
    return f"**{_verdict(side)}**" + f" ({said})" * bool(said)


def _summary(
    found: Sequence[Evaluated], sources: Sequence[NumberSource], names: Sequence[str], bullet: str
) -> list[str]:
    out = []
    for index, (source, name) in enumerate(zip(sources, names, strict=True)):
        said = counted(one.sides[index] for one in found)
        out.append(f"{bullet}{name}: {said}" + f" ({source.title})" * (source.title != name))
    if bullet:
        out.append(
            f"{bullet}by: measured with these in place of the formula's; `make claims` prints every"
            " number"
        )
    out.append(
        f"{bullet}±: twice the standard uncertainty; undecided: what must hold begins within it."
        " Published numbers state none."
    )
    return out


def counted(sides: Iterable[Side]) -> str:
    """The number of sides with each verdict: ``30 hold, 5 fail``."""
    count = Counter(side.verdict for side in sides)
    return ", ".join(
        f"{count[verdict]} {plural}" for verdict, plural in PLURALS.items() if count[verdict]
    )


def _verdict(side: Side) -> str:
    if side.value is None:
        return side.verdict
    return f"{side.verdict} " + (
        f"{side.value:.3f} ± {side.spread:.3f}" if side.spread else _short(side.value)
    )


def _numbers(side: Side) -> str:
    """What the value was made of, or what is missing: ``step_ms: 2,920 [401], 875 [408]``."""
    if side.value is None:
        return ", ".join(side.missing).replace(", or ", " or ")
    by_name: dict[str, list[str]] = {}
    for quantity, value in side.numbers.items():
        by_name.setdefault(quantity.name, []).append(f"{_short(value)} [{quantity.of}]")
    return "; ".join(
        [*(f"{name}: {', '.join(values)}" for name, values in by_name.items()), *side.remarks]
    )


def _reason(one: Evaluated, source: NumberSource, side: Side) -> str | None:
    return one.claim.reason.get(source.key) if side.verdict in ("fails", "undecided") else None


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return f"{value:.0f}"
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def values(found: Sequence[Evaluated], sources: Sequence[NumberSource]) -> list[dict[str, Any]]:
    """The claims as plain values, as JSON has them."""
    return [_values(one, sources) for one in found]


def _values(one: Evaluated, sources: Sequence[NumberSource]) -> dict[str, Any]:
    claim = one.claim
    return {
        "name": claim.name,
        "chapter": claim.chapter,
        "says": claim.says,
        "formula": claim.formula.text,
        "must": claim.bound.text,
        "unit": spell(claim.bound.unit),
        "sides": [
            {
                "source": source.key,
                "title": source.title,
                "verdict": side.verdict,
                "value": side.value,
                "spread": side.spread,
                "reason": _reason(one, source, side),
                "missing": list(side.missing),
                "remarks": list(side.remarks),
                "numbers": [
                    {
                        "quantity": quantity.name,
                        "of": quantity.of,
                        "value": value,
                        "unit": spell(unit_of(quantity.name)),
                    }
                    for quantity, value in side.numbers.items()
                ],
            }
            for source, side in zip(sources, one.sides, strict=True)
        ],
    }
