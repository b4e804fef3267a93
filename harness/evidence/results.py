"""What was measured beside what was published: runs, records and references, joined into rows of
tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import UserError, first_line, nearest
from harness.evidence import records
from harness.experiment import identity, overrides
from harness.experiment.catalog import EXPERIMENTS, Catalog, Experiment
from harness.experiment.hardware import Gpu, find_gpu, peak_tflops, required_gpu
from harness.experiment.overrides import is_same_work
from harness.predict.calibrations import Machine, machine_of
from harness.predict.flops import mfu
from harness.predict.step_time import unknown
from harness.run import directory, step_statistics
from harness.run.directory import (
    LaunchRate,
    MemoryGib,
    Result,
    Spread,
    State,
    StepMetrics,
    Upstream,
    Validation,
)
from harness.system import yaml_files
from harness.system.files import read_object, text_lines

REFERENCES = EXPERIMENTS / "references.yaml"

SAME_LAUNCH_RATE = 1.2
"""A smaller ratio of two launch rates gets no remark."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Text = Annotated[str, Field(min_length=1)]


class Reference(_Strict):
    """One published or separately measured result. Memory is GiB as nvidia-smi shows it on one
    GPU."""

    id: str | None = None
    """The experiment as its source labels it; None where it is none of the catalogue."""
    workload: str | None = None
    group: str
    hardware: str
    source: str
    gpus: int | None = None
    memory_gib: float | None = None
    step_ms: float | None = None
    tflops: float | None = None
    oom: bool = False
    ran: str | None = None
    """What it really ran where the label says otherwise (``vpp6``), or ``unknown``."""
    stands_for: str | None = None
    """The experiment that ran the same; ``id`` where the label is true."""
    variant: str | None = None
    make: str | None = None
    """What of ours runs the same as a workload: ``420 GPUS=4 TP=4``."""
    environment: dict[str, str] = {}
    profiled_ms: dict[str, float] | None = None
    note: str | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether nobody can tell what this row measured."""
        return self.ran == "unknown"

    def numbers(self) -> str:
        """Its step time and memory, in words."""
        return "out of memory" if self.oom else f"{self.step_ms:g} ms, {self.memory_gib:g} GiB"


class ReferenceGroup(_Strict):
    """Results of one source on one kind of hardware."""

    name: Text
    hardware: Text
    gpu: Text
    source: Text
    software: Text
    method: Text
    published: bool = False
    notes: tuple[str, ...] = ()
    rows: tuple[Reference, ...]

    def ran(self, catalog: Catalog) -> Iterator[tuple[Reference, Experiment]]:
        """The rows with a step time that an experiment or a command of ours runs alike, each with
        what it is here."""
        for row in self.rows:
            words = row.make or (row.stands_for if row.variant is None else None)
            if words and row.step_ms and not row.in_doubt:
                yield row, overrides.made(words, catalog)

    def beside(self, id_: str) -> Published | None:
        """What to show beside experiment ``id_``, or None where this source has nothing to say
        about it."""
        same = [row for row in self.rows if row.stands_for == id_ and row.variant is None]
        shown = next((row for row in same if row.id == id_), same[0] if same else None)
        labelled = next((row for row in self.rows if row.id == id_ and row.variant is None), None)
        remarks = []
        if shown and shown.in_doubt:
            remarks.append(f"published as {shown.id}, but what ran is unknown: {shown.note}")
        elif shown and shown.id != id_:
            remarks.append(f"published as {shown.id}, which ran {_words(shown.ran)}")
        if labelled and labelled.stands_for != id_:
            ran = "is in doubt" if labelled.in_doubt else f"ran {_words(labelled.ran)}"
            remarks.append(
                f"the row published as {id_} {ran} and stands beside {labelled.stands_for}"
            )
        others = [row for row in same if row is not shown]
        remarks += [
            f"the row published as {row.id} ran the same: {row.numbers()}" for row in others
        ]
        return Published(shown, tuple(remarks)) if shown or remarks else None


@dataclass(frozen=True)
class Published:
    """A reference beside an experiment, or None with remarks that say why there is none."""

    reference: Reference | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class References:
    """Every group of references.yaml."""

    groups: tuple[ReferenceGroup, ...]

    @property
    def published(self) -> ReferenceGroup:
        return next(group for group in self.groups if group.published)

    def group(self, name: str) -> ReferenceGroup:
        """The group of this name. Raises UserError naming the nearest."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UserError(
            f"no references called {name}; {nearest(name, [g.name for g in self.groups])}"
        )


@dataclass(frozen=True)
class Row:
    """One line of a table: a run or a record, beside what was published."""

    label: str
    experiment: Experiment
    state: State
    device: str
    origin: Path
    """The run directory, or the record's file."""
    kind: Literal["run", "record"]
    gpu_name: str | None = None
    result: Result | None = None
    steps_done: int = 0
    published: Published | None = None
    against: ReferenceGroup | None = None
    upstream: Upstream | None = None
    """The Megatron-LM it runs; None where that is not known yet."""
    launch: LaunchRate | None = None
    """How fast its slowest rank launched; None of runs before that was measured."""

    @property
    def id(self) -> str:
        return self.experiment.id

    @property
    def hardware(self) -> str:
        """Rows with different hardware never share a table."""
        if self.experiment.miniature:
            return "CPU miniature"
        return "CPU" if self.device == "cpu" else self.gpu_name or "GPU of unknown model"

    @property
    def software(self) -> str:
        """The Megatron-LM it ran, in words. Rows with different ones never share a table."""
        return in_words(self.upstream) if self.upstream else "Megatron-LM of unknown version"

    @cached_property
    def gpu(self) -> Gpu | None:
        return find_gpu(self.gpu_name) if self.gpu_name else None

    @property
    def reference(self) -> Reference | None:
        return self.published.reference if self.published else None

    @property
    def step(self) -> Spread | None:
        """Step time in ms over the averaging window."""
        return self.result.step_ms if self.result else None

    @property
    def validation(self) -> Validation | None:
        """The last evaluation on held-out data."""
        return self.result.validation if self.result else None

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last step that the step time is averaged over."""
        return self.result.window if self.result else None

    @property
    def memory_gib(self) -> MemoryGib:
        """Peak memory of the fullest rank."""
        return self.result.memory_gib if self.result else MemoryGib()

    @property
    def counts_driver(self) -> bool:
        """Whether its used memory includes what the driver keeps for itself, which nvidia-smi
        leaves out."""
        return self.memory_gib.nvml is not None and self.memory_gib.driver is None

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s per GPU, of older runs too, whose results state upstream's count."""
        return step_statistics.model_tflops(self.experiment, self.result) if self.result else None

    @property
    def peak_tflops(self) -> float | None:
        """Dense peak of one GPU at the run's precision."""
        if self.experiment.miniature or not self.gpu_name:
            return None
        return peak_tflops(self.gpu_name, self.experiment.precision)

    @property
    def mfu(self) -> float | None:
        return mfu(self.tflops, self.peak_tflops) if self.tflops and self.peak_tflops else None

    @property
    def memory_ratio(self) -> float | None:
        """Memory over the published memory."""
        return self._ratio(self.memory_gib.nvml, self.reference and self.reference.memory_gib)

    @property
    def step_ratio(self) -> float | None:
        """Step time over the published step time."""
        return self._ratio(
            self.step and self.step.median, self.reference and self.reference.step_ms
        )

    @cached_property
    def predicted_step_ms(self) -> float | None:
        """Step time by formula on its GPU (``predicted_step_ms``)."""
        return predicted_step_ms(self.experiment, machine_of(self.gpu) if self.gpu else None)

    @property
    def runs_on_node(self) -> int | None:
        """How many runs shared the node, this one included; None where that is not known."""
        return len(self.result.packed_with) + 1 if self.result else None

    @property
    def comparable(self) -> bool:
        """Whether it may share a line with others: finished or out of memory, at full size on GPUs,
        its work unchanged."""
        whole = (
            self.device == "cuda"
            and not self.experiment.miniature
            and is_same_work(self.experiment)
        )
        return whole and self.state in ("ok", "oom") and not (self.result and self.result.mixed)

    @property
    def as_published(self) -> bool | None:
        """Whether it ran where published it ran, and ran out of memory where published it did.

        None where that cannot be said: there is no reference or it is in doubt, the run is not over
        or was stopped from outside, or it had more or less memory than the published card and that
        decided.
        """
        reference = self.reference
        if not reference or reference.in_doubt or self.state in ("running", "killed"):
            return None
        if self.state not in ("ok", "oom"):
            return False
        if (self.state == "oom") == reference.oom:
            return True
        here, there = self.memory_mib, find_gpu(self.against.gpu).memory_mib
        by_memory = here is not None and (here < there if self.state == "oom" else here > there)
        return None if by_memory else False

    @property
    def other_memory_decided(self) -> bool:
        """Whether it ran out of memory, or fits, unlike published because its card has less, or
        more."""
        certain = self.reference and not self.reference.in_doubt and self.state in ("ok", "oom")
        return bool(certain) and self.as_published is None

    @property
    def memory_mib(self) -> int | None:
        """Memory of the card: the emulated one where there is one."""
        card = find_gpu(self.experiment.card) if self.experiment.card else self.gpu
        return card.memory_mib if card else None

    def _ratio(self, ours: float | None, published: float | None) -> float | None:
        if not ours or not published or self.reference.in_doubt or self.state != "ok":
            return None
        return ours / published


def other_launch_rate(here: Row, there: Row) -> str | None:
    """Where the hosts of two runs launch at different rates: by how much, and what follows; else
    None."""
    if not here.launch or not there.launch:
        return None
    ratio = here.launch.operation_us / there.launch.operation_us
    if 1 / SAME_LAUNCH_RATE < ratio < SAME_LAUNCH_RATE:
        return None
    pace = f"{ratio:.1f} x slower" if ratio > 1 else f"{1 / ratio:.1f} x faster"
    return (
        f"The host of {here.label} launched operations {pace} than that of {there.label} "
        f"({here.launch.operation_us:.1f} and {there.launch.operation_us:.1f} µs each): "
        "a launch-bound step differs by as much; CUDA_GRAPHS=1 hides it."
    )


def in_words(upstream: Upstream) -> str:
    """Which Megatron-LM it is: ``Megatron-LM core 0.19.1 (commit 5be9626)``."""
    commit = f" (commit {upstream.commit[:7]})" if upstream.commit else ""
    return f"Megatron-LM core {upstream.version or '?'}{commit}"


@dataclass(frozen=True)
class Results:
    """Rows by experiment, and a warning for each file that could not be read.

    Attributes:
        records: the rows of all records, of those too whose run is among ``rows`` instead.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    records: tuple[Row, ...] = ()

    def select(
        self, chapter: int | None = None, ids: Sequence[str] = (), hardware: str | None = None
    ) -> Results:
        """The rows of a chapter, of these ids, on hardware whose name contains ``hardware``.

        Raises:
            UserError: there are rows, but none of them is wanted.
        """
        if not self.rows:
            return self
        choices = {
            "chapter": (chapter and [str(chapter)], lambda row: str(row.experiment.chapter)),
            "id": (ids, lambda row: row.id),
            "hardware": (hardware and [hardware], lambda row: row.hardware),
        }
        chosen = {name: choice for name, choice in choices.items() if choice[0]}
        kept = tuple(
            row
            for row in self.rows
            if chapter in (None, row.experiment.chapter)
            and (not ids or row.id in ids)
            and (
                not hardware
                or hardware.lower() in f"{row.hardware} {row.gpu and row.gpu.key}".lower()
            )
        )
        if not kept:
            asked = ", ".join(f"{name} {' '.join(wanted)}" for name, (wanted, _) in chosen.items())
            there = "; ".join(
                f"{name} {', '.join(sorted(set(map(of, self.rows))))}"
                for name, (_, of) in chosen.items()
            )
            raise UserError(f"no run of {asked}\nthere are runs of {there}")
        return replace(self, rows=kept)

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
        return max(rows, key=_preference)


@dataclass(frozen=True)
class Ended:
    """How many experiments with a published row ended as published, each counted once, however many
    rows it has."""

    experiments: int
    as_published: int
    out_of_memory: int
    """Of those that ended as published."""


def ended(rows: Iterable[Row]) -> Ended:
    """The one count of experiments that ended as published; with several rows, where each of them
    did."""
    judged: dict[str, list[Row]] = {}
    for row in rows:
        if row.as_published is not None:
            judged.setdefault(row.id, []).append(row)
    good = [found for found in judged.values() if all(row.as_published for row in found)]
    return Ended(
        len(judged), len(good), sum(any(row.state == "oom" for row in found) for found in good)
    )


def load_references(path: Path = REFERENCES) -> References:
    """Read references.yaml.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or two rows claim the same
        experiment.
    """
    raws, found = yaml_files.read(path), []
    for name in raws:
        with yaml_files.entry(path, raws, name):
            found.append(_group(f"{path.name}: {name}", str(name), raws[name]))
    groups = tuple(found)
    published = [group.name for group in groups if group.published]
    if len(published) != 1:
        found = ", ".join(published) or "none"
        raise UserError(f"{path.name}: exactly one group must be published: true; found {found}")
    return References(groups)


def collect(
    outdir: Path, records_dir: Path, references: References, against: str | None = None
) -> Results:
    """Every run in ``outdir`` and every record, beside the published numbers (or the group
    ``against``).

    What cannot be read, or states what its metrics do not say, is left out with a warning. A record
    whose run is still in ``outdir`` shows once.

    Raises:
        UserError: there is no reference group ``against``.
    """
    runs, kept = (
        collect_runs(outdir, references, against),
        collect_records(records_dir, references, against),
    )
    here = {(row.id, row.result.started) for row in runs.rows if row.result}
    others = (row for row in kept.rows if (row.id, row.result.started) not in here)
    return Results(_in_order([*runs.rows, *others]), runs.warnings + kept.warnings, kept.rows)


def collect_runs(outdir: Path, references: References, against: str | None = None) -> Results:
    """Every run, as ``collect`` has them where there are no records."""
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
    """Every record, as ``collect`` has them where there are no runs."""
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


def losses(row: Row) -> dict[int, float]:
    """Training loss by step, from a run's metrics.jsonl or from NAME.metrics.jsonl beside the
    record NAME."""
    return {step.step: step.loss for step in metrics(row) if step.loss is not None}


def predicted_step_ms(e: Experiment, machine: Machine | None) -> float | None:
    """Step time by formula (step_time.py), with constants fitted without this experiment; None
    where none covers it."""
    if machine is None or e.miniature or unknown(e):
        return None
    row = machine.row_of(e)
    return row.left_out_ms if row else machine.predict(e).total


def metrics(row: Row) -> tuple[StepMetrics, ...]:
    """Every complete line of a run's metrics.jsonl, or of NAME.metrics.jsonl beside the record
    NAME."""
    if row.kind == "run":
        return directory.RunDir(row.origin).read_metrics()
    return tuple(
        filter(None, map(directory.parse_metrics, text_lines(records.metrics_of(row.origin))))
    )


def _run_row(run: directory.Run, group: ReferenceGroup) -> Row:
    result, steps = run.result, run.dir.read_metrics()
    if result and (
        wrong := next(step_statistics.contradictions(run.experiment, result, steps), None)
    ):
        raise ValueError(f"result.json: {wrong}")
    environment = _environment(run.dir)
    return Row(
        label=run.dir.label,
        experiment=run.experiment,
        state=run.state,
        device=run.device,
        origin=run.dir.path,
        kind="run",
        gpu_name=result.gpu if result else environment.get("gpu"),
        upstream=result.upstream if result else _upstream(environment),
        launch=_launch(environment),
        result=result,
        steps_done=steps[-1].step if steps else 0,
        **({} if result and result.mixed else _comparison(run.experiment, group)),
    )


def _record_row(path: Path, group: ReferenceGroup) -> Row:
    experiment, result = records.read(path)
    return Row(
        label=f"{path.parent.name}/{path.stem}",
        experiment=experiment,
        state=result.status,
        device=result.device,
        origin=path,
        kind="record",
        gpu_name=result.gpu,
        upstream=result.upstream,
        launch=_launch(read_object(path).get("environment")),
        result=result,
        steps_done=result.steps_done,
        **_comparison(experiment, group),
    )


def _environment(run: directory.RunDir) -> dict[str, Any]:
    try:
        return read_object(run.environment)
    except ValueError:
        return {}


def _upstream(environment: dict[str, Any]) -> Upstream | None:
    return Upstream.model_validate(environment["upstream"]) if environment.get("upstream") else None


def _launch(environment: Any) -> LaunchRate | None:
    try:
        return LaunchRate.model_validate(environment["launch"])
    except (KeyError, TypeError, ValidationError):
        return None


def _comparison(experiment: Experiment, group: ReferenceGroup) -> dict[str, Any]:
    """The published side of a row: nothing for a miniature or an experiment whose work was
    changed."""
    if experiment.miniature or not is_same_work(experiment):
        return {}
    return {"published": group.beside(experiment.id), "against": group}


def _meant(wanted: str, rows: Sequence[Row]) -> Sequence[Row]:
    """Of the ``rows`` of an id: runs of this checkout with a step or out of memory, else records,
    else other runs."""
    began = [row for row in rows if row.kind == "run" and (row.steps_done or row.state == "oom")]
    rows = began or [row for row in rows if row.kind == "record"] or rows
    if not rows:
        return rows
    best = max(rows, key=_preference)
    others = [row for row in rows if row.experiment.miniature == best.experiment.miniature]
    different: dict[str, Row] = {}
    for row in sorted(others, key=_preference, reverse=True):
        different.setdefault(records.work(row.experiment).model_dump_json(), row)
    if len(different) > 1 and not is_same_work(best.experiment):
        lines = []
        for row in different.values():
            apart = [
                f"{d.setting} {d.before}"
                for d in identity.differences(row.experiment, best.experiment)
            ]
            lines.append(f"  {row.label}" + (f"  ({'; '.join(apart)})" if apart else ""))
        raise UserError(
            "\n".join(
                [
                    f"{wanted}: {len(different)} different experiments ran under this id:",
                    *lines,
                    "name one of them by its label",
                ]
            )
        )
    return others


def _preference(row: Row) -> tuple[bool, bool, bool, bool, float]:
    e, started = row.experiment, row.result.started if row.result else 0.0
    return not e.miniature, is_same_work(e), row.state == "ok", not e.card, started


def _group(where: str, name: str, raw: Any) -> ReferenceGroup:
    rows = yaml_files.mapping(raw, where).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: rows must be a list of key: value pairs")
    if not isinstance(raw.get("notes", []), list):
        raise UserError(f"{where}: notes must be a list of texts (- …)")
    common = {"group": name, "hardware": raw.get("hardware"), "source": raw.get("source")}
    parsed = tuple(_reference(where, row, common) for row in rows)
    fields = {**raw, "name": name, "notes": tuple(raw.get("notes", ())), "rows": parsed}
    group = yaml_files.build(ReferenceGroup, fields, where)
    card_gib = required_gpu(group.gpu, f"{where}: gpu = {group.gpu!r}").memory_mib / 1024
    for row in group.rows:
        if not row.oom and not (0 < row.memory_gib < card_gib and row.step_ms > 1):
            raise UserError(
                f"{where}: {row.id or row.workload}: {row.memory_gib:g} GiB of {card_gib:.1f} on"
                f" this GPU, {row.step_ms:g} ms: memory_gib is in GiB (MiB / 1024), step_ms in"
                " milliseconds"
            )
    labels = [row.id for row in group.rows if row.id and row.variant is None]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{where}: {', '.join(twice)} has two rows; give one of them a variant")
    return group


def _reference(where: str, raw: dict[str, Any], common: dict[str, Any]) -> Reference:
    texts = {key: str(raw[key]) for key in ("id", "stands_for") if key in raw}
    at = f"{where}: {texts.get('id') or raw.get('workload')}"
    row = yaml_files.build(Reference, {"stands_for": texts.get("id"), **raw, **texts, **common}, at)
    if (row.id is None) == (row.workload is None):
        raise UserError(f"{at}: give either the id of an experiment or a workload in words")
    if [row.step_ms is None, row.memory_gib is None] != [row.oom, row.oom]:
        raise UserError(f"{at}: give step_ms and memory_gib, or oom: true")
    if row.stands_for != row.id and row.ran is None:
        raise UserError(f"{at}: stands_for {row.stands_for} needs ran: what it really ran")
    if row.in_doubt and row.note is None:
        raise UserError(f"{at}: ran: unknown needs a note that says why")
    return row


def _words(ran: str | None) -> str:
    return ran.replace("vpp", "VPP ") if ran else ""
