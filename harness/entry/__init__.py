"""What runs inside each rank: upstream is prepared, instrumented and run; failures are recorded."""

import os


def on_cpu() -> bool:
    """Whether this rank runs on the CPU stand-in for CUDA (``HARNESS_DEVICE=cpu``)."""
    return os.environ.get("HARNESS_DEVICE") == "cpu"
