"""The figures of plots and report as plain values: which points of which lines, from runs, records
and published numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from harness.errors import UserError, nearest
from harness.evidence.references import References, load_references
from harness.evidence.results import Results
from harness.evidence.rows import Row, losses
from harness.experiment import command_line, overrides
from harness.experiment.catalog import EXPERIMENTS, Catalog
from harness.experiment.experiment import Experiment
from harness.predict.calibrations import Machine, machine_measured_by
from harness.predict.flops import tflops_per_gpu
from harness.predict.step_time import unknown
from harness.predict.timeline import Timeline, Times, simulate
from harness.profiling.profile import FOLDER, Profile, of_run
from harness.run import directory
from harness.system import yaml_files
from harness.system.files import read_object

PLOTS = EXPERIMENTS / "plots.yaml"
PIPELINES = (("408", "438"), ("408h", "438h"))
"""Pairs of a plain and an interleaved pipeline; drawn is the first that was profiled."""
LONG_STEPS = 100
"""A run of fewer steps shows no learning worth a plot of its own."""
ASSUMED = "forward : backward = 1 : 2, assumed, not measured"
CURVE_POINTS = 300
"""Most points of a drawn curve; more are thinned out, spikes kept."""

Source = Literal["here", "half", "published", "reference"]
"""Records and runs, their half-size companions, the published table, and, without a record, what
was measured apart."""
Quantity = Literal["memory", "step", "efficiency"]

QUANTITIES: dict[Quantity, tuple[str, str]] = {
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
    """One pair of axes: ``ticks`` are evenly spaced from left to right, in ``order`` (points may be
    joined) or not."""

    title: str
    x_title: str
    y_title: str
    ticks: tuple[str, ...]
    order: bool
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Figure:
    """Panels about one quantity in one chapter. ``name`` is that of its file, without suffix."""

    name: str
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


@dataclass(frozen=True)
class Schedule:
    """A pipeline's timeline, where its times come from, and how far the time axis goes.

    ``unit`` is None where times count forward passes of one micro-batch through one stage.
    """

    name: str
    title: str
    timeline: Timeline
    times_from: str
    until: float
    unit: str | None = None


class _Panel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    title: str
    axis: str | None = None
    scaling: bool = False
    lines: dict[str, list[int] | dict[int, str]]


def load_panels(catalog: Catalog, path: Path = PLOTS) -> dict[int, list[_Panel]]:
    """plots.yaml: chapter -> panels.

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
    """Memory, step time and scaling efficiency of each chapter, ours beside published. Figures
    without a point are left out.

    Raises:
        UserError: plots.yaml is wrong.
    """
    figures = []
    for chapter, panels in load_panels(catalog, path).items():
        sources = list(_sources(found, references, catalog))
        for quantity, (title, unit) in QUANTITIES.items():
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
    found = (
        (
            (
                row.label.rpartition("/")[2].replace(row.id, row.experiment.name, 1)
                if row.kind == "record"
                else row.label
            ),
            losses(row),
        )
        for row in rows
    )
    return tuple(thinned(label, curve) for label, curve in found if len(curve) > 1)


def thinned(label: str, values: Mapping[int, float], most: int = CURVE_POINTS) -> Curve:
    """The curve with at most ``most`` points: of each stretch of steps its lowest and its highest
    value."""
    steps = sorted(values)
    if len(steps) > most:
        size = -(-len(steps) * 2 // (most - 2))
        stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
        kept = {pick(part, key=values.__getitem__) for part in stretches for pick in (min, max)}
        steps = sorted(kept | {steps[0], steps[-1]})
    return Curve(label, tuple(steps), tuple(values[step] for step in steps))


def load_profiles(outdir: Path | None, records: Path) -> dict[str, Profile]:
    """Profiles by experiment, of records and traced runs in ``outdir``: on GPUs, the work as in the
    catalogue."""
    found = {}
    for path in sorted(records.glob(f"*/{FOLDER}/*.json")):
        try:
            content = read_object(path)
            e = directory.experiment_in(content["experiment"])
            if _as_catalogued(e):
                found.setdefault(e.id, Profile.model_validate(content))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    for run in directory.runs(outdir)[0] if outdir else ():
        e = run.experiment
        if e.profile and run.device == "cuda" and run.dir.profile.exists() and _as_catalogued(e):
            with suppress(UserError, ValueError):
                found[e.id] = of_run(run.dir)
    return found


def schedule(name: str, title: str, e: Experiment, profile: Profile | None) -> Schedule:
    """The timeline of a pipeline: with the stage times of ``profile``, or else by formula, or else
    assumed.

    Raises:
        UserError: the interleaved schedule has no order for these sizes.
    """
    times = stage_times(e, profile) if profile else None
    machine = _published_machine()
    if times is None and machine and not unknown(e):
        plan = simulate(e.num_microbatches, machine.stage_times(e), e.vpp)
        return Schedule(
            name,
            title,
            plan,
            f"by formula for {machine.card.name} (make speed-{e.id})",
            plan.end,
            "ms",
        )
    plan = simulate(e.num_microbatches, times or Times.alike(e.pp), e.vpp)
    if times is None:
        return Schedule(name, title, plan, ASSUMED, plan.end)
    steps = f"steps {profile.first_step} to {profile.last_step} of {e.id} on {profile.gpu}"
    return Schedule(
        name, title, plan, f"measured: how long each stage computes in {steps}", plan.end, "ms"
    )


@cache
def _published_machine() -> Machine | None:
    return machine_measured_by(load_references().published.name)


def stage_times(e: Experiment, profile: Profile) -> Times | None:
    """Busy ms of one micro-batch through all layers of each stage, by a traced rank of each; None
    where one is missing."""
    traced = [rank for rank in profile.ranks if rank.forward_pass and rank.backward_pass]
    stages = {rank.coordinates.get("pp"): rank for rank in reversed(traced)}
    if not set(range(e.pp)) <= stages.keys():
        return None
    passes = [(stages[i].forward_pass, stages[i].backward_pass) for i in range(e.pp)]
    forward, backward = zip(
        *((p.ms * p.calls / e.num_microbatches for p in pair) for pair in passes), strict=True
    )
    return Times(forward, backward)


def schedules(catalog: Catalog, profiles: Mapping[str, Profile]) -> tuple[Schedule, ...]:
    """A plain and an interleaved pipeline, as in figures 3 and 4 of Narayanan et al. 2021, on one
    time axis.

    The first of ``PIPELINES`` of which both were profiled; where none were, the first by formula.
    """
    pairs = [[catalog.find(id_) for id_ in ids] for ids in PIPELINES]
    measured = [
        pair
        for pair in pairs
        if all(e.id in profiles and stage_times(e, profiles[e.id]) for e in pair)
    ]
    names = ("400-timeline-1f1b", "400-timeline-interleaved")
    found = [
        schedule(
            name,
            f"{'Interleaved ' * (e.vpp > 1)}1F1B: {e.name}",
            e,
            profiles.get(e.id) if measured else None,
        )
        for name, e in zip(names, (measured or pairs)[0], strict=True)
    ]
    until = max(one.until for one in found)
    return tuple(replace(one, until=until) for one in found)


def _as_catalogued(e: Experiment) -> bool:
    return not e.miniature and overrides.is_same_work(e, command_line.SAME_WORK | {"PROFILE"})


def _panel(
    panel: _Panel, quantity: Quantity, unit: str, sources: list[_Numbers], catalog: Catalog
) -> Panel:
    words = {
        str(id_): text
        for ids in panel.lines.values()
        if isinstance(ids, dict)
        for id_, text in ids.items()
    }
    order = panel.axis not in (None, "cp_comm_type")

    def place(e: Experiment) -> Any:
        return attrgetter(panel.axis)(e) if panel.axis else words[e.id.removesuffix("h")]

    ids_of = {line: [str(id_) for id_ in ids] for line, ids in panel.lines.items()}
    places = dict.fromkeys(place(catalog.find(id_)) for ids in ids_of.values() for id_ in ids)
    series = []
    for line, ids in ids_of.items():
        measured: set[str] = set()
        for source in sources:
            found = []
            for e in filter(None, map(source.experiment, ids)):
                number = (
                    None
                    if source.kind == "reference" and e.id in measured
                    else source.number(e, quantity)
                )
                if number:
                    places[place(e)] = None
                    found.append((place(e), Point(e.id, str(place(e)), *number)))
            measured |= {point.id for _, point in found if source.kind == "here"}
            if order:
                found.sort(key=lambda pair: pair[0])
            points = [point for _, point in found]
            if quantity == "efficiency":
                points = _relative(points)
            if points:
                series.append(Series(line, source.kind, source.where, tuple(points)))
    ticks = sorted(places) if order else places
    return Panel(
        panel.title,
        AXES.get(panel.axis, ""),
        f"{QUANTITIES[quantity][0]}, {unit}",
        tuple(map(str, ticks)),
        order,
        tuple(series),
    )


def _relative(points: list[Point]) -> list[Point]:
    """TFLOP/s as per cent of the first point's; nothing where there is only one point to
    compare."""
    measured = [point for point in points if point.value is not None]
    if len(measured) < 2:
        return []
    return [Point(p.id, p.tick, 100 * p.value / measured[0].value) for p in measured]


@dataclass(frozen=True)
class _Numbers:
    """One source of numbers: ``number`` gives (value or None for out of memory, spread), or None
    where it has none."""

    kind: Source
    where: str
    experiment: Callable[[str], Experiment | None]
    number: Callable[[Experiment, Quantity], tuple[float | None, float | None] | None]


def _sources(found: Results, references: References, catalog: Catalog) -> Iterable[_Numbers]:
    known = {e.id: e for e in catalog.experiments}
    rows = [row for row in found.rows if row.comparable]
    for where in sorted({_where(row) for row in rows}):
        best: dict[str, Row] = {}
        for row in (row for row in rows if _where(row) == where):
            best[row.id] = max(best.get(row.id, row), row, key=_preference)

        def number(
            e: Experiment, quantity: Quantity, best: Mapping[str, Row] = best
        ) -> tuple | None:
            row = best.get(e.id)
            if row is None:
                return None
            spread = row.step.half_iqr if row.step and quantity == "step" else None
            return _value(
                e,
                quantity,
                row.memory_gib.nvml,
                row.step and row.step.median,
                row.state == "oom",
                spread,
            )

        yield _Numbers("here", where, known.get, number)
        halves = {e.world_size for id_ in best if id_.endswith("h") and (e := known.get(id_))}
        sizes = f"{min(halves)}" if len(halves) == 1 else "fewer"
        yield _Numbers(
            "half", f"half size, {sizes} GPUs: {where}", lambda id_: known.get(f"{id_}h"), number
        )
    for group in references.groups:

        def published(e: Experiment, quantity: Quantity, group=group) -> tuple | None:
            beside = group.beside(e.id)
            reference = beside and beside.reference
            if not reference or reference.in_doubt:
                return None
            return _value(e, quantity, reference.memory_gib, reference.step_ms, reference.oom)

        yield _Numbers(
            "published" if group.published else "reference",
            f"{'published' if group.published else 'reference'}: {group.hardware}",
            known.get,
            published,
        )


def _value(
    e: Experiment,
    quantity: Quantity,
    memory_gib: float | None,
    step_ms: float | None,
    oom: bool,
    spread: float | None = None,
) -> tuple[float | None, float | None] | None:
    if oom:
        return None, None
    match quantity:
        case "memory":
            return (memory_gib, None) if memory_gib else None
        case "step":
            return (step_ms, spread) if step_ms else None
        case "efficiency":
            return (tflops_per_gpu(e, step_ms), None) if step_ms else None


def _where(row: Row) -> str:
    return f"{row.hardware}, {row.software}"


def _preference(row: Row) -> tuple[bool, bool, float]:
    return row.state == "ok", row.experiment.card is None, row.result.started


def _notes(
    quantity: Quantity, panels: list[_Panel], found: Results, references: References
) -> Iterable[str]:
    if quantity == "efficiency":
        yield "Efficiency: model TFLOP/s of one GPU relative to that of the line's first point."
        return
    ids = {str(id_) for panel in panels for line in panel.lines.values() for id_ in line}
    capped = sorted(
        {
            row.id
            for row in found.rows
            if row.id.removesuffix("h") in ids
            and row.comparable
            and row.state == "oom"
            and row.experiment.card
        }
    )
    if capped:
        yield (
            f"{', '.join(capped)} ran out of memory with the GPU's memory capped as on the"
            " published card."
        )
    doubtful = sorted(
        id_
        for id_ in ids
        if (p := references.published.beside(id_)) and p.reference and p.reference.in_doubt
    )
    if doubtful:
        yield f"Published but in doubt, not drawn: {', '.join(doubtful)}."
