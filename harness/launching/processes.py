"""Processes of a run: found by the mark they carry, ended without exception, and what killed
them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.launching.parents import Parents

if TYPE_CHECKING:
    import psutil

LAUNCHER_VARIABLE = "HARNESS_LAUNCHER"
"""Environment variable with the launcher's pid: tells apart nodes that share a run directory on one
machine."""

KILLED_S = 5
"""A process that is still there so long after SIGKILL hangs in a driver; it is not waited for."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Signals:
    """While this context lasts, SIGINT, SIGTERM and SIGHUP are noted instead of ending this
    process.

    Signals that are ignored (nohup, background jobs) stay so; outside the main thread nothing
    changes. The end of what started this process (``Parents``) counts as SIGHUP.
    """

    def __init__(self) -> None:
        self.ended: str | None = None
        """The process whose end is the last signal that was taken."""
        self._noted: list[signal.Signals] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._parents = Parents()
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._parents.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> signal.Signals | None:
        """The oldest signal that nobody took yet, or None."""
        if not self._noted and (ended := self._parents.ended()):
            self._parents.close()
            self.ended = ended
            return signal.SIGHUP
        return self._noted.pop(0) if self._noted else None

    def _note(self, number: int, _frame: object) -> None:
        self._noted.append(signal.Signals(number))


def marked(**marks: str) -> list[psutil.Process]:
    """Processes that were started with these environment variables, other than this one.

    Children inherit them, so a rank is found wherever it is: in another session, or adopted by
    init.
    """
    import psutil

    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    return [
        p for p in psutil.process_iter() if p.pid != os.getpid() and wanted <= _environment(p.pid)
    ]


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM to each, and SIGKILL to those that are still there after ``grace_s``. Returns when
    all are gone."""
    left = list(processes)
    for process in left:
        send(process, signal.SIGTERM)
    stubborn = _still_there(left, grace_s)
    for process in stubborn:
        send(process, signal.SIGKILL)
    _still_there(stubborn, KILLED_S)


def _still_there(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after ``seconds``. Children are not reaped: their exit status is
    for their parent."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in processes if lives(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Signal a process, if it still is the one that was found."""
    import psutil

    with suppress(psutil.Error):
        process.send_signal(number)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process handles this signal, whose default would end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(
        (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0"
    )
    return bool(int(caught, 16) >> (number - 1) & 1)


def has_variable(pid: int, name: str) -> bool:
    """Whether the process was started with the environment variable ``name``."""
    return any(entry.startswith(f"{name}=".encode()) for entry in _environment(pid))


def _environment(pid: int) -> set[bytes]:
    """``NAME=value`` of a process as it was started; empty for one that is not ours to see, or
    over."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started, those of containers
    included."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def free_memory_share() -> float:
    """The share of memory that is still available, 0 to 1: of this machine or of this process's
    control group."""
    import psutil

    memory = psutil.virtual_memory()
    return min(memory.available / memory.total, _free_share_of_control_group())


def _free_share_of_control_group() -> float:
    """The smallest free share of the control groups above this process (cgroup v2); 1 where there
    is no limit."""
    try:
        own = next(
            line[3:] for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::")
        )
        group = _CGROUPS / own.lstrip("/")
        shares = [
            _free_share(folder)
            for folder in (group, *group.parents)
            if folder.is_relative_to(_CGROUPS)
        ]
    except (OSError, StopIteration):
        return 1.0
    return min(shares, default=1.0)


def _free_share(group: Path) -> float:
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
    except (OSError, ValueError, KeyError):
        return 1.0
    return 1 - (used - int(cache)) / limit
