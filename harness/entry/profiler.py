"""Kineto traces of a few steps: of rank 0, and of one rank in every pipeline stage.

Upstream's own ``--profile --use-pytorch-profiler`` would trace as well, but its ranks are named by
hand, it does not say which kernel belongs to forward, backward or optimizer, and a profiler that
fails ends its run. Here the same torch.profiler runs within the entry, with the names of those
phases in the trace; where it fails, the run goes on without.
"""

import functools
import os
import sys
from collections.abc import Callable

from harness.entry.phases import wrap_phases
from harness.entry.report import RankReport
from harness.profiling.trace import RANGE, STEP
from harness.run.directory import PROFILE_VARIABLE

PHASES = {"forward_step": "forward", "backward_step": "backward"}
"""Functions of upstream's schedules, a call for each micro-batch and model chunk: what its
forward-compute and backward-compute timers time."""


def install(report: RankReport) -> None:
    """Trace the steps that the environment names, if it names any."""
    named = os.environ.get(PROFILE_VARIABLE)
    if not named:
        return
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training
    from torch.profiler import record_function

    def within(phase: str, work: Callable) -> Callable:
        @functools.wraps(work)
        def ranged(*args, **kwargs):
            with record_function(RANGE + phase):
                return work(*args, **kwargs)

        return ranged

    for name, phase in PHASES.items():
        setattr(schedules, name, within(phase, getattr(schedules, name)))
    wrap_phases(training, lambda phase, work: within(phase, work) if phase == "optimizer" else work)
    first, last = map(int, named.split("-"))
    _follow_steps(training, _Tracer(report, first, last))


def _follow_steps(training, tracer: "_Tracer") -> None:
    """Tell ``tracer`` when steps begin and end; a step is what upstream times: ``train_step`` and
    ``training_log``."""
    train_step, training_log = training.train_step, training.training_log

    def step(*args, iteration: int, **kwargs):
        tracer.before(iteration + 1)
        return train_step(*args, iteration=iteration, **kwargs)

    def log(losses, totals, learning_rate, step, *args, **kwargs):
        result = training_log(losses, totals, learning_rate, step, *args, **kwargs)
        tracer.after(step)
        return result

    training.train_step, training.training_log = step, log


class _Tracer:
    """Warms the profiler up one step early, traces, and writes what it saw after the last step."""

    def __init__(self, report: RankReport, first: int, last: int) -> None:
        self._report, self._first, self._last = report, first, last
        self._profile = self._range = None

    def before(self, step: int) -> None:
        """Begin step number ``step``."""
        from torch.profiler import profile, record_function, schedule

        if step == self._first - 1 and _is_traced():
            self._guarded(
                lambda: self._start(
                    profile(
                        schedule=schedule(wait=0, warmup=1, active=self._last - self._first + 1)
                    )
                )
            )
        elif self._profile and step >= self._first:
            self._guarded(self._profile.step)
            self._range = record_function(f"{STEP}{step}")
            self._range.__enter__()

    def after(self, step: int) -> None:
        """End step number ``step``."""
        if self._range:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._profile and step >= self._last:
            self._guarded(self._write)
            self._profile = None

    def _start(self, profile) -> None:
        profile.start()
        self._profile = profile

    def _write(self) -> None:
        self._profile.stop()
        folder = self._report.run_dir.traces
        folder.mkdir(exist_ok=True)
        target = folder / f"{self._report.rank}.json.gz"
        partial = target.with_name(f".{os.getpid()}.json.gz")
        self._profile.export_chrome_trace(str(partial))
        partial.replace(target)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        # whatever CUPTI or a full disk says: a run without its trace is still a run
        except Exception as error:
            print(
                f"harness: no trace of rank {self._report.rank}, the run goes on: {error}",
                file=sys.stderr,
            )
            self._profile = None


def _is_traced() -> bool:
    """Whether this is the first rank of its pipeline stage."""
    from megatron.core import parallel_state as state

    return not any(
        (
            state.get_tensor_model_parallel_rank(),
            state.get_context_parallel_rank(),
            state.get_data_parallel_rank(),
        )
    )
