"""The operations of a Mamba layer and its norm, and what they keep.

Sources: megatron/core/ssm/mamba_mixer.py and mamba_context_parallel.py of core_v0.19.0; of the
package mamba_ssm (2.3.2 and the commit in upstream's pyproject.toml keep the same tensors)
MambaSplitConv1dScanCombinedFn and _mamba_chunk_scan_combined_bwd in ops/triton/ssd_combined.py,
LayerNormFn in ops/triton/layernorm_gated.py. No run on a GPU has checked the count yet.
"""

from __future__ import annotations

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import of_mamba
from harness.predict.operations import (
    Operation,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    norm,
    norm_output_bytes,
    saved_bytes,
    weight_gradient_bytes,
)

CHUNK = 128
"""Tokens of a chunk of the scan: ``chunk_size`` of upstream's MambaMixer, which has no argument."""


def mamba_operations(experiment: Experiment) -> list[Operation]:
    """A Mamba layer's norm and its mixer on one micro-batch, in the order of the forward pass.

    One function has the convolution and the scan. It keeps its input and the scan's result before
    the gate, and computes all else again. The norm before out_proj keeps its input, and a statistic
    for each group.
    """
    size, mamba = element_bytes(experiment), experiment.model.mamba
    linears = of_mamba(mamba, experiment.model.hidden_size)
    gradients = {
        name: weight_gradient_bytes(experiment, one.weights / experiment.tp)
        for name, one in linears.items()
    }
    tokens, inner, conv = channels(experiment)
    projected = size * tokens * (inner + conv + inner / mamba.head_dim)
    scanned = size * tokens * inner
    statistics = 4 * tokens * _groups(experiment)
    return [
        norm(experiment),
        Operation(
            (norm_output_bytes(experiment),),
            hidden_bytes(experiment),
            gradients["in_proj"],
            # the input again, and its gradient before it is scattered
            gathered=2 * gathered_bytes(experiment),
        ),
        Operation((projected, scanned), projected, gathered=_again_bytes(experiment)),
        Operation((scanned, statistics), scanned),
        Operation(
            (saved_bytes(experiment) * tokens * inner,),
            scanned,
            gradients["out_proj"],
            passing=hidden_bytes(experiment),
            gathered=gathered_bytes(experiment),
        ),
    ]


def channels(experiment: Experiment) -> tuple[float, float, float]:
    """Tokens, and for each the channels of the scan and of the convolution, on a rank.

    Context parallelism gives each rank some heads of the whole sequence, and repeats groups that
    are fewer than the ranks.
    """
    mamba, ranks = experiment.model.mamba, experiment.tp * experiment.cp
    inner = mamba.inner_size / ranks
    tokens = experiment.rank_tokens * experiment.cp
    return tokens, inner, inner + 2 * _groups(experiment) * mamba.state_dim


def states(experiment: Experiment) -> float:
    """Values of the states at all ends of chunks on a rank."""
    tokens, inner, _ = channels(experiment)
    return tokens / CHUNK * inner * experiment.model.mamba.state_dim


def _groups(experiment: Experiment) -> float:
    return max(experiment.model.mamba.num_groups / experiment.tp / experiment.cp, 1)


def _again_bytes(experiment: Experiment) -> float:
    """What exists while states go backward: the convolution's result and its gradient, that of the
    scan's result before the gate, products of B and C, states and their gradients, in fp32 and in
    16 bits."""
    size, (tokens, inner, conv) = element_bytes(experiment), channels(experiment)
    products = 4 * tokens * CHUNK * _groups(experiment)
    return tokens * size * (2 * conv + inner) + products + 2 * states(experiment) * (4 + size)
