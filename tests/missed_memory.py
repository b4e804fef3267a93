"""Runs on H200s whose memory the formula misses, and what it does not know: each is a fault to mend."""

import re

import pytest

MISSED = {
    r"^611.*fp8_params1": "weights in fp8 take 11.6 GiB more than their two copies and the sums of 611",
    r"^611.*gpus2_(gbs16_)?grad_fusion1_cuda_graphs1_gradientsbf16": "0.9 GiB more are allocated",
    r"^625.*recomputenone": "0.9 GiB of experts whose activation is not recomputed",
}


def missed(label: str) -> str | None:
    """What the formula does not know of the run ``label``."""
    return next((why for name, why in MISSED.items() if re.match(name, label)), None)


def marks(label: str) -> tuple:
    """Marks of a test that the formula fails on the run ``label``."""
    why = missed(label)
    return (pytest.mark.xfail(reason=why),) if why else ()
