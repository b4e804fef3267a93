"""Whether the make or script that started this launcher still runs: if it was killed, the run ends.

SIGKILL of a make leaves its children running, and a user would not know of the GPUs they occupy.
A run that was detached on purpose continues: under nohup (SIGHUP ignored), in the background of a
shell without job control (SIGINT ignored), under setsid, or as a job of an interactive shell (a
process group of its own, which the terminal ends). make itself is always watched: it waits for what
it starts, so it ends first only where it was killed.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress

MAKES = ("make", "gmake")
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "busybox")


class Parents:
    """The parent processes with which this one ends."""

    def __init__(self) -> None:
        self._watched: dict[int, str] = {}
        self._poll = select.poll()
        for pid, name in _to_watch():
            with suppress(OSError):  # it has just ended, or the kernel is older than 5.3
                descriptor = os.pidfd_open(pid)
                self._watched[descriptor] = f"{name} (process {pid})"
                self._poll.register(descriptor, select.POLLIN)

    def ended(self) -> str | None:
        """Which of them has ended, or None."""
        return next((self._watched[descriptor] for descriptor, _ in self._poll.poll(0)), None)

    def close(self) -> None:
        for descriptor in self._watched:
            os.close(descriptor)
        self._watched, self._poll = {}, select.poll()


def _to_watch() -> Iterator[tuple[int, str]]:
    """Pid and name of each process to watch, from the parent upwards."""
    import psutil

    ignored = signal.SIG_IGN in (signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGINT))
    child = os.getpid()
    with suppress(psutil.NoSuchProcess):
        for parent in psutil.Process().parents():
            pid, name = parent.pid, parent.name()
            alone = ignored or _group(child) in (None, child) or _group(child) != _group(pid)
            if pid == 1 or (name not in MAKES and (name not in SHELLS or alone)):
                return
            yield pid, name
            child = pid


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
