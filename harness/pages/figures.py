"""Figures as plain values: points of lines, from runs, records and published numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from harness.errors import UserError, nearest
from harness.evidence.references import References
from harness.evidence.results import Results
from harness.evidence.rows import Row, losses
from harness.experiment.catalog import EXPERIMENTS, Catalog
from harness.experiment.experiment import Experiment
from harness.pages.axes import ticks
from harness.predict.flops import tflops_per_gpu
from harness.system import yaml_files

PLOTS = EXPERIMENTS / "plots.yaml"
LONG_STEPS = 100
"""Fewest steps of a run whose loss curve is drawn: a shorter one shows no learning."""
CURVE_POINTS = 300
"""Most points of a drawn curve; a longer one is thinned, with its spikes kept."""

Source = Literal["here", "half", "published", "reference"]
"""Records and runs; their half-size companions; the published table; another group of references.
"""
Plotted = Literal["memory", "step", "efficiency"]

PLOTTED: dict[Plotted, tuple[str, str]] = {
    "memory": ("Memory of one GPU", "GiB"),
    "step": ("Step time", "ms"),
    "efficiency": ("Scaling efficiency", "%"),
}
AXES = {
    "dp": "data-parallel size",
    "tp": "tensor-parallel size",
    "cp": "context-parallel size",
    "pp": "pipeline-parallel size",
    "vpp": "virtual stages on each rank",
    "ep": "expert-parallel size",
    "etp": "expert tensor-parallel size",
    "num_microbatches": "micro-batches m",
    "model.num_experts": "experts",
    "cp_comm_type": "",
}


@dataclass(frozen=True)
class Point:
    """One measurement. ``value`` is None where it ran out of memory."""

    id: str
    tick: str
    value: float | None
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one ``line`` from one source."""

    line: str
    source: Source
    where: str
    """The hardware, and whose numbers they are: ``NVIDIA H200``, ``published: 8x H100 80GB SXM5``.
    """
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_title: str
    y_title: str
    ticks: tuple[str, ...]
    """Evenly spaced from left to right."""
    order: bool
    """Whether the ticks have an order, so that points may be joined."""
    series: tuple[Series, ...]

    @property
    def y_ticks(self) -> list[float]:
        values = (point.value for series in self.series for point in series.points)
        return ticks(0, max((value for value in values if value is not None), default=1.0))


@dataclass(frozen=True)
class Figure:
    """Panels about one quantity in one chapter."""

    name: str
    """The name of its file, without suffix."""
    chapter: int
    title: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps of one run."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class _Panel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    title: str
    axis: str | None = None
    scaling: bool = False
    lines: dict[str, list[int] | dict[int, str]]


def load_panels(catalog: Catalog, path: Path = PLOTS) -> dict[int, list[_Panel]]:
    """Panels of plots.yaml by chapter.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or an experiment or axis does not
        exist.
    """
    panels: dict[int, list[_Panel]] = {}
    for chapter, raws in (chapters := yaml_files.read(path)).items():
        where = f"{path.name}: {chapter}"
        with yaml_files.entry(path, chapters, chapter):
            if chapter not in catalog.chapters:
                raise UserError(
                    f"{where}: no such chapter; {nearest(str(chapter), map(str, catalog.chapters))}"
                )
            if not isinstance(raws, list):
                raise UserError(f"{where}: expected a list of panels, found {raws!r}")
            panels[chapter] = [
                yaml_files.build(_Panel, yaml_files.mapping(raw, where), where) for raw in raws
            ]
            for panel in panels[chapter]:
                _check(panel, f"{path.name}: {panel.title}", catalog)
    return panels


def _check(panel: _Panel, where: str, catalog: Catalog) -> None:
    """Raise UserError where ``panel`` names an axis or an experiment that does not exist."""
    if panel.axis is not None and panel.axis not in AXES:
        raise UserError(f"{where}: unknown axis {panel.axis}; known: {', '.join(AXES)}")
    for line in panel.lines.values():
        if isinstance(line, dict) == bool(panel.axis):
            raise UserError(
                f"{where}: give an axis and lists of ids, or no axis and words for each"
            )
        for id_ in line:
            catalog.find(str(id_))


def sweeps(
    found: Results, references: References, catalog: Catalog, path: Path = PLOTS
) -> tuple[Figure, ...]:
    """Memory, step time and scaling efficiency of each chapter, ours and published.

    Figures without a point are left out.

    Raises:
        UserError: plots.yaml is wrong.
    """
    figures = []
    for chapter, panels in load_panels(catalog, path).items():
        sources = list(_sources(found, references, catalog))
        for quantity, (title, unit) in PLOTTED.items():
            kept = [panel for panel in panels if panel.scaling or quantity != "efficiency"]
            drawn = [_panel(panel, quantity, unit, sources, catalog) for panel in kept]
            drawn = [panel for panel in drawn if panel.series]
            if drawn:
                notes = _notes(quantity, panels, found, references)
                figures.append(
                    Figure(
                        f"{chapter}-{quantity}",
                        chapter,
                        f"{title}: {catalog.chapters[chapter]}",
                        tuple(drawn),
                        tuple(notes),
                    )
                )
    return tuple(figures)


def loss_curves(rows: Iterable[Row]) -> tuple[Curve, ...]:
    """The training loss of each row that has one."""
    curves = []
    for row in rows:
        label = row.label
        if row.kind == "record":
            label = label.rpartition("/")[2].replace(row.id, row.experiment.name, 1)
        if len(values := losses(row)) > 1:
            curves.append(thinned(label, values))
    return tuple(curves)


def thinned(label: str, values: Mapping[int, float], most: int = CURVE_POINTS) -> Curve:
    """The curve with at most ``most`` points: the extremes of each stretch of steps."""
    steps = sorted(values)
    if len(steps) > most:
        size = -(-len(steps) * 2 // (most - 2))
        stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
        kept = {pick(part, key=values.__getitem__) for part in stretches for pick in (min, max)}
        steps = sorted(kept | {steps[0], steps[-1]})
    return Curve(label, tuple(steps), tuple(values[step] for step in steps))


def _panel(
    panel: _Panel, quantity: Plotted, unit: str, sources: list[_Source], catalog: Catalog
) -> Panel:
    order = panel.axis not in (None, "cp_comm_type")
    lines = {line: [str(id_) for id_ in ids] for line, ids in panel.lines.items()}
    place = _placing(panel)
    places = dict.fromkeys(place(catalog.find(id_)) for ids in lines.values() for id_ in ids)
    series = []
    for line, ids in lines.items():
        measured: set[str] = set()
        for source in sources:
            found = []
            for id_ in ids:
                id_ += "h" * (source.kind == "half")
                numbers = source.numbers.get(id_)
                if numbers is None or (source.kind == "reference" and id_ in measured):
                    continue
                experiment = catalog.find(id_)
                value = _value(numbers, quantity, experiment)
                if value or numbers.oom:
                    at = place(experiment)
                    places[at] = None
                    spread = numbers.spread_ms if quantity == "step" and value else None
                    found.append((at, Point(id_, str(at), value, spread)))
            if source.kind == "here":
                measured |= {point.id for _, point in found}
            if order:
                found.sort(key=lambda one: one[0])
            points = [point for _, point in found]
            if quantity == "efficiency":
                points = _relative(points)
            if points:
                series.append(Series(line, source.kind, source.where, tuple(points)))
    return Panel(
        panel.title,
        AXES.get(panel.axis, ""),
        f"{PLOTTED[quantity][0]}, {unit}",
        tuple(map(str, sorted(places) if order else places)),
        order,
        tuple(series),
    )


def _placing(panel: _Panel) -> Callable[[Experiment], Any]:
    """Where an experiment stands on the panel's horizontal axis."""
    if panel.axis:
        return attrgetter(panel.axis)
    words = {str(id_): text for line in panel.lines.values() for id_, text in line.items()}
    return lambda experiment: words[experiment.id.removesuffix("h")]


def _relative(points: list[Point]) -> list[Point]:
    """TFLOP/s as per cent of the first point's; empty where there is only one point."""
    measured = [point for point in points if point.value is not None]
    if len(measured) < 2:
        return []
    return [Point(p.id, p.tick, 100 * p.value / measured[0].value) for p in measured]


class _Numbers(NamedTuple):
    """What was measured of one experiment."""

    memory_gib: float | None
    step_ms: float | None
    spread_ms: float | None = None
    oom: bool = False


class _Source(NamedTuple):
    """One source of numbers, by experiment."""

    kind: Source
    where: str
    numbers: Mapping[str, _Numbers]


def _sources(found: Results, references: References, catalog: Catalog) -> Iterator[_Source]:
    kinds: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.comparable:
            kinds.setdefault(f"{row.hardware}, {row.software}", []).append(row)
    for where in sorted(kinds):
        numbers = {
            row.id: _measured(row) for row in sorted(kinds[where], key=lambda row: row.preference)
        }
        yield _Source("here", where, numbers)
        halves = {row.experiment.world_size for row in kinds[where] if row.id.endswith("h")}
        size = f"{min(halves)}" if len(halves) == 1 else "fewer"
        yield _Source("half", f"half size, {size} GPUs: {where}", numbers)
    for group in references.groups:
        kind: Source = "published" if group.published else "reference"
        matching = {one.id: group.matching(one.id) for one in catalog.experiments}
        numbers = {
            id_: _Numbers(one.reference.memory_gib, one.reference.step_ms, oom=one.reference.oom)
            for id_, one in matching.items()
            if one and one.reference and not one.reference.in_doubt
        }
        yield _Source(kind, f"{kind}: {group.hardware}", numbers)


def _measured(row: Row) -> _Numbers:
    step = row.step
    return _Numbers(
        row.memory_gib.nvml,
        step and step.median,
        step and step.half_iqr,
        row.state == "oom",
    )


def _value(numbers: _Numbers, quantity: Plotted, experiment: Experiment) -> float | None:
    if numbers.oom:
        return None
    if quantity == "memory":
        return numbers.memory_gib
    if quantity == "efficiency" and numbers.step_ms:
        return tflops_per_gpu(experiment, numbers.step_ms)
    return numbers.step_ms


def _notes(
    quantity: Plotted, panels: list[_Panel], found: Results, references: References
) -> Iterable[str]:
    if quantity == "efficiency":
        yield "Efficiency: model TFLOP/s of one GPU relative to that of the line's first point."
        return
    ids = {str(id_) for panel in panels for line in panel.lines.values() for id_ in line}
    capped = {
        row.id
        for row in found.rows
        if row.id.removesuffix("h") in ids
        and row.comparable
        and row.state == "oom"
        and row.experiment.card
    }
    if capped:
        yield (
            f"{', '.join(sorted(capped))} ran out of memory with the GPU's memory capped as on the"
            " published card."
        )
    shown = ((id_, references.published.matching(id_)) for id_ in sorted(ids))
    doubtful = [id_ for id_, one in shown if one and one.reference and one.reference.in_doubt]
    if doubtful:
        yield f"Published but in doubt, not drawn: {', '.join(doubtful)}."
