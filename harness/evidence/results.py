"""The rows of all runs and records, read from their directories, and how to choose among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import UserError, first_line, nearest
from harness.evidence import records
from harness.evidence.references import ReferenceGroup, References
from harness.evidence.rows import Row
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.overrides import is_same_work
from harness.run import directory, step_statistics
from harness.run.schema import LaunchRate, Result, Upstream
from harness.system.files import read_object


@dataclass(frozen=True)
class Results:
    """Rows by experiment, and a warning for each file that could not be read."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    records: tuple[Row, ...] = ()
    """The rows of all records, also of those whose run is in ``rows`` instead."""

    def select(
        self, chapter: int | None = None, ids: Sequence[str] = (), hardware: str | None = None
    ) -> Results:
        """The rows of a chapter, of these ids, on hardware whose name contains ``hardware``.

        Raises:
            UserError: there are rows, but none of them matches.
        """
        if not self.rows:
            return self
        choices = {
            "chapter": (str(chapter or ""), lambda row: str(row.experiment.chapter)),
            "id": (" ".join(ids), lambda row: row.id),
            "hardware": (hardware or "", lambda row: row.hardware),
        }
        kept = tuple(
            row
            for row in self.rows
            if chapter in (None, row.experiment.chapter)
            and (not ids or row.id in ids)
            and (hardware or "").lower() in f"{row.hardware} {row.gpu and row.gpu.key}".lower()
        )
        if kept:
            return replace(self, rows=kept)
        asked = {name: choice for name, choice in choices.items() if choice[0]}
        wanted = ", ".join(f"{name} {text}" for name, (text, _) in asked.items())
        there = "; ".join(
            f"{name} {', '.join(sorted(set(map(value, self.rows))))}"
            for name, (_, value) in asked.items()
        )
        raise UserError(f"no run of {wanted}\nthere are runs of {there}")

    def find(self, wanted: str) -> Row:
        """The row of this label, path, id or name.

        An id or name means a run of this checkout before a record: on GPUs before a miniature, with
        unchanged work, ok, on a whole card, the latest.

        Raises:
            UserError: there is no such run or record, or the id stands for runs of different work,
            none of it unchanged.
        """
        exact = [
            row for row in self.rows if wanted in (row.label, str(row.origin), row.origin.name)
        ]
        rows = exact or _meant(
            wanted, [row for row in self.rows if wanted in (row.id, row.experiment.name)]
        )
        if not rows:
            labels = [row.label for row in self.rows]
            there = nearest(wanted, labels) if labels else "no runs yet: make 101"
            raise UserError(f"no run or record is called {wanted}; {there}")
        return max(rows, key=lambda row: row.preference)


@dataclass(frozen=True)
class Ended:
    """How many experiments with a published row ended as published; each counts once."""

    experiments: int
    as_published: int
    out_of_memory: int
    """Of those that ended as published."""


def ended(rows: Iterable[Row]) -> Ended:
    """Count the experiments that ended as published; with several rows, all of them must have."""
    judged: dict[str, list[Row]] = {}
    for row in rows:
        if row.as_published is not None:
            judged.setdefault(row.id, []).append(row)
    good = [found for found in judged.values() if all(row.as_published for row in found)]
    return Ended(
        len(judged), len(good), sum(any(row.state == "oom" for row in found) for found in good)
    )


def collect(
    outdir: Path, records_dir: Path, references: References, against: str | None = None
) -> Results:
    """Every run in ``outdir`` and every record, with published numbers (or the group ``against``).

    A file that cannot be read, or that contradicts its metrics, is left out with a warning. A
    record whose run is still in ``outdir`` shows once.

    Raises:
        UserError: there is no reference group ``against``.
    """
    runs = collect_runs(outdir, references, against)
    kept = collect_records(records_dir, references, against)
    here = {(row.id, row.result.started) for row in runs.rows if row.result}
    others = (row for row in kept.rows if (row.id, row.result.started) not in here)
    return Results(_in_order([*runs.rows, *others]), runs.warnings + kept.warnings, kept.rows)


def collect_runs(outdir: Path, references: References, against: str | None = None) -> Results:
    """The runs in ``outdir``, as ``collect`` returns them."""
    group = references.group(against) if against else references.published
    runs, warnings = directory.runs(outdir)
    rows = []
    for run in runs:
        try:
            rows.append(_run_row(run, group))
        except ValueError as error:
            warnings += (f"{run.dir.path}: skipped: {error}",)
    return Results(_in_order(rows), warnings)


def collect_records(
    records_dir: Path, references: References, against: str | None = None
) -> Results:
    """The records, as ``collect`` returns them."""
    group = references.group(against) if against else references.published
    rows, warnings = [], []
    for path in sorted(records_dir.glob("*/*.json")):
        try:
            rows.append(_record_row(path, group))
        except ValueError as error:
            warnings.append(f"{path}: skipped: {first_line(error)}")
    found = _in_order(rows)
    return Results(found, tuple(warnings), found)


def _in_order(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: (row.id, row.hardware, row.label)))


def _run_row(run: directory.StoredRun, group: ReferenceGroup) -> Row:
    result, steps = run.result, run.dir.read_metrics()
    if result and (
        wrong := next(step_statistics.contradictions(run.experiment, result, steps), None)
    ):
        raise ValueError(f"result.json: {wrong}")
    try:
        environment = read_object(run.dir.environment)
    except ValueError:
        environment = {}
    upstream = environment.get("upstream") and Upstream.model_validate(environment["upstream"])
    return Row(
        label=run.dir.label,
        state=run.state,
        device=run.device,
        origin=run.dir.path,
        kind="run",
        gpu_name=result.gpu if result else environment.get("gpu"),
        upstream=result.upstream if result else upstream,
        steps_done=steps[-1].step if steps else 0,
        **_common(run.experiment, result, environment, group),
    )


def _record_row(path: Path, group: ReferenceGroup) -> Row:
    experiment, result, environment = records.read(path)
    return Row(
        label=f"{path.parent.name}/{path.stem}",
        state=result.status,
        device=result.device,
        origin=path,
        kind="record",
        gpu_name=result.gpu,
        upstream=result.upstream,
        steps_done=result.steps_done,
        **_common(experiment, result, environment, group),
    )


def _launch_rate(environment: Any) -> LaunchRate | None:
    try:
        return LaunchRate.model_validate(environment["launch"])
    except (KeyError, TypeError, ValidationError):
        return None


def _common(
    experiment: Experiment, result: Result | None, environment: Any, group: ReferenceGroup
) -> dict[str, Any]:
    """What runs and records have alike; a miniature and changed work are compared with nothing."""
    common = {
        "experiment": experiment,
        "result": result,
        "launch": _launch_rate(environment),
        "gpu_uuids": frozenset((environment or {}).get("gpu_uuids") or ()),
    }
    if experiment.miniature or not is_same_work(experiment) or (result and result.mixed):
        return common
    return common | {"published": group.matching(experiment.id), "against": group}


def _meant(wanted: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Of the ``rows`` of an id: runs with a step or out of memory, else records, else all."""
    began = [row for row in rows if row.kind == "run" and (row.steps_done or row.state == "oom")]
    rows = began or [row for row in rows if row.kind == "record"] or rows
    if not rows:
        return rows
    ranked = sorted(rows, key=lambda row: row.preference, reverse=True)
    best = ranked[0]
    alike = [row for row in ranked if row.experiment.miniature == best.experiment.miniature]
    different: dict[str, Row] = {}
    for row in alike:
        different.setdefault(records.work(row.experiment).model_dump_json(), row)
    if len(different) > 1 and not is_same_work(best.experiment):
        lines = [
            f"{wanted}: {len(different)} different experiments ran under this id:",
            *(f"  {row.label}{_differences(row, best)}" for row in different.values()),
            "name one of them by its label",
        ]
        raise UserError("\n".join(lines))
    return alike


def _differences(row: Row, best: Row) -> str:
    found = identity.differences(row.experiment, best.experiment)
    said = "; ".join(f"{one.setting} {one.before}" for one in found)
    return f"  ({said})" if said else ""
