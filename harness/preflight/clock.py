"""Time of an operation on the device, and of the host that launches it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

BATCHES = 5
WARM_UP = 2
MOST_CALLS = 200


@dataclass(frozen=True)
class Clock:
    """Times operations on a GPU by CUDA events, and on a CPU by the host's clock.

    Attributes:
        batch_s: about how long one batch of calls takes; ``BATCHES`` are measured.
    """

    device: str
    batch_s: float

    def device_us(self, call: Callable[[], object], calls: int | None = None) -> float:
        """Median time of one call in µs on the device, while others before and after are queued.

        Args:
            calls: how many make a batch, where all ranks must call as often; None: as many as fill
                ``batch_s``.
        """
        for _ in range(WARM_UP):
            call()
        if calls is None:
            once_s = self.batch_time_s(call, 1)
            calls = max(1, min(MOST_CALLS, round(self.batch_s / max(once_s, 1e-6))))
        times_s = [self.batch_time_s(call, calls) / calls for _ in range(BATCHES)]
        return statistics.median(times_s) * 1e6

    def host_us(self, call: Callable[[], object], batches: int = BATCHES) -> float:
        """Median time in µs from before ``call`` until the device has done all of it."""
        for _ in range(WARM_UP):
            call()
        return statistics.median(self._host_s(call) for _ in range(batches)) * 1e6

    def launch_us(self, call: Callable[[], object]) -> float:
        """Median time in µs in which the host launches ``call``; the device works on."""
        times = []
        for _ in range(WARM_UP + BATCHES):
            self.wait()
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        self.wait()
        return statistics.median(times[WARM_UP:]) * 1e6

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _host_s(self, call: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun

    def batch_time_s(self, call: Callable[[], object], calls: int) -> float:
        """Time of ``calls`` calls in seconds on the device."""
        return self.times_s(call, calls, 1)[0]

    def times_s(self, call: Callable[[], object], calls: int, batches: int) -> list[float]:
        """Time of each batch of ``calls`` calls in seconds on the device, one right after another.

        The host launches all before it waits, so that what it does besides does not count.
        """
        if self.device != "cuda":
            return [self._host_s(lambda: [call() for _ in range(calls)]) for _ in range(batches)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(batches + 1)]
        self.wait()
        events[0].record()
        for event in events[1:]:
            for _ in range(calls):
                call()
            event.record()
        self.wait()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
