"""Recomputation of single modules, which upstream does with Transformer Engine's help even where
nothing is fp8."""

from contextlib import nullcontext
from types import SimpleNamespace

from megatron.core.tensor_parallel import random


def install() -> None:
    """Let upstream's ``CheckpointWithoutOutput`` ask whether fp8 is on, and hear that it is not."""
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: nullcontext()
