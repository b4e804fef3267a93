"""What the machine must have for a marked test; without it the test is skipped, and says why."""

import atexit
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.machine import upstream


def pytest_configure():
    # in the background of a script, or under nohup, SIGINT is ignored, and by all that a test starts: heed it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # whichever test imports it first: megatron is the source tree, where there is one
    if tree := upstream.locate():
        sys.path.insert(0, str(tree))
    # what datasets and tokenizers cache is not for the user's home
    caches = tempfile.TemporaryDirectory(prefix="huggingface-")
    atexit.register(caches.cleanup)
    os.environ["HF_HOME"] = caches.name


def pytest_collection_modifyitems(items):
    """Skip what this machine has no means for."""
    reasons = {"cpu": without_torch(), "gpu": without_torch() or without_gpu()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def without_torch() -> str | None:
    return None if find_spec("torch") else "no torch: scripts/setup.sh heavy"


def without_gpu() -> str | None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return None if Path("/dev/nvidiactl").exists() and not hidden else "no NVIDIA GPU"
