"""Figures as SVG files for `make plots` and docs/: self-contained, light and dark, reproducible."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from harness import RECORDS, ROOT
from harness.errors import UserError
from harness.evidence import results
from harness.evidence.references import load_references
from harness.experiment.catalog import load_catalog
from harness.pages import figures, schedules
from harness.pages.axes import ticks
from harness.pages.figures import Curve, Figure, Panel, Series
from harness.pages.schedules import Schedule
from harness.run import finding
from harness.system import screen
from harness.system.files import told_if_unwritable, write_text

IMAGES = ROOT / "docs" / "images"

HUES = 5
"""Okabe and Ito's, which colour-blind readers can distinguish: ``.c0`` to ``.c4`` in plots.css.

Their contrast is 4.5 or more, on white and on near-black.
"""

WIDTH, PANEL_HEIGHT, COLUMNS = 760, 272, 2
LEFT, RIGHT, TOP, BOTTOM, FOR_OOM = 58, 14, 54, 62, 26
LINE = 15
ASIDE = {"here": -8, "half": 0, "published": 8, "reference": 8}
"""Horizontal shift in pixels of markers that share a tick."""

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


def draw(settings: Mapping[str, str]) -> int:
    """``make plots``: draw the plots of runs and records as SVG files."""
    outdir = finding.outdir(settings)
    folder = outdir / "plots"
    drawn, warnings = pictures(outdir, RECORDS)
    for warning in warnings:
        print(warning, file=sys.stderr)
    write(folder, drawn)
    screen.say(f"{len(drawn)} pictures in {folder}: {', '.join(drawn)}")
    return 0


def pictures(outdir: Path | None, records: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """SVG by file name of every figure that runs and records allow, and warnings.

    Each warning names a file that could not be read.

    Args:
        outdir: None draws from records alone.

    Raises:
        UserError: experiments/plots.yaml, the catalogue or the references are wrong.
    """
    references, catalog = load_references(), load_catalog()
    found = (
        results.collect(outdir, records, references)
        if outdir
        else results.collect_records(records, references)
    )
    drawn = {figure.name: sweep(figure) for figure in figures.sweeps(found, references, catalog)}
    pipelines = schedules.pair(catalog, schedules.load_profiles(outdir, records))
    drawn |= {schedule.name: timeline(schedule) for schedule in pipelines}
    for chapter, title in catalog.chapters.items():
        curves = figures.loss_curves(
            row for row in found.rows if row.experiment.chapter == chapter and row.state == "ok"
        )
        long = [curve for curve in curves if curve.steps[-1] >= figures.LONG_STEPS]
        if long:
            drawn[f"{chapter}-loss"] = loss(f"Training loss: {title}", long)
    return {f"{name}.svg": svg for name, svg in drawn.items()}, found.warnings


def write(folder: Path, drawn: dict[str, str]) -> list[Path]:
    """Write the pictures into ``folder`` and return the files that changed.

    Raises:
        UserError: ``folder`` cannot be written, or a file of such a name is no picture.
    """
    changed = []
    with told_if_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, svg in drawn.items():
            path = folder / name
            if path.exists() and not path.read_bytes().startswith(b"<svg"):
                raise UserError(
                    f"{path} is no picture that was drawn here; move it, or set OUTDIR= to another"
                    " folder"
                )
            if not path.exists() or path.read_text(encoding="utf-8") != svg:
                write_text(path, svg)
                changed.append(path)
    return changed


def sweep(figure: Figure) -> str:
    """The panels of ``figure``, two in a row, and below them the meaning of each marker."""
    rows = math.ceil(len(figure.panels) / COLUMNS)
    width = WIDTH / min(COLUMNS, len(figure.panels))
    body = [_text(16, 26, figure.title, "title")]
    for i, panel in enumerate(figure.panels):
        body.append(_panel(panel, (i % COLUMNS) * width, 40 + i // COLUMNS * PANEL_HEIGHT, width))
    y = 40 + rows * PANEL_HEIGHT + 14
    sources = dict.fromkeys(
        (series.source, series.where) for panel in figure.panels for series in panel.series
    )
    for source, where in sources:
        marker = _line(source, [(16, y - 4), (52, y - 4)]) + _marker(source, 34, y - 4)
        body += [f'<g class="ink">{marker}</g>', _text(60, y, _words(source, where))]
        y += LINE + 3
    for note in figure.notes:
        body.append(_text(16, y, note, "small quiet"))
        y += LINE
    return _svg(figure.title, y + 2, body)


def loss(title: str, curves: Sequence[Curve]) -> str:
    """Training loss over steps, a line a run."""
    height, bottom = 300, 300 + 46
    first, last = min(c.steps[0] for c in curves), max(c.steps[-1] for c in curves)
    low, high = min(min(c.values) for c in curves), max(max(c.values) for c in curves)
    scale = ticks(low, high)
    x = _scale(first, last, LEFT, WIDTH - RIGHT)
    y = _scale(scale[0], scale[-1], bottom, bottom - height)
    body = [
        _text(16, 26, title, "title"),
        _grid(scale, y, LEFT, WIDTH - RIGHT),
        _turned("loss", 16, bottom - height / 2),
    ]
    for at in ticks(first, last):
        if first <= at <= last:
            body.append(_text(x(at), bottom + 17, _short(at), "small", "middle"))
    body.append(
        _text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "training step", "small quiet", "middle")
    )
    below = bottom + 58
    for i, curve in enumerate(curves):
        points = [
            (x(step), y(value)) for step, value in zip(curve.steps, curve.values, strict=True)
        ]
        lines = _path(points) + _path([(16, below - 4), (44, below - 4)])
        body.append(f'<g class="c{i % HUES}">{lines}</g>')
        went = f"{curve.values[0]:.2f} to {curve.values[-1]:.2f} in {curve.steps[-1]} steps"
        body.append(_text(52, below, f"{curve.label}: {went}"))
        below += LINE + 3
    return _svg(title, below, body)


def timeline(schedule: Schedule) -> str:
    """Which stage computes which micro-batch when; idle time shows the background."""
    plan = schedule.timeline
    left, row, top = 66, 30, 62
    x = _scale(0, schedule.until, left, WIDTH - RIGHT)
    body = [_text(16, 26, schedule.title, "title")]
    for stage in range(plan.stages):
        y = top + stage * row
        body.append(_text(left - 8, y + 17, f"stage {stage}", "small", "end"))
        body.append(_box("idle", left, y, x(plan.end) - left, row - 6))
        for span in plan.of_stage(stage):
            late, start, width = span.work.chunk % 2, x(span.start), x(span.end) - x(span.start)
            box = _box("own" + " late" * late, start + 0.5, y, width - 1, row - 6)
            body.append(f'<g class="c{int(span.work.kind == "backward")}">{box}</g>')
            if width >= 7:
                number, kind = str(span.work.micro_batch + 1), "number" + " dark" * late
                body.append(_text(start + width / 2, y + 16, number, kind))
    bottom = top + plan.stages * row
    for at in schedule.ticks:
        body.append(_text(x(at), bottom + 12, _short(at), "small", "middle"))
    body.append(
        _text((left + WIDTH) / 2, bottom + 29, schedule.axis_title, "small quiet", "middle")
    )
    at = left
    for key in schedule.keys:
        box = _box(key.kind, at, 42, 12, 12)
        body.append(box if key.colour is None else f'<g class="c{key.colour}">{box}</g>')
        body.append(_text(at + 17, 52, key.words, "small"))
        at += 34 + 6 * len(key.words)
    for i, text in enumerate(schedule.caption):
        body.append(_text(16, bottom + 54 + i * LINE, text, "small quiet"))
    return _svg(schedule.title, bottom + 54 + len(schedule.caption) * LINE, body)


def _panel(panel: Panel, left: float, top: float, width: float) -> str:
    lines = list(dict.fromkeys(series.line for series in panel.series))
    under = max(0, len(lines) - 2) * LINE
    missing = (p.tick for series in panel.series for p in series.points if p.value is None)
    failed = dict.fromkeys(missing)  # a set has another order in each process
    x0, x1 = left + LEFT, left + width - RIGHT
    y0, y1 = top + PANEL_HEIGHT - BOTTOM, top + TOP + under + FOR_OOM * bool(failed)
    scale = panel.y_ticks
    y = _scale(0, scale[-1], y0, y1)
    step = (x1 - x0) / len(panel.ticks)
    x = {tick: x0 + step * (i + 0.5) for i, tick in enumerate(panel.ticks)}
    out = [_text(left + 16, top + 16, panel.title, "panel"), _grid(scale, y, x0, x1)]
    out += [_text(x[tick], y1 - FOR_OOM + 20, "OOM", "small", "middle") for tick in failed]
    at, row = left + 16.0, top + 33
    for i, line in enumerate(lines):
        if i and (len(lines) > 2 or at + 20 + 6.4 * len(line) > left + width):
            at, row = left + 16.0, row + LINE
        out.append(
            f'<g class="c{i % HUES}">{_box("own", at, row - 9, 10, 10)}</g>'
            + _text(at + 15, row, line, "small")
        )
        at += 34 + 6.4 * len(line)
    for tick in panel.ticks:
        for i, part in enumerate(tick.split("\n")):
            out.append(_text(x[tick], y0 + 16 + 12 * i, part, "small", "middle"))
    if panel.x_title:
        out.append(_text((x0 + x1) / 2, y0 + 36, panel.x_title, "small quiet", "middle"))
    out.append(_turned(panel.y_title, left + 14, (y0 + y1) / 2))
    for series in sorted(
        panel.series, key=lambda s: ("published", "reference", "half", "here").index(s.source)
    ):
        colour = lines.index(series.line) % HUES
        out.append(f'<g class="c{colour}">{_series(series, x, y, y1 - FOR_OOM, panel.order)}</g>')
    return "".join(out)


def _series(series: Series, x: dict[str, float], y, top: float, join: bool) -> str:
    x = x if join else {tick: at + ASIDE[series.source] for tick, at in x.items()}
    at = [(x[p.tick], y(p.value)) for p in series.points if p.value is not None]
    out = [_line(series.source, at)] if join and len(at) > 1 else []
    for point in series.points:
        where = point.id + ("" if point.value is None else f": {_short(point.value)}")
        words = f"{where}, {series.line}, {_words(series.source, series.where)}"
        told = f"<title>{escape(words)}</title>"
        if point.value is None:
            left = x[point.tick] + (1.5 * ASIDE[series.source] if join else 0) - 4
            thin = " thin" * (series.source == "published")
            out.append(
                f'<g>{told}<path class="oom{thin}" d="M{left:.1f} {top:.1f}l8 8m0 -8l-8 8"/></g>'
            )
        else:
            out.append(f"<g>{told}{_marker(series.source, x[point.tick], y(point.value))}</g>")
    return "".join(out)


def _line(source: str, points: Sequence[tuple[float, float]]) -> str:
    kinds = {"here": "join", "half": "join dotted", "published": "join dashed"}
    return _path(points, kinds[source]) if source in kinds else ""


def _marker(source: str, x: float, y: float) -> str:
    match source:
        case "here":
            return f'<circle class="full" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        case "half":
            return f'<rect class="full" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
        case "published":
            return f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
        case _:
            return f'<path class="hollow" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'


def _words(source: str, where: str) -> str:
    """A source for the legend: ``measured here: NVIDIA H200 …``, ``measured separately: …``."""
    if source == "here":
        return f"measured here: {where}"
    return where.replace("reference:", "measured separately:", 1)


def _grid(scale: Sequence[float], y, x0: float, x1: float) -> str:
    lines = (
        f'<path class="{"grid" if i else "axis"}" d="M{x0:.0f} {y(at):.1f}H{x1:.0f}"/>'
        for i, at in enumerate(scale)
    )
    return "".join(lines) + "".join(
        _text(x0 - 6, y(at) + 4, _short(at), "small", "end") for at in scale
    )


def _scale(low: float, high: float, start: float, end: float):
    """The linear map of ``low`` to ``start`` and ``high`` to ``end``."""
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def _path(points: Iterable[tuple[float, float]], kind: str = "join") -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    attributes = (f' class="{kind}"' if kind else "") + (
        f' text-anchor="{anchor}"' if anchor != "start" else ""
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def _turned(text: str, x: float, y: float) -> str:
    return (
        f'<text class="small quiet" text-anchor="middle" transform="translate({x:.1f} {y:.1f})'
        f' rotate(-90)">{escape(text)}</text>'
    )


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )


def _svg(title: str, height: float, body: Iterable[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
    )
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return "\n".join([head, f"<style>\n{STYLE}</style>", paper, *body, "</svg>\n"])
