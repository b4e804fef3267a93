"""The run directory: every file name in it, and typed readers that survive what a killed run
leaves.

experiment.json    the frozen experiment with its overrides, and the device and source commit it ran
                   with
command.sh         exactly what ran; ``HARNESS_RUN_DIR=… bash command.sh`` runs it again
environment.json   versions, GPU, driver, git commit, upstream commit, host, launch rate
logs.txt           everything that the ranks and torchrun printed
metrics.jsonl      one line a step          validation.jsonl   one line an evaluation
saves.jsonl        one line a checkpoint    checkpoints/       with SAVE=1
ranks/             <rank>.json (memory, coordinates), <rank>.error.json, <rank>.stacks.txt
traces/            <rank>.json.gz: Kineto traces of a profiled run; profile.json: what they say
gpus.jsonl         NVML samples
running.json       who started it, when, and where its nodes meet
lock               who has it now (harness/system/locks.py); without result.json and with nobody
                   there: killed
result.json        written last
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from harness.errors import UserError, first_line
from harness.system import locks
from harness.system.files import (
    MAKE_ROOM,
    complaint,
    json_object,
    make_folder,
    read_object,
    sync_folder,
    text_lines,
    told_if_unwritable,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from harness.experiment.catalog import Experiment
    from harness.run.checkpoints import Saving

Status = Literal[
    "ok", "oom", "oom-host", "nan", "hang", "crash", "killed", "bad-configuration", "target-missed"
]
State = Status | Literal["running"]

RUN_DIR_VARIABLE = "HARNESS_RUN_DIR"
"""Environment variable that tells the ranks where to write, and marks every process of a run."""

TURN_VARIABLE = "HARNESS_TURN"
"""Environment variable with the path of a file: ranks import everything, then wait until it is
there."""

PROFILE_VARIABLE = "HARNESS_PROFILE"
"""Environment variable that tells the ranks which steps to trace: ``8-9``."""

LEAST_FREE_MIB = 200


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StepMetrics(_Record):
    """One line of metrics.jsonl. ``tflops``: model TFLOP/s per GPU (flops.py), or upstream's count
    where a line has no ``upstream_tflops`` (runs before these were told apart); ``time``: Unix
    seconds.

    ``forward_backward_ms`` and ``optimizer_ms`` are of the rank that writes, the last one; see
    harness/entry/phases.py.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    step_ms: FiniteFloat
    forward_backward_ms: FiniteFloat | None = None
    optimizer_ms: FiniteFloat | None = None
    tflops: FiniteFloat | None = None
    upstream_tflops: FiniteFloat | None = None
    tokens_per_s: FiniteFloat | None = None
    learning_rate: float | None = None
    loss_scale: float | None = None
    skipped: int = 0
    nan: int = 0
    time: FiniteFloat


class Validation(_Record):
    """One line of validation.jsonl."""

    step: int
    split: str
    loss: float
    time: float


class Save(_Record):
    """One line of saves.jsonl: a checkpoint that became whole.

    ``blocked_ms``: training waited so long for it. It was whole ``whole_after_s`` after its begin,
    when training was at step ``whole_at_step``. ``time``: Unix seconds.
    """

    step: int
    asynchronous: bool
    blocked_ms: float
    whole_after_s: float
    whole_at_step: int
    gib: float
    time: float


class LaunchRate(_Record):
    """Host time to launch an operation through PyTorch, in µs; see harness/entry/launch_rate.py."""

    add_us: float
    operation_us: float


class Rank(_Record):
    """ranks/<rank>.json: where a rank runs, its memory peaks so far in GiB, and where its time
    went.

    ``forward_backward_ms`` and ``optimizer_ms`` are medians over its steps so far but the first
    few; ``gc_ms`` is the time of Python's full garbage collections by the step in which they
    happened.
    """

    rank: int
    local_rank: int
    pid: int
    host: str
    device: str | None = None
    coordinates: dict[str, int] = {}
    allocated_peak_gib: float | None = None
    reserved_peak_gib: float | None = None
    nvml_used_gib: float | None = None
    rss_peak_gib: float | None = None
    forward_backward_ms: float | None = None
    optimizer_ms: float | None = None
    gc_ms: dict[int, float] = {}
    launch: LaunchRate | None = None
    step: int = 0


class RankError(_Record):
    """ranks/<rank>.error.json: an exception that nothing caught. ``time`` is in Unix seconds."""

    rank: int
    type: str
    message: str
    traceback: str = ""
    time: float
    step: int = 0


class Running(_Record):
    """running.json: the launcher's process, when it started the run (Unix seconds), and where its
    nodes meet."""

    pid: int
    host: str
    started: float
    rendezvous: str | None = None
    resumed_at: tuple[int, ...] = ()


class Change(_Record):
    """A setting that another value has since the run was resumed after ``step``.

    ``curve``: its losses depend on it. ``work``: its step times do, so that the run is of more than
    one experiment.
    """

    step: int
    setting: str
    before: str
    now: str
    curve: bool = False
    work: bool = True


class _Kept(_Record):
    """``saving`` in experiment.json."""

    every: Annotated[int, Field(ge=1)]
    keep: Annotated[int, Field(ge=1)] | None = None
    folder: str | None = None


class _Changed(_Record):
    changed: tuple[Change, ...] = ()


class Spread(_Record):
    """A quantity over the ``n`` steps of a run's averaging window; ``q1`` and ``q3`` are its
    quartiles."""

    median: float
    q1: float
    q3: float
    mean: float
    stdev: float
    min: float
    max: float
    n: int

    @property
    def half_iqr(self) -> float:
        """Half the interquartile range: how far steps scatter, which a few slow ones do not
        move."""
        return (self.q3 - self.q1) / 2


class MemoryGib(_Record):
    """Peaks of the fullest rank: of PyTorch's allocator, of its whole GPU as nvidia-smi shows it,
    and on the host.

    ``driver`` is what the driver keeps for itself and ``nvml`` leaves out; where it is None on a
    GPU, ``nvml`` includes it.
    """

    allocated: float | None = None
    reserved: float | None = None
    nvml: float | None = None
    driver: float | None = None
    rss: float | None = None


class Losses(_Record):
    first: float | None = None
    last: float | None = None


class Upstream(_Record):
    """The Megatron-LM that ran: a source tree (``submodule``) or the package from PyPI."""

    version: str | None = None
    commit: str | None = None
    source: Literal["submodule", "package"] = "package"


class Result(_Record):
    """result.json. ``forward_backward_ms`` to ``mfu`` are medians over the steps in ``window``."""

    status: Status
    detail: str | None = None
    rank: int | None = None
    advice: str | None = None
    exit_code: int
    started: float
    finished: float
    steps: int
    steps_done: int
    window: tuple[int, int] | None = None
    step_ms: Spread | None = None
    forward_backward_ms: float | None = None
    optimizer_ms: float | None = None
    tflops: float | None = None
    counted: Literal["model", "upstream"] = "upstream"
    """Whose count of FLOPs ``tflops`` and ``mfu`` state: step_flops in flops.py, or upstream's."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_tflops: float | None = None
    memory_gib: MemoryGib = MemoryGib()
    loss: Losses = Losses()
    validation: Validation | None = None
    """The last evaluation on held-out data."""
    resumed_at: tuple[int, ...] = ()
    """Steps from which training was gone on with after an interruption."""
    changed: tuple[Change, ...] = ()
    """Settings that changed when it was resumed."""

    @property
    def mixed(self) -> tuple[Change, ...]:
        """The changes that make it a run of more than one experiment."""
        return tuple(change for change in self.changed if change.work)

    data: str
    device: str
    gpu: str | None = None
    gpus: tuple[int, ...] = ()
    packed_with: tuple[str, ...] = ()
    miniature: bool = False
    upstream: Upstream = Upstream()


@dataclass(frozen=True)
class RunDir:
    """The files of one run directory."""

    path: Path

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def experiment_json(self) -> Path:
        return self.path / "experiment.json"

    @property
    def command(self) -> Path:
        return self.path / "command.sh"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs.txt"

    def logs_of_node(self, node_rank: int) -> Path:
        """Where a further node logs that shares this directory."""
        return self.path / f"logs.node{node_rank}.txt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def saves(self) -> Path:
        return self.path / "saves.jsonl"

    @property
    def wandb_run(self) -> Path:
        """Names this run's run at Weights & Biases."""
        return self.path / "wandb.json"

    @property
    def checkpoints(self) -> Path:
        """Where this run keeps checkpoints: in here, unless SAVE= named a folder."""
        saving = self.read_saving()
        return saving.in_run(self.path) if saving else self.path / "checkpoints"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def gpus(self) -> Path:
        return self.path / "gpus.jsonl"

    @property
    def running(self) -> Path:
        return self.path / "running.json"

    @property
    def turn(self) -> Path:
        """Tells the ranks of a held run that it is their turn."""
        return self.path / "turn"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def freeze_experiment(
        self,
        experiment: Experiment,
        device: str,
        commit: str | None,
        saving: Saving | None = None,
        changed: Iterable[Change] = (),
        data_sets: Mapping[str, Any] | None = None,
    ) -> None:
        """Write experiment.json: every setting, the device, the source commit, how checkpoints are
        kept, which settings ``changed`` when it was resumed, and what its ``data_sets`` are
        (harness/data/fingerprint.py)."""
        kept = saving and {
            "every": saving.every,
            "keep": saving.keep,
            "folder": saving.folder and str(saving.folder),
        }
        more = {"device": device, "commit": commit, "saving": kept}
        more |= {
            "changed": [change.model_dump(mode="json") for change in changed],
            "data_sets": data_sets or {},
        }
        write_json(self.experiment_json, {**experiment.model_dump(mode="json"), **more})

    def read_saving(self) -> Saving | None:
        """How this run keeps checkpoints; None where it keeps none, or experiment.json does not
        say."""
        from harness.run.checkpoints import Saving

        try:
            kept = _Kept.model_validate(read_object(self.experiment_json).get("saving"))
        except ValueError:
            return None
        return Saving(kept.every, kept.keep, Path(kept.folder) if kept.folder else None)

    def read_data_sets(self) -> dict[str, Any]:
        """What its data sets were, by name; empty where experiment.json does not say."""
        try:
            known = read_object(self.experiment_json).get("data_sets")
        except ValueError:
            return {}
        return known if isinstance(known, dict) else {}

    def read_changes(self) -> tuple[Change, ...]:
        """Settings that changed when it was resumed, in experiment.json; none where that does not
        say."""
        try:
            return _Changed.model_validate(read_object(self.experiment_json)).changed
        except ValueError:
            return ()

    def read_experiment(self) -> Experiment:
        """The experiment as it ran. Raises ValueError where experiment.json is not one."""
        return experiment_in(read_object(self.experiment_json))

    def read_device(self) -> str:
        """``cpu`` or ``cuda``. Raises ValueError where experiment.json does not say."""
        device = read_object(self.experiment_json).get("device")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"{self.experiment_json}: device is {device!r}")
        return device

    def read_result(self) -> Result | None:
        """The result, or None where the run has written none. Raises ValueError where it is
        corrupt."""
        return _read(self.result, Result) if self.result.exists() else None

    def read_running(self) -> Running | None:
        """Who runs or ran it, or None where that is not known."""
        try:
            return _read(self.running, Running)
        except ValueError:
            return None

    def read_metrics(self) -> tuple[StepMetrics, ...]:
        """Every complete line of metrics.jsonl; a line torn by a kill is left out."""
        return tuple(_lines(self.metrics, StepMetrics))

    def read_validation(self) -> tuple[Validation, ...]:
        """Every evaluation in validation.jsonl; of two of one step the first, which decides whether
        a loss is reached.

        Upstream evaluates once more at the end, on other batches, where an older run or one that
        was resumed has two.
        """
        found: dict[tuple[str, int], Validation] = {}
        for line in _lines(self.validation, Validation):
            found.setdefault((line.split, line.step), line)
        return tuple(found.values())

    def read_saves(self) -> tuple[Save, ...]:
        """Every complete line of saves.jsonl."""
        return tuple(_lines(self.saves, Save))

    def read_ranks(self) -> tuple[Rank, ...]:
        """What every rank wrote about itself, by rank."""
        return self._rank_files(r"\d+\.json", Rank)

    def read_rank_errors(self) -> tuple[RankError, ...]:
        """The exceptions that ended ranks, by rank."""
        return self._rank_files(r"\d+\.error\.json", RankError)

    def stacks(self) -> dict[int, Path]:
        """rank -> the file with the stacks of its threads."""
        return {
            int(path.name.split(".")[0]): path for path in sorted(self.ranks.glob("*.stacks.txt"))
        }

    def state(self) -> State:
        """``running`` while a process has its lock, else how the run ended; ``killed`` where it
        left no result.

        For listings: another machine's lock is not watched (``locks.holder``). What deletes or
        resumes a run takes its lock.

        Raises ValueError where result.json is corrupt.
        """
        if locks.holder(self.path, watch=False):
            return "running"
        result = self.read_result()
        return result.status if result else "killed"

    def _rank_files[Record: _Record](self, pattern: str, kind: type[Record]) -> tuple[Record, ...]:
        found = []
        for path in self.ranks.glob("*.json"):
            if re.fullmatch(pattern, path.name):
                try:
                    found.append(_read(path, kind))
                except ValueError:
                    continue
        return tuple(sorted(found, key=lambda record: record.rank))


@dataclass(frozen=True)
class Run:
    """A run directory that could be read."""

    dir: RunDir
    experiment: Experiment
    device: str
    state: State
    result: Result | None


def experiment_in(frozen: Mapping[str, Any]) -> Experiment:
    """The experiment that ``frozen`` describes, keys of other versions left out. Raises
    ValidationError where it is none."""
    from harness.experiment.catalog import Experiment

    return Experiment.model_validate_json(
        json.dumps({k: v for k, v in frozen.items() if k in Experiment.model_fields})
    )


def create(outdir: Path, label: str) -> RunDir:
    """Create ``outdir/label``, or ``label.2``, ``label.3`` … where that exists: nothing is ever
    overwritten.

    Safe against another launcher that does the same at the same moment.

    Raises:
        UserError: the label is no file name, ``outdir`` cannot be written, or its disk is nearly
        full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,199}", label):
        raise UserError(
            f"run label {label!r}: use letters, digits and . _ + = , - (at most 200), a letter or digit first"  # noqa: E501
        )
    with told_if_unwritable(outdir):
        make_folder(outdir)
        free_mib = shutil.disk_usage(outdir).free / 2**20
        if free_mib < LEAST_FREE_MIB:
            raise UserError(
                f"{outdir}: {free_mib:.0f} MiB free, a run needs {LEAST_FREE_MIB} MiB\n"
                f"{MAKE_ROOM}, or set OUTDIR= to another disk"
            )
        for name in itertools.chain([label], (f"{label}.{n}" for n in itertools.count(2))):
            path = outdir / name
            try:
                path.mkdir()
            except FileExistsError:
                continue
            (path / "ranks").mkdir()
            sync_folder(outdir)
            return RunDir(path.resolve())


def go_on(run_dir: RunDir, step: int) -> None:
    """Prepare ``run_dir`` for training on from ``step``: later lines are cut off, the log and the
    result are put aside."""
    number = 1 + len(list(run_dir.path.glob("logs.[0-9]*.txt")))
    for path, aside in (
        (run_dir.result, f"result.{number}.json"),
        (run_dir.logs, f"logs.{number}.txt"),
    ):
        if path.exists():
            path.rename(run_dir.path / aside)
    for path in (run_dir.metrics, run_dir.validation, run_dir.saves):
        lines = [
            line
            for line in text_lines(path)
            if (json_object(line) or {}).get("step", math.inf) <= step
        ]
        if path.exists():
            write_text(path, "".join(f"{line}\n" for line in lines))
    for path in run_dir.ranks.iterdir():
        path.unlink()


def still_runs(run_dir: RunDir, holder: locks.Holder | None) -> str:
    """That ``holder`` has ``run_dir``, and what to do about it."""
    way_out = (
        f"wait until it is over, or end it on {holder.host}" if holder else "wait until it is over"
    )
    if holder and holder.is_here:
        way_out = f"make stop RUN={run_dir.label} OUTDIR={run_dir.path.parent} ends it"
    return f"{run_dir.label} still runs: {holder or 'another process'} has it\n{way_out}"


def changes_in_words(changed: Iterable[Change]) -> str:
    """Which settings changed while it ran: ``LR 0.001 -> 0.0001 after step 40``."""
    return "; ".join(
        f"{change.setting} {change.before} -> {change.now} after step {change.step}"
        for change in changed
    )


def perplexity(loss: float) -> float | None:
    """e to the loss (nats a token), or None where that is no number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def runs(outdir: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Every run in ``outdir`` by label, and a warning for each directory that is corrupt and was
    left out."""
    found, warnings = [], []
    for path in sorted(outdir.iterdir()) if outdir.is_dir() else []:
        run_dir = RunDir(path)
        if not run_dir.experiment_json.exists() and not run_dir.result.exists():
            continue
        try:
            found.append(
                Run(
                    run_dir,
                    run_dir.read_experiment(),
                    run_dir.read_device(),
                    run_dir.state(),
                    run_dir.read_result(),
                )
            )
        except ValueError as error:
            warnings.append(f"{path}: skipped: {first_line(error)}")
    return tuple(found), tuple(warnings)


def parse_metrics(line: str) -> StepMetrics | None:
    """One line of metrics.jsonl, or None where it is torn."""
    return _parse(line, StepMetrics)


def parse_rank(raw: Mapping[str, Any]) -> Rank | None:
    """What a rank of another node wrote about itself, or None where it is none."""
    try:
        return Rank.model_validate(raw)
    except ValidationError:
        return None


def _read[Record: _Record](path: Path, kind: type[Record]) -> Record:
    try:
        return kind.model_validate(read_object(path))
    except ValidationError as error:
        raise ValueError(complaint(path, error)) from None


def _parse[Record: _Record](line: str, kind: type[Record]) -> Record | None:
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        return None


def _lines[Record: _Record](path: Path, kind: type[Record]) -> Iterator[Record]:
    return (record for line in text_lines(path) if (record := _parse(line, kind)))
