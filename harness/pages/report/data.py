"""Values that the report's page shows, as JSON: rows, curves of runs, figures, timelines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from harness.errors import UserError
from harness.evidence import columns
from harness.evidence.references import Reference, References
from harness.evidence.results import Results, ended
from harness.evidence.rows import Row, metrics, predicted_step_ms
from harness.experiment.catalog import Catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import allocator_fraction
from harness.pages import axes, figures, schedules
from harness.pages.schedules import Schedule
from harness.planning.script import Place, render
from harness.predict.calibrations import machine_measured_by
from harness.predict.flops import MODEL_FLOPS
from harness.profiling.profile import Profile
from harness.run import directory
from harness.system.files import text_lines

COLUMNS = (
    "chapter",
    "id",
    "slug",
    "label",
    "kind",
    "miniature",
    "gpus",
    "hardware",
    "status",
    "as_published",
    "data",
    "precision",
    "memory_gib",
    "reserved_gib",
    "allocated_gib",
    "memory_ratio",
    "step_ms",
    "step_ms_half_iqr",
    "step_ratio",
    "predicted_step_ms",
    "published_hardware",
    "tflops",
    "mfu",
    "tokens_per_s",
    "steps_done",
    "steps",
    "window_first_step",
    "window_last_step",
    "loss_first",
    "loss_last",
    "runs_on_node",
    "notes",
)
"""Names in ``columns.VALUES``; paths of this machine stay out of the page."""
DIGITS = 5
"""Significant digits of numbers on the page."""
SAMPLES = 200
"""Most points of a memory curve."""
THIS_MACHINE = re.compile(r"#!|cd |export PATH=")
NOT_RUN = "not run"


def page_values(
    found: Results, references: References, catalog: Catalog, profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    """Everything for the page but claims: a row for each of ``found``, and for other experiments.

    Raises:
        UserError: plots.yaml is wrong.
    """
    measured = sorted(
        found.rows, key=lambda row: (row.id, row.experiment.miniature, row.hardware, row.label)
    )
    rows = [_row(row) for row in measured]
    have = {row.id for row in measured if not row.experiment.miniature}
    missing = (experiment for experiment in catalog.experiments if experiment.id not in have)
    rows += [_unmeasured(experiment, references) for experiment in missing]
    rows.sort(key=lambda row: (row["chapter"], row["id"]))
    lines: dict[str, int] = {}
    for row in rows:  # commands share most of their lines
        row["torchrun"] = [
            lines.setdefault(line, len(lines)) for line in row["torchrun"].splitlines()
        ]
    group = references.published
    return {
        "chapters": {str(number): title for number, title in catalog.chapters.items()},
        "rows": _columns(rows),
        "lines": list(lines),
        "figures": list(map(_figure, figures.sweeps(found, references, catalog))),
        "timelines": list(map(_timeline, schedules.every(catalog, profiles))),
        "tick_sizes": axes.SIZES,
        "ended": asdict(ended(measured)),
        "flops": MODEL_FLOPS,
        "published": f"{group.hardware}, {group.software}; {group.method}. Source: {group.source}.",
        "warnings": list(found.warnings),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        **{name: columns.VALUES[name](row) for name in COLUMNS},
        **_described(row.experiment),
        **_published(row.reference),
        "name": columns.EXPERIMENT.text(row),
        "status_text": columns.status_text(row),
        "make": make_command(row.experiment, row.device),
        "torchrun": torchrun_command(row),
        "curves": _curves(row),
        "upstream": row.software,
    }


def _unmeasured(experiment: Experiment, references: References) -> dict[str, Any]:
    """A row of the catalogue without a run or record, with what was published."""
    published = references.published
    found = published.matching(experiment.id)
    return {
        **_described(experiment),
        **_published(found and found.reference),
        "chapter": experiment.chapter,
        "id": experiment.id,
        "slug": experiment.slug,
        "label": experiment.name,
        "kind": "catalogue",
        "miniature": False,
        "gpus": experiment.world_size,
        "hardware": None,
        "status": NOT_RUN,
        "data": experiment.data,
        "precision": experiment.precision,
        "predicted_step_ms": predicted_step_ms(experiment, machine_measured_by(published.name)),
        "notes": "; ".join(found.remarks) if found else "",
        "name": experiment.slug,
        "status_text": NOT_RUN,
        "make": make_command(experiment, "cuda"),
        "torchrun": _script(experiment),
    }


def _described(experiment: Experiment) -> dict[str, Any]:
    return {
        "layout": experiment.layout,
        "model": experiment.model.name,
        "shows": experiment.shows,
        "overrides": dict(experiment.overrides),
    }


def _published(reference: Reference | None) -> dict[str, Any]:
    """Published numbers: to sort by, and as the table shows them."""
    if reference is None:
        return {}
    memory, step = columns.number(reference.memory_gib, 1), columns.number(reference.step_ms)
    return {
        "published_memory_gib": reference.memory_gib,
        "published_step_ms": reference.step_ms,
        "published_memory_text": columns.published_text(reference, memory),
        "published_step_text": columns.published_text(reference, step),
    }


def make_command(experiment: Experiment, device: str) -> str:
    """The command that runs the experiment again: ``make 408 STEPS=20``."""
    words = [f"{key}={shlex.quote(value)}" for key, value in experiment.overrides.items()]
    return " ".join(["make", experiment.id, *words, *(["DEVICE=cpu"] if device == "cpu" else [])])


def torchrun_command(row: Row) -> str:
    """The script that ran, without lines that only hold on the machine where it ran."""
    try:
        text = (
            directory.RunDir(row.origin).command.read_text(encoding="utf-8")
            if row.kind == "run"
            else None
        )
    except (OSError, UnicodeDecodeError):
        text = None
    if text is None:
        return _script(row.experiment, row.device, row.gpu.memory_mib if row.gpu else None)
    return _portable(text)


def _script(experiment: Experiment, device: str = "cuda", gpu_mib: int | None = None) -> str:
    rendezvous = "first-node:29500" if experiment.nodes > 1 else None
    fraction = allocator_fraction(experiment.card, gpu_mib) if experiment.card and gpu_mib else None
    place = Place(rendezvous=rendezvous, memory_fraction=fraction)
    try:
        return _portable(render(experiment, device, place))
    except UserError as error:
        return f"# {error}"


def _portable(script: str) -> str:
    """``script`` for any checkout: paths below the checkout's folder become relative."""
    if folder := re.search(r"^cd (.+)$", script, re.MULTILINE):
        script = script.replace(f"{folder[1].rstrip('/')}/", "")
    return "\n".join(
        line.rstrip() for line in script.splitlines() if not THIS_MACHINE.match(line)
    ).strip()


def _curves(row: Row) -> dict[str, Any] | None:
    """Loss and step time by step; used memory of the fullest GPU by second, where sampled."""
    steps = metrics(row)
    found = {
        "loss": _curve({m.step: m.loss for m in steps if m.loss is not None}),
        "step_ms": _curve({m.step: m.step_ms for m in steps}),
        "memory_gib": _memory(row),
    }
    return {name: curve for name, curve in found.items() if curve} or None


def _curve(values: Mapping[int, float], most: int = figures.CURVE_POINTS) -> dict[str, Any] | None:
    """``{"y": values}`` where steps count from 1, else ``x`` too."""
    if not values:
        return None
    curve = figures.thinned("", values, most)
    y = [_short(value) for value in curve.values]
    return (
        {"y": y} if curve.steps == tuple(range(1, len(y) + 1)) else {"x": list(curve.steps), "y": y}
    )


def _memory(row: Row) -> dict[str, Any] | None:
    if row.kind != "run":
        return None
    used: dict[float, float] = {}
    for line in text_lines(directory.RunDir(row.origin).gpus):
        try:
            sample = json.loads(line)
            used[float(sample["time"])] = max(float(gpu["used_gib"]) for gpu in sample["gpus"])
        except (ValueError, TypeError, KeyError):
            continue  # torn by a kill
    if not used:
        return None
    start = min(used)
    return _curve({round(at - start): gib for at, gib in used.items()}, SAMPLES)


def _figure(figure: figures.Figure) -> dict[str, Any]:
    panels = [asdict(panel) | {"y_ticks": panel.y_ticks} for panel in figure.panels]
    return _rounded(asdict(figure) | {"panels": panels})


def _timeline(schedule: Schedule) -> dict[str, Any]:
    """Spans as [micro-batch, chunk, 1 for backward, start, end], a list for each stage."""
    plan = schedule.timeline
    spans = [
        [
            [
                span.work.micro_batch,
                span.work.chunk,
                int(span.work.kind == "backward"),
                _short(span.start),
                _short(span.end),
            ]
            for span in plan.of_stage(stage)
        ]
        for stage in range(plan.stages)
    ]
    return {
        "title": schedule.title,
        "axis_title": schedule.axis_title,
        "ticks": schedule.ticks,
        "keys": [asdict(key) for key in schedule.keys],
        "caption": " ".join(schedule.caption),
        "chunks": plan.chunks,
        "micro_batches": plan.micro_batches,
        "end": _short(plan.end),
        "spans": spans,
    }


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float | int | None:
    """``value`` with ``DIGITS`` significant digits; None for what JSON lacks."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() else short
