"""Which transformer layers each pipeline stage holds, chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind


class Layers(NamedTuple):
    """Numbers of layers by kind."""

    dense: int = 0
    experts: int = 0
    predictors: int = 0
    """Layers of multi-token prediction: each a transformer layer and a projection before it."""

    def __add__(self, other: Layers) -> Layers:
        return Layers(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        return sum(self)


def chunks(experiment: Experiment, stage: int) -> tuple[Layers, ...]:
    """The layers of each chunk (virtual stage) of ``stage``, in the order they are passed through.

    Layers of multi-token prediction follow the last one (get_mtp_num_layers_to_build in
    megatron/core/transformer/multi_token_prediction.py).
    """
    return tuple(
        _of_chunk(experiment, chunk * experiment.pp + stage) for chunk in range(experiment.vpp)
    )


def on_stage(experiment: Experiment, stage: int) -> Layers:
    """All layers of ``stage``."""
    return sum(chunks(experiment, stage), Layers())


def of_model(experiment: Experiment) -> Layers:
    """All layers of the model."""
    model = experiment.model
    dense = model.dense_layers
    return Layers(dense, model.num_layers - dense, model.predictors)


def predictor_kind(experiment: Experiment) -> LayerKind:
    """The kind of the transformer layer within multi-token prediction: that of the last layer."""
    return "experts" if experiment.model.num_experts else "dense"


def _of_chunk(experiment: Experiment, index: int) -> Layers:
    """The layers of the chunk that a micro-batch passes through as the ``index``-th, from 0."""
    model, count = experiment.model, experiment.pp * experiment.vpp
    first, behind = (model.num_layers * i // count for i in (index, index + 1))
    dense = min(max(model.dense_layers - first, 0), behind - first)
    predictors = model.predictors if index == count - 1 else 0
    return Layers(dense, behind - first - dense, predictors)
