"""Kineto traces of a few steps: of the first rank of every pipeline stage.

Upstream's ``--profile --use-pytorch-profiler`` traces too, but its ranks are chosen by hand, the
trace does not name forward, backward and optimizer, and a failing profiler ends the run. Here the
same torch.profiler runs with these phases named; where it fails, the run continues without a trace.
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
"""Functions of megatron/core/pipeline_parallel/schedules.py, called once per micro-batch and model
chunk. Upstream's timers forward-compute and backward-compute time them."""


def install(report: RankReport) -> None:
    """Trace the steps in ``HARNESS_PROFILE``, if that is set."""
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
    """Tell ``tracer`` when steps begin and end.

    As upstream times them, a step ends with ``training_log``.
    """
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
    """Warms the profiler up in the step before the first, traces, and writes the trace."""

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
        # whatever CUPTI or a full disk raises: the run is worth more than its trace
        except Exception as error:
            print(
                f"harness: no trace of rank {self._report.rank}, the run continues: {error}",
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
