"""Records: committed measurements, experiments/records/GPU/ID.json with ID.metrics.jsonl."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness import RECORDS
from harness.errors import UserError
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.predict import rates
from harness.profiling.profile import FOLDER, of_run
from harness.run import directory, finding, schema
from harness.run.schema import Result, StepMetrics, Validation, changes_in_words
from harness.run.step_statistics import contradictions
from harness.system.files import complaint, read_object, write_json, write_text

BATCH_S = 2 * 3600
"""Runs of one batch begin within this time."""
UNRECORDED = ("STEPS", "DATA", "PROFILE", "EVAL_EVERY", "EVAL_STEPS")
"""Settings that do not name a record: a row measured over fewer steps is still that row."""


class Recorded(NamedTuple):
    """What a record's file holds; ``environment`` is None in older records."""

    experiment: Experiment
    result: Result
    environment: Any


def keep(settings: Mapping[str, str]) -> int:
    """``make record``: keep the run RUN, with FORCE=1 in place of another."""
    outdir = finding.outdir(settings)
    label = finding.label_of(settings["RUN"], outdir, lambda run: run.device == "cuda")
    run = directory.RunDir(outdir / label)
    print(record(run, RECORDS, force=settings.get("FORCE") == "1"))
    return 0


def record(run: directory.RunDir, records: Path, force: bool = False) -> Path:
    """Keep a finished GPU run as a record and return its file.

    A record is result.json with the frozen experiment, the environment and each rank's memory; the
    metrics are kept with it, so that every number can be computed again. The frozen experiment
    decides which record is replaced; records of other work whose names collide, or of another
    batch, get numbers (``101_args.2``). Tracing slows a step, so a traced run leaves only its
    profile, in a folder of its own. Only ``force`` replaces the record of another run.

    Raises:
        UserError: the same work has the record of another run.
        UserError: the run is unfinished, failed for another reason than memory, ran as a CPU
            miniature, lost its traces, or contradicts its metrics, which may end before the run.
    """
    if not run.path.is_dir():
        raise UserError(f"no run {run.label} in {run.path.parent}")
    experiment, result = _recordable(run)
    folder = records / folder_of(result.gpu)
    environment = _environment(run)
    evidence = {"experiment": experiment.model_dump(mode="json"), "environment": environment}
    sitting = Sitting.of(environment, result.started)
    if experiment.profile:
        folder /= FOLDER
        content = of_run(run).model_dump(mode="json")
    else:
        steps = run.read_metrics()
        if wrong := list(_contradictions(experiment, result, steps, folder.name)):
            raise UserError(
                f"{run.label}: {'; '.join(wrong)}\n"
                "a record must follow from its metrics: run it again"
            )
        content = json.loads(run.result.read_text(encoding="utf-8"))
    target = folder / f"{_stem(experiment, folder, sitting)}.json"
    _check_replaces(target, content, force)
    folder.mkdir(parents=True, exist_ok=True)
    if not experiment.profile:
        write_text(metrics_of(target), _lines(steps))
        if evaluations := run.read_validation():
            write_text(validation_of(target), _lines(evaluations))
        ranks = [rank.model_dump(mode="json", exclude={"pid", "host"}) for rank in run.read_ranks()]
        content |= {"label": run.label, "ranks": ranks}
    write_json(target, content | evidence)
    return target


def read(path: Path) -> Recorded:
    """Read a record and check it against its metrics.

    Raises:
        ValueError: the record or its metrics are missing, damaged or truncated; it contradicts its
            metrics; it is a miniature's, or in the folder of another GPU.
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
    return Recorded(experiment, result, content.get("environment"))


def same_work(a: Experiment, b: Experiment) -> bool:
    """Whether a record of one is a record of the other: the same work on the same card."""
    return work(a) == work(b)


def work(experiment: Experiment) -> Experiment:
    """The experiment without what may differ between records of the same work.

    Names do not matter, nor the number of steps, the data, or which attention library ran.
    """
    same = {
        "steps": 1,
        "data": "any",
        "eval_interval": 1,
        "eval_steps": 1,
        "attention_backend": "auto",
    }
    return identity.frozen(experiment).model_copy(update=same)


def folder_of(gpu_name: str) -> str:
    """The folder of records measured on this GPU, such as ``h200-141gb``."""
    gpu = find_card(gpu_name)
    return gpu.key if gpu else re.sub(r"\W+", "-", gpu_name.lower())


def metrics_of(path: Path) -> Path:
    """The metrics file of the record ``path``."""
    return path.with_name(f"{path.stem}.metrics.jsonl")


def validation_of(path: Path) -> Path:
    """The file of the record's evaluations, where it has any."""
    return path.with_name(f"{path.stem}.validation.jsonl")


def _recordable(run: directory.RunDir) -> tuple[Experiment, Result]:
    """The run's experiment and result. Raises UserError where it cannot become a record."""
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
    return experiment, result


def _environment(run: directory.RunDir) -> dict[str, Any]:
    try:
        return read_object(run.environment)
    except ValueError as error:
        raise UserError(
            f"{run.label}: {error}\na record says which versions ran: run it again"
        ) from None


def _check_replaces(target: Path, content: Mapping[str, Any], force: bool) -> None:
    """Raise UserError where ``target`` records another run; the same run may be recorded again."""
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


def _lines(rows: Sequence[StepMetrics | Validation]) -> str:
    return "".join(f"{row.model_dump_json()}\n" for row in rows)


def _read_metrics(path: Path) -> tuple[StepMetrics, ...]:
    file = metrics_of(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(
            f"{file.name} is missing: a record without its metrics proves nothing"
        ) from None
    steps = tuple(map(schema.parse_metrics, lines))
    if None in steps:
        raise ValueError(f"{file.name}: line {steps.index(None) + 1} is torn")
    return steps


def _contradictions(
    experiment: Experiment, result: Result, steps: Sequence[StepMetrics], folder: str
) -> Iterator[str]:
    """What is false in a record made of these parts."""
    if experiment.miniature or result.miniature or result.device != "cuda" or not result.gpu:
        yield "a miniature or a CPU run is no record"
        return
    if folder != folder_of(result.gpu):
        yield f"measured on {result.gpu}, but in the folder of {folder}"
    if [step.step for step in steps] != list(range(1, result.steps_done + 1)):
        yield f"it says {result.steps_done} steps, its metrics hold {len(steps)}: truncated"
        return
    if result.status == "ok" and result.steps_done != experiment.steps and not experiment.until:
        yield f"ok after {result.steps_done} of {experiment.steps} steps"
    if result.memory_gib.nvml is None:
        yield "no NVML reading: its used memory is unknown"
    elif (gpu := find_card(result.gpu)) and result.memory_gib.nvml * 1024 > gpu.memory_mib:
        yield (
            f"{result.memory_gib.nvml:,.1f} GiB used of a card of {gpu.memory_mib / 1024:.1f}: in"
            " another unit?"
        )
    if result.data != experiment.data:
        yield f"data is stated as {result.data}, its experiment has {experiment.data}"
    yield from contradictions(experiment, result, steps)


@dataclass(frozen=True)
class Sitting:
    """When a run began, on which GPUs, and how its host launches: what tells batches apart."""

    started: float
    operation_us: float | None
    gpus: frozenset[str]
    """UUIDs; none in older records."""

    @staticmethod
    def of(environment: Mapping[str, Any] | None, started: float) -> Sitting:
        there = environment or {}
        launch = there.get("launch") or {}
        return Sitting(started, launch.get("operation_us"), frozenset(there.get("gpu_uuids") or ()))

    def is_with(self, other: Sitting) -> bool:
        """Whether both are of one batch: shortly after each other, on the same GPUs or on hosts
        that launch alike."""
        if abs(self.started - other.started) >= BATCH_S:
            return False
        alike = rates.launch_alike(self.operation_us, other.operation_us)
        return alike or bool(self.gpus & other.gpus)


def day_of(started: float) -> str:
    """The day in UTC of a time in Unix seconds."""
    return datetime.fromtimestamp(started, UTC).date().isoformat()


def _stem(experiment: Experiment, folder: Path, sitting: Sitting) -> str:
    """Base name of the record's files: that of the record it replaces, else a free one."""
    naming = {key: value for key, value in experiment.overrides.items() if key not in UNRECORDED}
    label = experiment.model_copy(update={"overrides": naming}).label
    stem = re.sub(
        r"_args-[0-9a-f]{6}(?=_|$)", "_args", label.replace(experiment.name, experiment.id, 1)
    )
    same = [
        path.stem
        for path in sorted(folder.glob(f"{experiment.id}*.json"))
        if _is_of(path, experiment, sitting)
    ]
    if same:
        return stem if stem in same else same[0]
    names = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count(2)))
    return next(name for name in names if not (folder / f"{name}.json").exists())


def _is_of(path: Path, experiment: Experiment, sitting: Sitting) -> bool:
    """Whether the record or profile in ``path`` is of this work and batch, whichever steps it
    traced."""
    try:
        content = read_object(path)
        recorded = directory.experiment_in(content.get("experiment") or {})
    except ValueError:  # a damaged record of another run keeps its name
        return False
    if "started" in content:
        there = Sitting.of(content.get("environment"), content["started"])
        if not sitting.is_with(there):
            return False
    return same_work(
        recorded.model_copy(update={"profile": None}),
        experiment.model_copy(update={"profile": None}),
    )
