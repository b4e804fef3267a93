"""How long forward-backward and the optimizer take in every step, at the cost of two CUDA events
each.

Upstream's own timers for them (``--timing-log-level 1``: ``forward-backward``, ``optimizer``) wait
for the GPU and, by default, for all ranks, before and after; that lengthens the step. An event is a
mark in the GPU's queue that nothing waits for; its time is read once upstream has drained the queue
to time the step (megatron/core/timers.py).

``forward_backward_ms`` includes what a pipeline stage waits for its neighbours and the reduction of
gradients; ``optimizer_ms`` includes clipping and, with a distributed optimizer that does not
overlap it, gathering parameters.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

FIRST_STEPS = 5
"""Steps that compile, tune and grow memory, left out of medians: as ``window_first_step`` of an
experiment."""

Wrap = Callable[[str, Callable], Callable]


class PhaseClock:
    """Marks on the GPU's time line around the phases of the current step; on a CPU, on the host's
    clock."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []
        self._history: dict[str, list[float]] = {}

    def begin_step(self) -> None:
        """Forget the marks of the step before."""
        self._marks.clear()

    def around(self, phase: str, work: Callable) -> Callable:
        """``work`` with a mark before and after it."""
        from torch.cuda import Event

        def timed(*args, **kwargs):
            start, end = Event(enable_timing=True), Event(enable_timing=True)
            start.record()
            result = work(*args, **kwargs)
            end.record()
            self._marks.append((phase, start, end))
            return result

        return timed

    def read_ms(self) -> dict[str, float]:
        """The phases' times in this step, in ms. The GPU must be done with the step."""
        found: dict[str, float] = {}
        for phase, start, end in self._marks:
            found[phase] = found.get(phase, 0.0) + start.elapsed_time(end)
        self._marks.clear()
        for phase, ms in found.items():
            self._history.setdefault(phase, []).append(ms)
        return found

    def medians_ms(self) -> dict[str, float]:
        """The medians over all steps that were read, but the first few where there are later
        ones."""
        return {
            phase: statistics.median(ms[FIRST_STEPS:] or ms) for phase, ms in self._history.items()
        }


def wrap_phases(
    training: ModuleType, wrap: Wrap, begin_step: Callable[[], None] = lambda: None
) -> None:
    """Have every training step run ``forward_backward`` and ``optimizer`` as ``wrap`` returns them.

    Args:
        training: upstream's ``megatron.training.training``.
        wrap: called with the phase's name and the function that is the phase.
        begin_step: called before each step.
    """
    train_step = training.train_step

    @functools.wraps(train_step)
    def step(
        forward_step,
        iterator,
        model,
        optimizer,
        scheduler,
        config,
        forward_backward,
        *args,
        **kwargs,
    ):
        begin_step()
        forward_backward = wrap("forward_backward", forward_backward)
        with _replaced(optimizer, "step", wrap("optimizer", optimizer.step)):
            return train_step(
                forward_step,
                iterator,
                model,
                optimizer,
                scheduler,
                config,
                forward_backward,
                *args,
                **kwargs,
            )

    training.train_step = step


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance, and afterwards whatever it was; a method of its class shows
    again."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
