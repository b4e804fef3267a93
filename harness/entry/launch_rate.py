"""The launch rate: host time per operation, which bounds steps of small kernels.

Two hosts with the same GPU can differ by a factor of two, and a launch-bound step takes that much
longer. So every rank measures its rate just before the first step, while all ranks run, and
environment.json keeps it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.run.schema import LaunchRate

if TYPE_CHECKING:
    from harness.entry.report import RankReport

BATCHES = 7
ADDS = 400
"""Launches in a batch: fewer than the 1,024 that a CUDA stream queues, so that the host never waits
for the GPU."""

CHAIN = ("sin", "exp", "tanh", "sigmoid", "erf", "cos")
TURNS = 16
"""Operations that autograd records, repeated ``TURNS`` times before one backward pass. They are
element-wise: a matrix product would allocate cuBLAS's workspace, part of the run's memory."""


def install(report: RankReport) -> None:
    """Measure between upstream's set-up and its first step, outside every timed step."""
    from megatron.training import training

    train = training.train

    def train_after_measuring(*args, **kwargs):
        report.launch = measure()
        return train(*args, **kwargs)

    training.train = train_after_measuring


def measure(device: str = "cuda") -> LaunchRate:
    """The launch rate of this process; takes a few hundredths of a second.

    It draws no random numbers, which would change the run, and keeps no memory. ``add_us`` is the
    host time of an in-place add, the cheapest operation of PyTorch. ``operation_us`` is that of an
    element-wise operation that autograd records, with its share of the backward pass. Both are
    medians of ``BATCHES`` batches, taken in turn so that other work of the process slows both.
    """
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    numbers = torch.ones(1024, device=device)
    leaf = torch.ones(1024, device=device, requires_grad=True)

    def adds() -> None:
        for _ in range(ADDS):
            numbers.add_(1.0)

    def chain() -> None:
        value = leaf
        for _ in range(TURNS):
            for name in CHAIN:
                value = getattr(torch, name)(value)
        value.sum().backward()
        leaf.grad = None

    with torch.enable_grad():
        times_us = [(_host_us(adds, wait), _host_us(chain, wait)) for _ in range(BATCHES + 1)]
    # the first batch warms up
    add_us, chain_us = map(statistics.median, zip(*times_us[1:], strict=True))
    return LaunchRate(add_us=add_us / ADDS, operation_us=chain_us / (TURNS * len(CHAIN)))


def _host_us(batch: Callable[[], None], wait: Callable[[], None]) -> float:
    """Host time of a batch in µs, begun on an idle GPU."""
    wait()
    begun = time.perf_counter()
    batch()
    return (time.perf_counter() - begun) * 1e6
