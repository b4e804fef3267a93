"""Hang detection: how long a run may be silent, and where its ranks wait once that is exceeded."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from harness.launching import processes
from harness.run.directory import RunDir

if TYPE_CHECKING:
    import psutil

BEFORE_FIRST_STEP_S = 600
"""Silence before step 1 that counts as a hang: imports, initialisation and compilation print
little."""
AFTER_A_STEP_S = 300
"""Silence after a step that counts as a hang, unless HANG= sets another limit."""
STACKS_S = 5
"""Time for a rank to write its stacks after SIGUSR1."""
POLL_S = 0.05
_FRAME = re.compile(r'File "(?:.*/)?(?P<file>[^"/]+)", line (?P<line>\d+) in (?P<function>\S+)')


def limit_s(hang_seconds: float | None, has_stepped: bool) -> float:
    """Seconds without a step and without output that count as a hang; ``hang_seconds`` is HANG=."""
    after_a_step_s = hang_seconds or AFTER_A_STEP_S
    return after_a_step_s if has_stepped else max(after_a_step_s, BEFORE_FIRST_STEP_S)


def where_ranks_wait(run_dir: RunDir, running: Iterable[psutil.Process]) -> str:
    """Have every rank on this machine write its stacks; one line that says where they wait.

    Args:
        running: processes of the run.
    """
    ranks = {
        rank.pid: rank.rank for rank in run_dir.read_ranks() if rank.host == socket.gethostname()
    }
    # SIGUSR1 ends a process that has no handler for it, as a rank that is still importing
    pids = [
        process.pid
        for process in running
        if process.pid in ranks and processes.catches(process.pid, signal.SIGUSR1)
    ]
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    deadline, before = time.monotonic() + STACKS_S, None
    # faulthandler writes piece by piece: a file is whole once it has stopped growing
    while (stacks := _stacks(run_dir)) != before or len(stacks) < len(pids):
        if time.monotonic() > deadline:
            break
        before = stacks
        time.sleep(POLL_S)
    silent = sorted(set(ranks.values()) - set(stacks))
    return "; ".join([*by_frame(stacks), *(f"rank {rank} does not answer" for rank in silent)])


def by_frame(stacks: Mapping[int, str]) -> list[str]:
    """Ranks grouped by the innermost frame of their main thread: ``ranks 0, 1 in f (file:line)``.

    Args:
        stacks: text that ``faulthandler`` wrote, by rank.
    """
    ranks_in: dict[str, list[int]] = {}
    for rank, text in sorted(stacks.items()):
        if frame := _innermost_frame(text):
            ranks_in.setdefault(frame, []).append(rank)
    return [f"{_ranks(ranks)} in {frame}" for frame, ranks in ranks_in.items()]


def _stacks(run_dir: RunDir) -> dict[int, str]:
    """What each rank has written, once it names a frame."""
    texts = {rank: path.read_text(errors="replace") for rank, path in run_dir.stacks().items()}
    return {rank: text for rank, text in texts.items() if _innermost_frame(text)}


def _innermost_frame(stacks: str) -> str | None:
    """``function (file:line)`` of the main thread, which faulthandler writes last."""
    start = max(stacks.rfind("Current thread"), stacks.rfind("Thread 0x"), 0)
    frame = _FRAME.search(stacks, start)
    return f"{frame['function']} ({frame['file']}:{frame['line']})" if frame else None


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
