"""Inside the training process: upstream made ready, what it does put on record, and how it ends."""

import os


def on_cpu() -> bool:
    """Whether the CPU stands in for GPUs (``HARNESS_DEVICE=cpu``)."""
    return os.environ.get("HARNESS_DEVICE") == "cpu"
