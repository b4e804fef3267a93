"""What a run writes: one typed record for each line or file of its directory.

Records are written by one version of this code and read by later ones: fields added later have a
default, and unknown fields are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

Status = Literal[
    "ok", "oom", "oom-host", "nan", "hang", "crash", "killed", "bad-configuration", "target-missed"
]
State = Status | Literal["running"]


class RunRecord(BaseModel):
    """Base of every record."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StepMetrics(RunRecord):
    """One line of metrics.jsonl. ``time``: Unix seconds.

    ``tflops`` is model TFLOP/s per GPU (harness/predict/flops.py). A line without
    ``upstream_tflops`` is of an early run, and its ``tflops`` follows upstream's count of FLOPs.
    ``forward_backward_ms`` and ``optimizer_ms`` are of the last rank; see harness/entry/phases.py.
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


class Validation(RunRecord):
    """One line of validation.jsonl: an evaluation. ``loss``: nats a token; ``time``: Unix
    seconds."""

    step: int
    split: str
    loss: float
    time: float


class Save(RunRecord):
    """One line of saves.jsonl: a checkpoint that is complete on the disk.

    ``blocked_ms``: how long training waited for it. It was complete ``whole_after_s`` after it was
    begun, when training was at step ``whole_at_step``. ``time``: Unix seconds.
    """

    step: int
    asynchronous: bool
    blocked_ms: float
    whole_after_s: float
    whole_at_step: int
    gib: float
    time: float


class LaunchRate(RunRecord):
    """Host time to launch an operation through PyTorch, in µs; see harness/entry/launch_rate.py."""

    add_us: float
    operation_us: float


class Rank(RunRecord):
    """ranks/<rank>.json: where a rank runs, its memory peaks so far, and where its time goes.

    ``forward_backward_ms`` and ``optimizer_ms`` are medians over its steps so far without the first
    few. ``gc_ms``: time of Python's full garbage collections, by the step in which they happened.
    ``asked_to_end``: some rank received ``EXIT_SIGNAL``, so that all saved a checkpoint and ended.
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
    asked_to_end: bool = False


class RankError(RunRecord):
    """ranks/<rank>.error.json: the exception that ended a rank. ``time``: Unix seconds."""

    rank: int
    type: str
    message: str
    traceback: str = ""
    time: float
    step: int = 0


class Running(RunRecord):
    """running.json: the launcher's process, when it started the run (Unix seconds), the rendezvous
    of its nodes, and the batch job that it belongs to (``harness.run.job``)."""

    pid: int
    host: str
    started: float
    rendezvous: str | None = None
    resumed_at: tuple[int, ...] = ()
    job: str | None = None


class Change(RunRecord):
    """A setting whose value changed when the run was resumed after ``step``.

    ``curve``: the losses depend on it. ``work``: the step times depend on it, so that the run
    measures more than one experiment.
    """

    step: int
    setting: str
    before: str
    now: str
    curve: bool = False
    work: bool = True


class Spread(RunRecord):
    """A quantity over the ``n`` steps of a run's averaging window; ``q1`` and ``q3`` are
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
        """Half the interquartile range: the scatter of steps, robust against a few slow ones."""
        return (self.q3 - self.q1) / 2


class MemoryGib(RunRecord):
    """Peaks of the fullest rank: PyTorch's allocator, the whole GPU as nvidia-smi shows it, the
    host.

    ``driver``: what the driver reserves and ``nvml`` does not count. Where it is None on a GPU,
    ``nvml`` includes it.
    """

    allocated: float | None = None
    reserved: float | None = None
    nvml: float | None = None
    driver: float | None = None
    rss: float | None = None


class Losses(RunRecord):
    """Training loss of the first and the last step."""

    first: float | None = None
    last: float | None = None


class Upstream(RunRecord):
    """The Megatron-LM that ran: a source tree (``submodule``) or the package from PyPI."""

    version: str | None = None
    commit: str | None = None
    source: Literal["submodule", "package"] = "package"


class Result(RunRecord):
    """result.json. ``forward_backward_ms`` to ``mfu`` are medians over the steps in ``window``.

    ``counted``: whose count of FLOPs ``tflops`` and ``mfu`` follow, harness/predict/flops.py or
    upstream. ``validation``: the last evaluation. ``resumed_at``: steps at which the run was
    resumed; ``changed``: settings that changed then.
    """

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
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_tflops: float | None = None
    memory_gib: MemoryGib = MemoryGib()
    loss: Losses = Losses()
    validation: Validation | None = None
    resumed_at: tuple[int, ...] = ()
    changed: tuple[Change, ...] = ()
    data: str
    device: str
    gpu: str | None = None
    gpus: tuple[int, ...] = ()
    packed_with: tuple[str, ...] = ()
    miniature: bool = False
    upstream: Upstream = Upstream()

    @property
    def mixed(self) -> tuple[Change, ...]:
        """Changes that make the run measure more than one experiment."""
        return tuple(change for change in self.changed if change.work)


def parse_metrics(line: str) -> StepMetrics | None:
    """One line of metrics.jsonl; None where a kill left it incomplete."""
    return parse_line(line, StepMetrics)


def parse_line[Record: RunRecord](line: str, kind: type[Record]) -> Record | None:
    """The record in a line of JSON; None where there is none."""
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        return None


def changes_in_words(changed: Iterable[Change]) -> str:
    """Which settings changed during a run: ``LR 0.001 -> 0.0001 after step 40``."""
    return "; ".join(
        f"{change.setting} {change.before} -> {change.now} after step {change.step}"
        for change in changed
    )


def perplexity(loss: float) -> float | None:
    """e to the ``loss`` (nats a token); None where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None
