"""Time of forward-backward and of the optimizer in every step, by two CUDA events each.

Upstream's own timers (``--timing-log-level 1``: ``forward-backward``, ``optimizer``) synchronise
with the GPU and, by default, with all ranks before and after, which lengthens the step. An event is
a mark in the GPU's queue. It is read once upstream has synchronised to time the whole step
(megatron/core/timers.py).

``forward_backward_ms`` includes the reduction of gradients and, in a pipeline, waiting for other
stages. ``optimizer_ms`` includes clipping and, where a distributed optimizer does not overlap it,
gathering parameters.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

FIRST_STEPS = 5
"""Steps that compile, autotune and grow memory: left out of medians, like those before
``window_first_step`` of an experiment."""

Wrap = Callable[[str, Callable], Callable]


class PhaseClock:
    """CUDA events around the phases of the current step; on a CPU they read the host's clock."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any, Any]] = []
        self._history: dict[str, list[float]] = {}

    def begin_step(self) -> None:
        """Forget the events of the step before."""
        self._events.clear()

    def around(self, phase: str, work: Callable) -> Callable:
        """``work`` with an event before and after it."""
        from torch.cuda import Event

        def timed(*args, **kwargs):
            start, end = Event(enable_timing=True), Event(enable_timing=True)
            start.record()
            result = work(*args, **kwargs)
            end.record()
            self._events.append((phase, start, end))
            return result

        return timed

    def read_ms(self) -> dict[str, float]:
        """Time of each phase in this step, in ms. The GPU must have finished the step."""
        found: dict[str, float] = {}
        for phase, start, end in self._events:
            found[phase] = found.get(phase, 0.0) + start.elapsed_time(end)
        self._events.clear()
        for phase, ms in found.items():
            self._history.setdefault(phase, []).append(ms)
        return found

    def medians_ms(self) -> dict[str, float]:
        """Medians over the steps so far, without the first few where there are later ones."""
        return {
            phase: statistics.median(ms[FIRST_STEPS:] or ms) for phase, ms in self._history.items()
        }


def wrap_phases(
    training: ModuleType, wrap: Wrap, begin_step: Callable[[], None] = lambda: None
) -> None:
    """Wrap ``forward_backward`` and ``optimizer`` of every training step.

    Args:
        training: upstream's ``megatron.training.training``.
        wrap: called with the phase's name and the function that is the phase.
        begin_step: called before each step.
    """
    train_step = training.train_step

    @functools.wraps(train_step)
    def step(*args, **kwargs):
        # as upstream calls it: forward step, iterator, model, optimizer, scheduler, config,
        # forward-backward
        given, optimizer = list(args), args[3]
        begin_step()
        given[6] = wrap("forward_backward", given[6])
        with _replaced(optimizer, "step", wrap("optimizer", optimizer.step)):
            return train_step(*given, **kwargs)

    training.train_step = step


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance; afterwards restore it, or remove it to uncover a method."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
