"""Runs on H200s whose memory the formula misses, and what it does not know: each is a fault to mend."""

import re

import pytest

MISSED = {
    r"^611.*fp8_params1": "weights in fp8 take 11.6 GiB more than their two copies and the sums of 611",
    r"^611.*gpus2_(gbs16_)?grad_fusion1_cuda_graphs1_gradientsbf16": "graphs of Llama 3 8B hold 8 GiB more; 0.9 more are allocated",
    r"^6[07]1.*mbs16.*cuda_graphs1": "graphs of several micro-batches hold 4 GiB more",
    r"^(604|662).*cross_entropy_fusion1.*cuda_graphs1": "graphs hold 8 GiB more, about what the loss passes",
    r"^632.*cuda_graphs1": "graphs of routers and of tokens' preparation hold 11 GiB",
    r"^632.*cuda_graphsattn": "graphs of attention beside experts hold 4 GiB",
    r"^603.*cuda_graphs1": "graphs hold 3 GiB more",
    r"^625.*recomputenone": "0.9 GiB of experts whose activation is not recomputed",
}


def missed(label: str) -> str | None:
    """What the formula does not know of the run ``label``."""
    return next((why for name, why in MISSED.items() if re.match(name, label)), None)


def marks(label: str) -> tuple:
    """Marks of a test that the formula fails on the run ``label``."""
    why = missed(label)
    return (pytest.mark.xfail(reason=why),) if why else ()
