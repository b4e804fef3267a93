"""Records: the measured results that are committed, experiments/records/<gpu>/<id>.json with ID.metrics.jsonl beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from harness import rundir
from harness.errors import UserError
from harness.hardware import find_gpu

UNRECORDED = ("STEPS", "DATA")
"""Overrides that do not name a record: a row measured over fewer steps is still that row."""


def record(run: rundir.RunDir, records: Path) -> Path:
    """Keep a finished GPU run as a record and return its file; a record of the same experiment and GPU is replaced.

    The record is result.json with the frozen experiment and the environment inside; the metrics travel beside it, so that
    every number can be computed again.

    Raises:
        UserError: the run is unfinished, failed for another reason than memory, or ran as a CPU miniature.
    """
    if not run.path.is_dir():
        raise UserError(f"no run {run.label} in {run.path.parent}")
    try:
        experiment, result = run.read_experiment(), run.read_result()
    except ValueError as error:
        raise UserError(f"{run.label}: {error}") from None
    if result is None or result.status not in ("ok", "oom"):
        raise UserError(f"{run.label} ended as {run.state()}: only finished runs and runs out of memory become records")
    if experiment.miniature or not result.gpu:
        raise UserError(f"{run.label} ran on a CPU; records hold GPU runs only")
    gpu = find_gpu(result.gpu)
    folder = records / (gpu.key if gpu else re.sub(r"\W+", "-", result.gpu.lower()))
    folder.mkdir(parents=True, exist_ok=True)
    naming = {key: value for key, value in experiment.overrides.items() if key not in UNRECORDED}
    stem = experiment.model_copy(update={"overrides": naming}).label.replace(experiment.name, experiment.id, 1)
    metrics = folder / f"{stem}.metrics.jsonl"
    metrics.write_text("".join(f"{step.model_dump_json()}\n" for step in run.read_metrics()), encoding="utf-8")
    target = folder / f"{stem}.json"
    content = json.loads(run.result.read_text(encoding="utf-8"))
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    rundir.write_json(target, {**content, "label": run.label, "experiment": experiment.model_dump(mode="json"),
                               "environment": environment})
    return target
