"""Processes that the kernel ends with their parent, also after its SIGKILL (Linux only)."""

import ctypes
import os
import signal
import sys

# Loaded at import: between fork and exec, a lock that another thread held is never released.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send ``number`` to this process when ``parent``, its parent, ends.

    prctl(PR_SET_PDEATHSIG) acts when the parent *thread* ends, and only from now on: a parent that
    has ended already is noticed by its pid.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)
