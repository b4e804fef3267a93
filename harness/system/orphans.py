"""No process outlives the one it belongs to: the kernel ends it, even where its parent was killed
(prctl(2), Linux only)."""

import ctypes
import os
import signal
import sys

# loaded here: between fork and exec, another thread's lock would never open
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process get the signal ``number`` when ``parent``, its parent, dies; end it where
    that is gone already."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)
