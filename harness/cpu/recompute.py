"""Recomputation of single modules, for which upstream calls Transformer Engine even without fp8."""

from contextlib import nullcontext
from types import SimpleNamespace

from megatron.core.tensor_parallel import random


def install() -> None:
    """Let upstream's ``CheckpointWithoutOutput`` (random.py) find that fp8 is off."""
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()
