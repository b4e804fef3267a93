"""Worker processes that end with their parent and return results in order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice, starmap
from typing import Any

from harness.system.orphans import end_with


@contextlib.contextmanager
def map_in_order(
    function: Callable[..., Any], tasks: Iterable[tuple], processes: int | None = None
) -> Iterator[Iterator[Any]]:
    """``function(*task)`` for each task, on ``processes`` (all cores by default), two ahead each.

    ``tasks`` may be endless: leaving the context drops results that were not read. With one
    process, tasks run in this one.
    """
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield starmap(function, tasks)
        return
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=end_with,
        initargs=(os.getpid(),),
    )
    try:
        yield _ordered(pool, function, iter(tasks), 2 * processes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ordered(
    pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: Iterator[tuple], ahead: int
) -> Iterator[Any]:
    waiting = deque(_submit(pool, function, task) for task in islice(tasks, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(_submit(pool, function, task) for task in islice(tasks, 1))
        yield result


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Any], task: tuple) -> Future[Any]:
    """Submit a task. Workers started by that inherit a blocked SIGINT: Ctrl-C is for the parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
