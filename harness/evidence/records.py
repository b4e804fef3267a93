"""Records: the measured results that are committed, experiments/records/<gpu>/<id>.json with
ID.metrics.jsonl beside it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import UserError
from harness.experiment import identity
from harness.experiment.catalog import Experiment
from harness.experiment.hardware import find_gpu
from harness.profiling.profile import FOLDER, of_run
from harness.run import directory
from harness.run.directory import Result, StepMetrics, Validation, changes_in_words
from harness.run.step_statistics import contradictions
from harness.system.files import complaint, read_object, write_json, write_text

UNRECORDED = ("STEPS", "DATA", "PROFILE")
"""Overrides that do not name a record: a row measured over fewer steps is still that row."""


def record(run: directory.RunDir, records: Path, force: bool = False) -> Path:
    """Keep a finished GPU run as a record and return its file.

    Only ``force`` replaces the record of another run of the same work on the same GPU.

    The record is result.json with the frozen experiment, the environment and each rank's memory
    inside; the metrics travel beside it, so that every number can be computed again. What was
    frozen decides which record is of the same work; names do not tell ARGS apart, so that those of
    other work get numbers: ``101_args.2``. Tracing slows a step, so that of a traced run only its
    profile is kept, in a folder of its own.

    Raises:
        UserError: the same work has the record of another run.
        UserError: the run is unfinished, failed for another reason than memory, ran as a CPU
            miniature, lost its traces, or what it left does not fit together, such as metrics that
            end before the run does.
    """
    if not run.path.is_dir():
        raise UserError(f"no run {run.label} in {run.path.parent}")
    try:
        experiment, result = run.read_experiment(), run.read_result()
    except ValueError as error:
        raise UserError(f"{run.label}: {error}") from None
    if result is None or result.status not in ("ok", "oom"):
        raise UserError(
            f"{run.label} ended as {run.state()}: only finished runs and runs out of memory become"
            " records"
        )
    if experiment.miniature or not result.gpu:
        raise UserError(f"{run.label} ran on a CPU; records hold GPU runs only")
    if result.mixed:
        raise UserError(
            f"{run.label} is of more than one experiment: {changes_in_words(result.mixed)}\n"
            "a record is of one: run it again"
        )
    folder, steps = records / folder_of(result.gpu), run.read_metrics()
    try:
        environment = read_object(run.environment)
    except ValueError as error:
        raise UserError(
            f"{run.label}: {error}\na record says which versions ran: run it again"
        ) from None
    evidence = {"experiment": experiment.model_dump(mode="json"), "environment": environment}
    if experiment.profile:
        content = of_run(run).model_dump(mode="json")
        target = folder / FOLDER / f"{_stem(experiment, folder / FOLDER)}.json"
        _check_replaces(target, content, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, content | evidence)
        return target
    if wrong := list(_contradictions(experiment, result, steps, folder.name)):
        raise UserError(
            f"{run.label}: {'; '.join(wrong)}\na record must follow from its metrics: run it again"
        )
    target = folder / f"{_stem(experiment, folder)}.json"
    content = json.loads(run.result.read_text(encoding="utf-8"))
    _check_replaces(target, content, force)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(metrics_of(target), _lines(steps))
    if evaluations := run.read_validation():
        write_text(validation_of(target), _lines(evaluations))
    ranks = [rank.model_dump(mode="json", exclude={"pid", "host"}) for rank in run.read_ranks()]
    write_json(target, content | {"label": run.label, "ranks": ranks} | evidence)
    return target


def _check_replaces(target: Path, content: Mapping[str, Any], force: bool) -> None:
    """Raise UserError where ``target`` is a record of another run; the same run may be recorded
    again."""
    if force or not target.exists():
        return
    try:
        kept = read_object(target)
    except ValueError as error:
        raise UserError(f"{target.parent}: {error}\nFORCE=1 replaces it") from None
    if kept | content != kept:
        raise UserError(
            f"{target} is the record of another run, {kept.get('label', 'of unknown label')}\n"
            "FORCE=1 replaces it"
        )


def folder_of(gpu_name: str) -> str:
    """The folder of records measured on this GPU, such as ``h200-141gb``."""
    gpu = find_gpu(gpu_name)
    return gpu.key if gpu else re.sub(r"\W+", "-", gpu_name.lower())


def metrics_of(path: Path) -> Path:
    """The file of metrics beside the record ``path``."""
    return path.with_name(f"{path.stem}.metrics.jsonl")


def validation_of(path: Path) -> Path:
    """The file of evaluations beside the record ``path``, where it has any."""
    return path.with_name(f"{path.stem}.validation.jsonl")


def same_work(a: Experiment, b: Experiment) -> bool:
    """Whether a record of one is a record of the other: the same work on the same card.

    Names do not matter, nor how many steps were run, on which data, with which of the two attention
    libraries.
    """
    return work(a) == work(b)


def work(e: Experiment) -> Experiment:
    """The experiment without what may differ between records of the same work (see same_work)."""
    same = {"steps": 1, "data": "any", "eval_interval": 1, "attention_backend": "auto"}
    return identity.frozen(e).model_copy(update=same)


def read(path: Path) -> tuple[Experiment, Result]:
    """The experiment of a record and its result, checked against the metrics beside it.

    Raises:
        ValueError: the record or its metrics are missing, damaged or truncated; it states what its
            metrics do not say; it is a miniature's, or of another GPU than its folder is for.
    """
    content = read_object(path)
    if not isinstance(content.get("experiment"), dict):
        raise ValueError(f"{path.name}: no 'experiment'")
    try:
        experiment = directory.experiment_in(content["experiment"])
        result = Result.model_validate(content)
    except ValidationError as error:
        raise ValueError(complaint(path, error)) from None
    if wrong := list(_contradictions(experiment, result, _read_metrics(path), path.parent.name)):
        raise ValueError(f"{path.name}: {'; '.join(wrong)}")
    return experiment, result


def _lines(rows: Sequence[StepMetrics | Validation]) -> str:
    return "".join(f"{row.model_dump_json()}\n" for row in rows)


def _read_metrics(path: Path) -> tuple[StepMetrics, ...]:
    beside = metrics_of(path)
    try:
        lines = beside.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(
            f"{beside.name} is missing: a record without its metrics proves nothing"
        ) from None
    steps = tuple(map(directory.parse_metrics, lines))
    if None in steps:
        raise ValueError(f"{beside.name}: line {steps.index(None) + 1} is torn")
    return steps


def _contradictions(
    e: Experiment, result: Result, steps: Sequence[StepMetrics], folder: str
) -> Iterator[str]:
    """What a record with these parts would say that is not so."""
    if e.miniature or result.miniature or result.device != "cuda" or not result.gpu:
        yield "a miniature or a CPU run is no record"
        return
    if folder != folder_of(result.gpu):
        yield f"measured on {result.gpu}, but in the folder of {folder}"
    if [step.step for step in steps] != list(range(1, result.steps_done + 1)):
        yield f"it says {result.steps_done} steps, its metrics hold {len(steps)}: truncated"
        return
    if result.status == "ok" and result.steps_done != e.steps and not e.until:
        yield f"ok after {result.steps_done} of {e.steps} steps"
    if result.memory_gib.nvml is None:
        yield "no NVML reading: its used memory is unknown"
    elif (gpu := find_gpu(result.gpu)) and result.memory_gib.nvml * 1024 > gpu.memory_mib:
        yield (
            f"{result.memory_gib.nvml:,.1f} GiB used of a card of {gpu.memory_mib / 1024:.1f}: in"
            " another unit?"
        )
    if result.data != e.data:
        yield f"data is stated as {result.data}, its experiment has {e.data}"
    yield from contradictions(e, result, steps)


def _stem(experiment: Experiment, folder: Path) -> str:
    """Base name of the record's files: that of the record it replaces, else one that is free."""
    naming = {key: value for key, value in experiment.overrides.items() if key not in UNRECORDED}
    label = experiment.model_copy(update={"overrides": naming}).label
    stem = re.sub(
        r"_args-[0-9a-f]{6}(?=_|$)", "_args", label.replace(experiment.name, experiment.id, 1)
    )
    same = [
        path.stem
        for path in sorted(folder.glob(f"{experiment.id}*.json"))
        if _is_of(path, experiment)
    ]
    if same:
        return stem if stem in same else same[0]
    names = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count(2)))
    return next(name for name in names if not (folder / f"{name}.json").exists())


def _is_of(path: Path, experiment: Experiment) -> bool:
    """Whether the record, or the recorded profile, in ``path`` is of the work of ``experiment``,
    whatever it traced."""
    try:
        recorded = directory.experiment_in(read_object(path).get("experiment") or {})
    except ValueError:  # another's place is not taken because it is damaged
        return False
    return same_work(
        recorded.model_copy(update={"profile": None}),
        experiment.model_copy(update={"profile": None}),
    )
