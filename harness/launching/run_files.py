"""What the launcher writes to a run directory: the run before it starts, and its result."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.data import fingerprint
from harness.experiment.hardware import peak_tflops
from harness.machine import gpus
from harness.machine.provenance import describe_environment
from harness.run import job
from harness.run.checkpoints import Saving
from harness.run.directory import RunDir
from harness.run.schema import Change, LaunchRate, MemoryGib, Rank, Result, StepMetrics, Upstream
from harness.run.step_statistics import measure
from harness.system.files import told_if_unwritable, write_json, write_text

if TYPE_CHECKING:
    from harness.launching.outcome import RunOutcome
    from harness.planning.plan import Plan


class RunFiles:
    """The files of one run that its launcher writes.

    Attributes:
        peak_tflops: dense TFLOP/s of one GPU at the run's precision; None on a CPU.
    """

    def __init__(self, plan: Plan, run_dir: RunDir, gpu_ids: tuple[int, ...]) -> None:
        self._plan, self._dir, self._gpu_ids = plan, run_dir, gpu_ids
        self._environment = describe_environment(plan.device, gpu_ids)
        self._resumed_at = _resumed_at(plan, run_dir)
        self._changed = _changed(plan, run_dir)
        self._driver_gib = gpus.kept_by_driver_gib(gpu_ids)
        gpu = self._environment["gpu"]
        self.peak_tflops = peak_tflops(gpu, plan.experiment.precision) if gpu else None

    def write_start(self, started: float, script: str) -> None:
        """Write what is known before the ranks start; ``started`` is in Unix seconds."""
        plan, saving = self._plan, self._plan.extras.saving
        running = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": started,
            "rendezvous": plan.place.rendezvous,
            "resumed_at": self._resumed_at,
            "job": own_job.id if (own_job := job.current()) else None,
        }
        write_json(self._dir.running, running)
        self._freeze(self._dir, saving)
        if saving and saving.folder:
            with told_if_unwritable(saving.folder, "SAVE"):
                saving.folder.mkdir(parents=True, exist_ok=True)
                self._freeze(RunDir(saving.folder), saving)
        write_json(self._dir.environment, self._environment)
        write_text(self._dir.command, script)

    def write_result(self, result: Result) -> None:
        """Write result.json, and to environment.json the launch rate of the slowest rank.

        In each step all ranks wait for the slowest one.
        """
        measured = [rank.launch for rank in self._dir.read_ranks() if rank.launch]
        if measured:
            slowest = LaunchRate(
                add_us=max(rate.add_us for rate in measured),
                operation_us=max(rate.operation_us for rate in measured),
            )
            self._environment["launch"] = slowest.model_dump()
            write_json(self._dir.environment, self._environment)
        write_json(self._dir.result, result.model_dump(mode="json"))

    def result(
        self, found: RunOutcome, metrics: Sequence[StepMetrics], memory: MemoryGib, **more: object
    ) -> Result:
        """The result of a run that ends now; ``more``: fields that only its launcher knows."""
        experiment = self._plan.experiment
        evaluations = [v for v in self._dir.read_validation() if v.split == "validation"]
        detail = found.detail
        if not metrics and not detail:
            detail = "the steps of this run are recorded on the node of the last rank"
        return Result(
            status=found.status,
            detail=detail,
            rank=found.rank,
            advice=found.advice,
            finished=time.time(),
            steps=experiment.steps,
            peak_tflops=self.peak_tflops,
            memory_gib=memory,
            validation=evaluations[-1] if evaluations else None,
            resumed_at=self._resumed_at,
            changed=self._changed,
            data=experiment.data,
            device=self._plan.device,
            gpu=self._environment["gpu"],
            gpus=self._gpu_ids,
            miniature=experiment.miniature,
            upstream=Upstream.model_validate(self._environment["upstream"]),
            **measure(experiment, metrics, self.peak_tflops, self._changed),
            **more,
        )

    def memory_gib(self, ranks: Iterable[Rank], sampled_gib: float | None) -> MemoryGib:
        """Peaks of the fullest rank; ``sampled_gib`` is the most that NVML samples showed."""
        ranks = tuple(ranks)
        return MemoryGib(
            allocated=_most(rank.allocated_peak_gib for rank in ranks),
            reserved=_most(rank.reserved_peak_gib for rank in ranks),
            nvml=_most([sampled_gib, *(rank.nvml_used_gib for rank in ranks)]),
            driver=self._driver_gib,
            rss=_most(rank.rss_peak_gib for rank in ranks),
        )

    def _freeze(self, run_dir: RunDir, saving: Saving | None) -> None:
        experiment = self._plan.experiment
        run_dir.freeze_experiment(
            experiment,
            self._plan.device,
            self._environment["commit"],
            saving,
            self._changed,
            fingerprint.of(experiment.data),
        )


def exit_code(returncode: int, stopped_by: signal.Signals | None) -> int:
    """The run's exit code as a shell reports it: 128 + n where signal n ended it."""
    if stopped_by:
        return 128 + stopped_by
    return returncode if returncode >= 0 else 128 - returncode


def _resumed_at(plan: Plan, run_dir: RunDir) -> tuple[int, ...]:
    """Steps at which the run was resumed, this time included."""
    if not plan.resumes:
        return ()
    running = run_dir.read_running()
    return (*(running.resumed_at if running else ()), plan.first_step)


def _changed(plan: Plan, run_dir: RunDir) -> tuple[Change, ...]:
    """Settings that changed when the run was resumed, this time included."""
    step = plan.first_step
    if not plan.resumes or not step:
        return ()
    earlier = [
        change.model_copy(update={"step": min(change.step, step)})
        for change in run_dir.read_changes()
    ]
    fields = ("setting", "before", "now", "curve", "work")
    now = [
        Change(step=step, **{name: getattr(difference, name) for name in fields})
        for difference in plan.changed
    ]
    return (*earlier, *now)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
