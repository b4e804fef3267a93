"""Processes of a run: found by their environment, ended, and signs of what killed them."""

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
"""Environment variable with the launcher's pid, since two nodes may share a run directory on one
machine."""

KILLED_S = 5
"""A process that outlives SIGKILL for this long hangs in a driver, and is not waited for."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Signals:
    """While this context lasts, SIGINT, SIGTERM and SIGHUP are recorded and end nothing.

    Ignored signals (nohup, background jobs) stay ignored. Python handles signals in the main thread
    only, so elsewhere nothing changes. The end of a parent process (``Parents``) counts as SIGHUP.
    """

    def __init__(self) -> None:
        self.ended: str | None = None
        """The parent process whose end was the last signal taken."""
        self._recorded: list[signal.Signals] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._parents = Parents()
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._parents.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> signal.Signals | None:
        """The oldest signal not taken yet, or None."""
        if not self._recorded and (ended := self._parents.ended()):
            self._parents.close()
            self.ended = ended
            return signal.SIGHUP
        return self._recorded.pop(0) if self._recorded else None

    def _record(self, number: int, _frame: object) -> None:
        self._recorded.append(signal.Signals(number))


def marked(**marks: str) -> list[psutil.Process]:
    """Processes that were started with these environment variables, without this one.

    Children inherit the variables: a rank is found even in another session or adopted by init,
    where neither a process group nor a parent leads to it.
    """
    import psutil

    return [
        process
        for process in psutil.process_iter(["environ"])
        if process.pid != os.getpid() and marks.items() <= (process.info["environ"] or {}).items()
    ]


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM to each, SIGKILL to those that still run after ``grace_s``; wait for their end."""
    left = list(processes)
    for process in left:
        send(process, signal.SIGTERM)
    surviving = _running_after(left, grace_s)
    for process in surviving:
        send(process, signal.SIGKILL)
    _running_after(surviving, KILLED_S)


def _running_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after ``seconds``.

    Their exit status is not collected: it belongs to their parent.
    """
    deadline = time.monotonic() + seconds
    while (left := [p for p in processes if lives(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Signal a process, unless it ended and its pid is another process's now."""
    import psutil

    with suppress(psutil.Error):
        process.send_signal(number)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal, whose default would end it."""
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
    import psutil

    with suppress(psutil.Error):
        return name in psutil.Process(pid).environ()
    return False


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since boot, in containers too."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def free_memory_share() -> float:
    """Share of memory that is available, 0 to 1: of this machine or of this process's cgroup."""
    import psutil

    memory = psutil.virtual_memory()
    return min(memory.available / memory.total, _free_share_of_control_group())


def _free_share_of_control_group() -> float:
    """The smallest free share of this process's cgroups (v2); 1 where there is no limit."""
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
