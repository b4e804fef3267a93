"""How many layers of each kind each pipeline stage holds, chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind
from harness.experiment.model import ATTENTION, MAMBA, MLP, Model
from harness.experiment.pipeline import layer_ranges, predictor_chunk, stage_layers

_LETTERS = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}
"""Letter of a layer_pattern -> kind of the layer."""


class Layers(NamedTuple):
    """Numbers of layers by kind, or what is known of a layer of each kind."""

    dense: int = 0
    experts: int = 0
    predictors: int = 0
    """Layers of multi-token prediction: each a transformer layer and a projection before it."""
    mamba: int = 0
    attention: int = 0
    """Layers of attention alone."""
    mlp: int = 0
    """Layers of an MLP alone."""

    def __add__(self, other: Layers) -> Layers:
        return Layers(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.dense + self.experts + self.predictors + self.attention

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, by field name, in order; with a layer_pattern kind by kind."""
        return tuple(
            kind for kind, number in zip(self._fields, self, strict=True) for _ in range(number)
        )


def chunks(experiment: Experiment, stage: int) -> tuple[Layers, ...]:
    """The layers of each chunk (virtual stage) of ``stage``, in order."""
    model, predicting = experiment.model, predictor_chunk(experiment)
    if model.layer_pattern:
        return tuple(_of_pattern(model, layers) for layers in layer_ranges(experiment)[stage])
    found = []
    for chunk, layers in enumerate(layer_ranges(experiment)[stage]):
        dense = min(max(model.dense_layers - layers.start, 0), len(layers))
        predictors = model.predictors if (stage, chunk) == predicting else 0
        found.append(Layers(dense, len(layers) - dense, predictors))
    return tuple(found)


def all_chunks(experiment: Experiment) -> tuple[tuple[Layers, ...], ...]:
    """The layers of each chunk of each stage: ``[stage][chunk]``."""
    return tuple(chunks(experiment, stage) for stage in range(experiment.pp))


def alike(experiment: Experiment) -> bool:
    """Whether all chunks of all stages hold the same layers."""
    return len({chunk for stage in all_chunks(experiment) for chunk in stage}) == 1


def on_stage(experiment: Experiment, stage: int) -> Layers:
    """All layers of ``stage``."""
    model = experiment.model
    if model.layer_pattern or model.predictors or 0 < model.dense_layers < model.num_layers:
        return sum(chunks(experiment, stage), Layers())
    layers = stage_layers(experiment)[stage]
    return Layers(dense=layers) if model.dense_layers else Layers(experts=layers)


def of_model(experiment: Experiment) -> Layers:
    """All layers of the model."""
    model = experiment.model
    if model.layer_pattern:
        return _of_pattern(model, range(model.num_layers))
    dense = model.dense_layers
    return Layers(dense, model.num_layers - dense, model.predictors)


def _of_pattern(model: Model, layers: range) -> Layers:
    letters = (model.layer_pattern or "")[layers.start : layers.stop]
    return Layers(**{kind: letters.count(letter) for letter, kind in _LETTERS.items()})


def predictor_kind(experiment: Experiment) -> LayerKind:
    """The kind of the transformer layer within multi-token prediction: that of the last layer."""
    if experiment.model.mamba:
        return "mamba"  # which has no multi-token prediction: the kind that most layers are
    return "experts" if experiment.model.num_experts else "dense"


def of_predictors(experiment: Experiment) -> Experiment:
    """``experiment`` as upstream computes multi-token prediction: with FP4= in bf16.

    Source: _proj_and_transformer_layer in megatron/core/transformer/multi_token_prediction.py.
    """
    if experiment.precision != "fp4":
        return experiment
    return experiment.model_copy(update={"precision": "bf16", "fp4_recipe": None})
