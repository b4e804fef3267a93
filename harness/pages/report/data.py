"""What the page shows, as plain JSON values: columns of rows, curves of runs, figures, timelines.
No HTML here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from harness.errors import UserError
from harness.evidence import columns
from harness.evidence.references import References
from harness.evidence.results import Results, ended
from harness.evidence.rows import Row, metrics, predicted_step_ms
from harness.experiment.catalog import Catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import allocator_fraction
from harness.pages import figures
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
    "published_memory_gib",
    "memory_ratio",
    "step_ms",
    "step_ms_half_iqr",
    "published_step_ms",
    "step_ratio",
    "predicted_step_ms",
    "published_oom",
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
"""Keys of ``columns.VALUES``; paths of this machine stay out of the page."""
DIGITS = 5
SAMPLES = 200
"""Most points of a memory curve."""
THIS_MACHINE = re.compile(r"#!|cd |export PATH=")
NOT_RUN = "not run"


def page_values(
    found: Results, references: References, catalog: Catalog, profiles: Mapping[str, Profile]
) -> dict[str, Any]:
    """Everything for the page but claims; its rows are those of ``found`` and the experiments that
    have none there.

    Raises:
        UserError: plots.yaml is wrong.
    """
    measured = sorted(
        found.rows, key=lambda row: (row.id, row.experiment.miniature, row.hardware, row.label)
    )
    rows = [_row(row) for row in measured]
    have = {row.id for row in measured if not row.experiment.miniature}
    rows += [_unmeasured(e, references) for e in catalog.experiments if e.id not in have]
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
        "figures": [
            _rounded(asdict(figure)) for figure in figures.sweeps(found, references, catalog)
        ],
        "timelines": [_timeline(one) for one in _schedules(catalog, profiles)],
        "ended": asdict(ended(measured)),
        "flops": MODEL_FLOPS,
        "published": f"{group.hardware}, {group.software}; {group.method}. Source: {group.source}.",
        "warnings": list(found.warnings),
    }


def _row(row: Row) -> dict[str, Any]:
    e = row.experiment
    values = {name: columns.VALUES[name](row) for name in COLUMNS}
    return values | {
        "layout": e.layout,
        "model": e.model.name,
        "shows": e.shows,
        "make": make_command(e, row.device),
        "torchrun": torchrun_command(row),
        "curves": _curves(row),
        "overrides": dict(e.overrides),
        "upstream": row.software,
        "in_doubt": row.reference and row.reference.in_doubt,
    }


def _unmeasured(e: Experiment, references: References) -> dict[str, Any]:
    """A row of the catalogue that nobody has run here, beside what was published."""
    beside = references.published.beside(e.id)
    reference = beside and beside.reference
    return {
        "chapter": e.chapter,
        "id": e.id,
        "slug": e.slug,
        "label": e.name,
        "kind": "catalogue",
        "miniature": False,
        "gpus": e.world_size,
        "hardware": None,
        "status": NOT_RUN,
        "data": e.data,
        "precision": e.precision,
        "published_memory_gib": reference and reference.memory_gib,
        "published_step_ms": reference and reference.step_ms,
        "predicted_step_ms": predicted_step_ms(e, machine_measured_by(references.published.name)),
        "published_oom": reference and reference.oom,
        "in_doubt": reference and reference.in_doubt,
        "published_hardware": reference and reference.hardware,
        "notes": "; ".join(beside.remarks) if beside else "",
        "layout": e.layout,
        "model": e.model.name,
        "shows": e.shows,
        "make": make_command(e, "cuda"),
        "torchrun": _script(e),
        "overrides": {},
    }


def make_command(e: Experiment, device: str) -> str:
    """The line that runs ``e`` again: ``make 408 STEPS=20``."""
    words = [f"{key}={shlex.quote(value)}" for key, value in e.overrides.items()]
    return " ".join(["make", e.id, *words, *(["DEVICE=cpu"] if device == "cpu" else [])])


def torchrun_command(row: Row) -> str:
    """What ran, without the lines that only mean something on the machine where it did."""
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


def _script(e: Experiment, device: str = "cuda", gpu_mib: int | None = None) -> str:
    rendezvous = "first-node:29500" if e.nodes > 1 else None
    fraction = allocator_fraction(e.card, gpu_mib) if e.card and gpu_mib else None
    place = Place(rendezvous=rendezvous, memory_fraction=fraction)
    try:
        return _portable(render(e, device, place))
    except UserError as error:
        return f"# {error}"


def _portable(script: str) -> str:
    """``script`` as it would read in any checkout: paths below its folder are relative to it."""
    if folder := re.search(r"^cd (.+)$", script, re.MULTILINE):
        script = script.replace(f"{folder[1].rstrip('/')}/", "")
    return "\n".join(
        line.rstrip() for line in script.splitlines() if not THIS_MACHINE.match(line)
    ).strip()


def _curves(row: Row) -> dict[str, Any] | None:
    """Loss and step time by step, and, of a run that was sampled, used memory of the fullest GPU by
    second."""
    steps = metrics(row)
    found = {
        "loss": _curve({m.step: m.loss for m in steps if m.loss is not None}),
        "step_ms": _curve({m.step: m.step_ms for m in steps}),
        "memory_gib": _memory(row),
    }
    return {name: curve for name, curve in found.items() if curve} or None


def _curve(values: Mapping[int, float]) -> dict[str, Any] | None:
    """``{"y": values}`` where steps count from 1, else with ``x``."""
    if not values:
        return None
    curve = figures.thinned("", values)
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
    seconds = {round(at - start): gib for at, gib in used.items()}
    curve = figures.thinned("", seconds, SAMPLES)
    return {"x": list(curve.steps), "y": [_short(value) for value in curve.values]}


def _timeline(schedule: figures.Schedule) -> dict[str, Any]:
    """Spans as [micro-batch, chunk, 1 for backward, start, end], a list for each stage."""
    plan = schedule.timeline
    return {
        "title": schedule.title,
        "times_from": schedule.times_from,
        "unit": schedule.unit,
        "stages": plan.stages,
        "chunks": plan.chunks,
        "micro_batches": plan.micro_batches,
        "end": _short(plan.end),
        "bubble": _short(plan.bubble_fraction),
        "spans": [
            [
                [
                    s.work.micro_batch,
                    s.work.chunk,
                    int(s.work.kind == "backward"),
                    _short(s.start),
                    _short(s.end),
                ]
                for s in plan.of_stage(stage)
            ]
            for stage in range(plan.stages)
        ],
    }


def _schedules(catalog: Catalog, profiles: Mapping[str, Profile]) -> Iterable[figures.Schedule]:
    """Of every pipeline; those that the chapter draws come first."""
    drawn = figures.PIPELINES[0]
    for e in sorted(catalog.experiments, key=lambda e: e.id not in drawn):
        if e.pp > 1:
            yield figures.schedule(e.id, f"{e.id}: {e.layout}", e, profiles.get(e.id))


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
