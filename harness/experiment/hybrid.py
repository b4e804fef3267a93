"""A row's layers as upstream's HybridModel names them (``entry: hybrid``)."""

from __future__ import annotations

from harness.experiment.experiment import Experiment
from harness.experiment.pipeline import layer_ranges


def layer_pattern(experiment: Experiment) -> str:
    """What ``--hybrid-layer-pattern`` says: the model's pattern, a segment a chunk.

    Of a GPT, attention and MLP of each layer: ``*`` is attention, ``+`` latent attention, ``-`` a
    dense MLP, ``E`` experts (megatron/core/models/hybrid/hybrid_layer_allocation.py). Chunk c of
    stage s follows chunk c of stage s - 1.

    Raises:
        UserError: the layers do not divide into the stages.
    """
    model, chunks = experiment.model, layer_ranges(experiment)
    attention = "+" if model.latent_attention else "*"
    first_experts = model.first_dense_layers if model.num_experts else model.num_layers

    def segment(layers: range) -> str:
        if model.layer_pattern:
            return model.layer_pattern[layers.start : layers.stop]
        return "".join(attention + ("E" if layer >= first_experts else "-") for layer in layers)

    return "|".join(segment(stage[chunk]) for chunk in range(experiment.vpp) for stage in chunks)
