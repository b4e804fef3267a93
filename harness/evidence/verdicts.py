"""Evaluated claims as text: for the terminal, as Markdown or JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from harness import RECORDS
from harness.errors import UserError, nearest
from harness.evidence import markdown
from harness.evidence.claims import Evaluated, Side, evaluate, load_claims, sources
from harness.evidence.expressions import spell
from harness.evidence.quantities import unit_of
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
    format: str = "terminal",
    width: int = 100,
    *,
    colour: bool = False,
    titles: Mapping[int, str] | None = None,
) -> str:
    """The claims by chapter, without a final newline.

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
        return json.dumps(values(found), indent=1)
    chapters: dict[int, list[Evaluated]] = {}
    for one in found:
        chapters.setdefault(one.claim.chapter, []).append(one)
    named = {
        f"{number} {(titles or {}).get(number, '')}".strip(): chapters[number]
        for number in sorted(chapters)
    }
    if format == "markdown":
        parts = [_markdown(title, ones) for title, ones in named.items()]
        return "\n\n".join([*parts, "\n".join(_summary(found, "- "))])
    width = min(width, MOST_TEXT)
    parts = [_terminal(title, ones, width, colour) for title, ones in named.items()]
    summary = (textwrap.wrap(line, width, subsequent_indent=INDENT) for line in _summary(found, ""))
    return "\n\n".join([*parts, "\n".join(chain.from_iterable(summary))])


def print_claims(settings: Mapping[str, str]) -> int:
    """``make claims``: how every claim stands on our records and on the published table.

    ``settings``: CHAPTER, HARDWARE, AGAINST (another group of references), FORMAT.

    Returns 0 whenever the claims could be evaluated: one that fails is a finding, not an error.
    Raises UserError where claims.yaml is wrong or the settings choose nothing.
    """
    catalog, references = load_catalog(), load_references()
    group = references.group(settings["AGAINST"]) if "AGAINST" in settings else references.published
    kept = collect_records(RECORDS, references, group.name)
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
            settings.get("FORMAT", "terminal"),
            width,
            colour=colour,
            titles=catalog.chapters,
        )
    )
    return 0


def values(found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """The claims as plain values, for JSON."""
    return list(map(_values, found))


def counted(sides: Iterable[Side]) -> str:
    """The number of sides with each verdict: ``30 hold, 5 fail``."""
    count = Counter(side.verdict for side in sides)
    return ", ".join(
        f"{count[verdict]} {plural}" for verdict, plural in PLURALS.items() if count[verdict]
    )


def _named(one: Evaluated) -> list[tuple[str, Side]]:
    """The sides by name: ``published``, and ``ours`` or, where there are several, its title."""
    several = sum(side.source.key == "ours" for side in one.sides) > 1
    return [
        (side.source.title if several and side.source.key == "ours" else side.source.key, side)
        for side in one.sides
    ]


def _terminal(title: str, ones: Sequence[Evaluated], width: int, colour: bool) -> str:
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    column = max(len(name) for name, _ in _named(ones[0]))
    hang = " " * (len(INDENT) + column + 2)
    out = [screen.paint(title, screen.BOLD, colour)]
    for one in ones:
        claim = one.claim
        out += ["", *wrap(f"{claim.name}: {claim.says}")]
        must = f"{claim.formula.text} must be {claim.bound.text}"
        out += wrap(must, initial_indent=INDENT, subsequent_indent=2 * INDENT)
        for name, side in _named(one):
            line = f"{INDENT}{name:{column}}  {_verdict(side)}{INDENT}{_numbers(side)}"
            first, *rest = wrap(line.rstrip(), subsequent_indent=hang)
            painted = screen.paint(side.verdict, COLOURS.get(side.verdict, ""), colour)
            out += [first.replace(f"  {side.verdict}", f"  {painted}", 1), *rest]
            if reason := _reason(one, side):
                out += wrap(f"because {reason}", initial_indent=hang, subsequent_indent=hang)
    return "\n".join(out)


def _markdown(title: str, ones: Sequence[Evaluated]) -> str:
    """A table of the columns with a measured value, and below it the reasons of failures."""
    names = [name for name, _ in _named(ones[0])]
    shown = [i for i in range(len(names)) if any(one.sides[i].value is not None for one in ones)]
    lines, reasons = [], []
    for one in ones:
        claim = one.claim
        words = [f"`{claim.name}` {claim.says}", f"`{claim.formula.text}` {claim.bound.text}"]
        lines.append([*words, *(_cell(one, one.sides[i]) for i in shown)])
        for name, side in _named(one):
            if reason := _reason(one, side):
                reasons.append(f"- {claim.name} {side.verdict} ({name}): {reason}")
    head = ["claim", "must hold", *(names[i] for i in shown)]
    table = markdown.table(head, lines, "l" * len(head))
    return "\n".join([f"**{title}**", "", table, *([""] if reasons else []), *reasons])


def _cell(one: Evaluated, side: Side) -> str:
    """The verdict with its value; experiments that stood in for the formula's; remarks."""
    if side.value is None:
        doubts = [experiment for experiment in side.missing if "(" in experiment]
        return f"{side.verdict}: {', '.join(doubts)}" if doubts else side.verdict
    others = dict.fromkeys(
        quantity.of for quantity in side.numbers if f"[{quantity.of}]" not in one.claim.formula.text
    )
    said = "; ".join([*([f"by {', '.join(others)}"] if others else []), *side.remarks])
    return f"**{_verdict(side)}**" + f" ({said})" * bool(said)


def _summary(found: Sequence[Evaluated], bullet: str) -> list[str]:
    out = []
    for named in zip(*map(_named, found), strict=True):
        name, title = named[0][0], named[0][1].source.title
        said = counted(side for _, side in named)
        out.append(f"{bullet}{name}: {said}" + f" ({title})" * (title != name))
    if bullet:
        out.append(
            f"{bullet}by: measured with these in place of the formula's experiments;"
            " `make claims` prints every number"
        )
    out.append(
        f"{bullet}±: twice the standard uncertainty; undecided: the bound holds in a part of that"
        " range. Published numbers state no uncertainty."
    )
    return out


def _verdict(side: Side) -> str:
    if side.value is None:
        return side.verdict
    return f"{side.verdict} " + (
        f"{side.value:.3f} ± {side.spread:.3f}" if side.spread else _short(side.value)
    )


def _numbers(side: Side) -> str:
    """The numbers behind the value, or those missing: ``step_ms: 2,920 [401], 875 [408]``."""
    if side.value is None:
        return ", ".join(side.missing).replace(", or ", " or ")
    by_name: dict[str, list[str]] = {}
    for quantity, value in side.numbers.items():
        by_name.setdefault(quantity.name, []).append(f"{_short(value)} [{quantity.of}]")
    return "; ".join(
        [*(f"{name}: {', '.join(values)}" for name, values in by_name.items()), *side.remarks]
    )


def _reason(one: Evaluated, side: Side) -> str | None:
    return one.claim.reason.get(side.source.key) if side.verdict in ("fails", "undecided") else None


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return f"{value:.0f}"
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _values(one: Evaluated) -> dict[str, Any]:
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
                "source": side.source.key,
                "title": side.source.title,
                "verdict": side.verdict,
                "value": side.value,
                "spread": side.spread,
                "reason": _reason(one, side),
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
            for side in one.sides
        ],
    }
