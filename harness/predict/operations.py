"""An operation of a transformer layer: the tensors it keeps, and those of its backward pass.

Sizes are in bytes, of one micro-batch on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.experiment.experiment import Experiment


@dataclass(frozen=True)
class Operation:
    """One autograd node of a layer, with the bytes of the tensors that it allocates."""

    saves: tuple[float, ...]
    """What it keeps for its backward pass, most of it its inputs."""
    gradient: float
    """The gradient of its input."""
    weight_gradient: float = 0
    """A tensor of its own before it is accumulated, unless accumulation is fused; none of a frozen
    weight."""
    passing: float = 0
    """An output that nothing keeps."""
    gathered: float = 0
    """What exists only during its backward pass, such as what sequence parallelism gathers."""
    adds_residual: bool = False
    """It starts with the dropout of the output before it, and the sum with the residual."""
    modules: frozenset[str] = frozenset()
    """The modules of selective recomputation that contain it."""
    recomputed: tuple[float, ...] = ()
    """What it would have kept: allocated again before the backward pass of its module."""


def recomputing(operations: Sequence[Operation], modules: Sequence[str]) -> list[Operation]:
    """``operations`` of which those in ``modules`` keep nothing."""
    return [
        replace(one, saves=(), recomputed=one.saves) if one.modules & {*modules} else one
        for one in operations
    ]


def regained(operations: Sequence[Operation], index: int) -> list[Operation]:
    """The operations whose tensors are recomputed when the backward pass reaches ``index``.

    A module is recomputed as a whole, once the backward pass reaches its last operation.
    """
    if index + 1 < len(operations) and operations[index + 1].recomputed:
        return []
    first = index
    while first >= 0 and operations[first].recomputed:
        first -= 1
    return list(operations[first + 1 : index + 1])


def backward_bytes(operations: Sequence[Operation], hidden: float, masked: float) -> float:
    """The most that one layer's backward pass needs beyond what was kept of it.

    Gradients of the residual exist throughout; they are added up in place.

    Args:
        hidden: a hidden state.
        masked: the gradient that dropout writes; 0 without dropout.
    """
    held, gradient, most = hidden, masked, 0.0
    for index in reversed(range(len(operations))):
        one = operations[index]
        held += sum(sum(other.recomputed) for other in regained(operations, index))
        most = max(most, held + gradient + one.gradient + one.weight_gradient + one.gathered)
        if one.adds_residual:
            gradient = masked
        elif one.gradient:
            gradient = one.gradient
        held -= sum(one.saves) + sum(one.recomputed)
    return most


def hidden_tokens(experiment: Experiment) -> float:
    """Tokens of a hidden state on a rank; sequence parallelism splits them."""
    return experiment.rank_tokens / (experiment.tp if experiment.sequence_parallel else 1)


def hidden_bytes(experiment: Experiment) -> float:
    """One hidden state."""
    width = experiment.model.hidden_size * element_bytes(experiment)
    return hidden_tokens(experiment) * width


def gathered_bytes(experiment: Experiment) -> float:
    """A hidden state that sequence parallelism has gathered; 0 without it."""
    if not experiment.sequence_parallel:
        return 0
    return experiment.rank_tokens * experiment.model.hidden_size * element_bytes(experiment)


def mask_bytes(experiment: Experiment) -> float:
    """Dropout's mask of one hidden state, a byte an element."""
    model = experiment.model
    return hidden_tokens(experiment) * model.hidden_size if model.dropout else 0


def element_bytes(experiment: Experiment) -> int:
    return 4 if experiment.precision == "fp32" else 2


SCALE_BYTES = {"blockwise": 4 / 128, "mxfp8": 1 / 32}
"""For each value of an activation: one in fp32 for 128, or one of 8 bits for 32."""
NVFP4_BYTES = 1 / 2 + 1 / 16
"""Of a value: four bits, and its share of a scale of eight bits for 16 values, whichever way these
lie (NVFP4Quantizer.inner_tensor_specs in transformer_engine/pytorch/tensor/nvfp4_tensor.py)."""


def saved_bytes(experiment: Experiment) -> float:
    """Bytes an element of the input that a linear layer keeps, and its share of a block's scale."""
    if experiment.precision == "fp8":
        return 1 + SCALE_BYTES.get(experiment.fp8_recipe, 0)
    if experiment.precision == "fp4":
        return NVFP4_BYTES
    return element_bytes(experiment)


def layouts_of_a_norm(experiment: Experiment) -> int:
    """How often a linear layer fused with a norm keeps its input: by rows, by columns, or both.

    In NVFP4 it keeps both where sequence parallelism gathers them once more; other recipes keep one
    (_LayerNormLinear in transformer_engine/pytorch/module/layernorm_linear.py).
    """
    return 2 if experiment.precision == "fp4" and experiment.sequence_parallel else 1


def padded_rows(experiment: Experiment) -> float:
    """Rows of zeros that fill up the tokens of a rank's experts in NVFP4.

    Each expert takes a multiple of 128; half as many are missing on average (Fp8Padding in
    transformer_engine/pytorch/module/fp8_padding.py). Those of fp8, 8 or 16, are left out.
    """
    experts = experiment.model.num_experts or 0
    return 64 * experts / experiment.ep if experiment.precision == "fp4" else 0


def weight_gradient_bytes(experiment: Experiment, weights: float) -> float:
    """The gradient of a matrix of so many ``weights`` on a rank, before it is accumulated."""
    if experiment.lora or experiment.gradient_fusion:
        return 0
    return element_bytes(experiment) * weights


def norm(experiment: Experiment) -> Operation:
    """A norm's input and fp32 statistics, and the mask of the dropout before it."""
    hidden, statistics = hidden_bytes(experiment), norm_statistics(experiment)
    return Operation((mask_bytes(experiment), hidden, *statistics), hidden, adds_residual=True)


def norm_statistics(experiment: Experiment) -> list[float]:
    """What a norm keeps of each token, in fp32: a mean if it has one, and a deviation."""
    count = 2 if experiment.model.normalization == "LayerNorm" else 1
    return [4 * hidden_tokens(experiment)] * count


def norm_output_bytes(experiment: Experiment) -> float:
    """A norm's output, as the linear layer after it keeps it."""
    return hidden_tokens(experiment) * experiment.model.hidden_size * saved_bytes(experiment)
