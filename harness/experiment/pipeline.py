"""Which transformer layers each pipeline stage holds, and each virtual stage (chunk) of it.

As upstream splits them: get_num_layers_to_build in megatron/core/transformer/transformer_block.py
and PipelineParallelLayerLayout in megatron/core/transformer/pipeline_parallel_layer_layout.py,
core_v0.19.0. Chunk c of stage s follows chunk c of stage s - 1, and chunk c - 1 of the last stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from harness.errors import UserError, indivisible
from harness.experiment.experiment import Experiment

EVEN_STAGES = {
    "first_stage_layers": None,
    "last_stage_layers": None,
    "pp_layout": None,
    "embedding_as_layer": False,
    "loss_as_layer": False,
}
"""The fields of an experiment of uneven stages, with the values of even ones."""


def layer_ranges(experiment: Experiment) -> tuple[tuple[range, ...], ...]:
    """The layers, counted from 0, of each chunk of each stage: ``[stage][chunk]``.

    Raises:
        UserError: the layers do not divide into these stages, or PP_LAYOUT is not a layout of them.
    """
    return _ranges(*_division(experiment))


def _division(experiment: Experiment) -> tuple:
    """What decides how its layers are divided."""
    return (
        experiment.model.num_layers,
        experiment.pp,
        experiment.vpp,
        (experiment.first_stage_layers, experiment.last_stage_layers),
        (experiment.embedding_as_layer, experiment.loss_as_layer),
        experiment.pp_layout and (experiment.pp_layout, experiment.model.predictors),
    )


def predictor_chunk(experiment: Experiment) -> tuple[int, int]:
    """The stage and the chunk of it with the layers of multi-token prediction, if there are any.

    They are the last one's, unless PP_LAYOUT puts them elsewhere (get_mtp_num_layers_to_build in
    megatron/core/transformer/multi_token_prediction.py).
    """
    if experiment.pp_layout:
        stages = layout_stages(experiment.pp_layout)
        if (index := next((i for i, held in enumerate(stages) if "m" in held), -1)) >= 0:
            return index % experiment.pp, index // experiment.pp
    return experiment.pp - 1, experiment.vpp - 1


def stage_layers(experiment: Experiment) -> tuple[int, ...]:
    """Layers of each pipeline stage. Raises UserError as ``layer_ranges``."""
    named = experiment.first_stage_layers or experiment.last_stage_layers or experiment.pp_layout
    counted = experiment.embedding_as_layer, experiment.loss_as_layer
    layers, rest = divmod(experiment.model.num_layers + sum(counted), experiment.pp)
    if not (rest or named) and (not any(counted) or (experiment.pp > 1 and layers)):
        each = [layers] * experiment.pp  # however their chunks divide them
        each[0], each[-1] = each[0] - counted[0], each[-1] - counted[1]
        return tuple(each)
    return _of_stages(*_division(experiment))


def chunk_layers(experiment: Experiment) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk: ``[stage][chunk]``. Raises UserError as ``layer_ranges``."""
    return tuple(tuple(map(len, chunks)) for chunks in layer_ranges(experiment))


def is_even(experiment: Experiment) -> bool:
    """Whether all chunks of all stages hold the same number of layers."""
    return len({layers for stage in chunk_layers(experiment) for layers in stage}) == 1


def fullest_stage(experiment: Experiment) -> int:
    """The first of the stages that hold most layers."""
    layers = stage_layers(experiment)
    return layers.index(max(layers))


def layout_stages(layout: str) -> list[str]:
    """The stages of PP_LAYOUT=, chunk by chunk, each one letter an item: ``Et*2|ttL`` is Ett, ttL.

    E is the embedding, t a transformer layer, m one of multi-token prediction, L the loss; ``t*3``
    and ``(t|)*3`` repeat, commas are for the eye.

    Raises:
        UserError: another character, or embedding and loss are not at the ends, once each.
    """
    flat = layout.replace(",", "")
    for repeated in (r"\(([EtmL|*\d]+)\)\*(\d{1,3})(?!\d)", r"([EtmL|])\*(\d{1,3})(?!\d)"):
        flat = re.sub(repeated, lambda found: found[1] * int(found[2]), flat)
    if unknown := re.sub("[EtmL|]", "", flat):
        raise UserError(
            f"PP_LAYOUT={layout}: {unknown[0]!r} is none of E (embedding), t (transformer layer), m"
            " (multi-token prediction), L (loss), | (the next stage), (…)*n and t*n, such as"
            " 'Et*3|(t*4|)*2t*3L'"
        )
    layers = flat.replace("|", "")
    if not re.fullmatch("Et*m*L", layers):
        raise UserError(
            f"PP_LAYOUT={layout}: E must come first, then the layers, t, then those of multi-token"
            " prediction, m, if there are any, and L last, such as 'Ett|tt|tL'"
        )
    return flat.split("|")


@lru_cache(maxsize=4096)
def _of_stages(*division: object) -> tuple[int, ...]:
    return tuple(sum(map(len, chunks)) for chunks in _ranges(*division))


@lru_cache(maxsize=4096)
def _ranges(
    layers: int,
    pp: int,
    vpp: int,
    ends: tuple[int | None, int | None],
    counted: tuple[bool, bool],
    layout: tuple[str, int] | None,
) -> tuple[tuple[range, ...], ...]:
    if layout:
        counts = [stage.count("t") for stage in _checked_layout(*layout, layers, pp, vpp)]
    elif any(ends):
        counts = _uneven_ends(layers, pp, vpp, ends)
    else:
        counts = [_divided("layers", layers, pp, vpp, counted)] * (pp * vpp)
        counts[0] -= counted[0]
        counts[-1] -= counted[1]
        if min(counts) < 0:
            raise UserError(f"layers ({layers}): too few for {pp * vpp} stages")
    spans = [range(*pair) for pair in pairwise(accumulate(counts, initial=0))]
    return tuple(tuple(spans[stage::pp]) for stage in range(pp))


def _checked_layout(layout: str, predictors: int, layers: int, pp: int, vpp: int) -> list[str]:
    stages = layout_stages(layout)
    if len(stages) != pp * vpp:
        raise UserError(
            f"PP_LAYOUT={layout} has {len(stages)} stages, PP x VPP are {pp} x {vpp} ="
            f" {pp * vpp}; make them equal, or leave VPP= out"
        )
    if (held := sum(stage.count("t") for stage in stages)) != layers:
        raise UserError(f"PP_LAYOUT={layout} has {held} layers, the model {layers}")
    predicting = [index for index, stage in enumerate(stages) if "m" in stage]
    if (held := sum(stage.count("m") for stage in stages)) != predictors or len(predicting) > 1:
        raise UserError(
            f"PP_LAYOUT={layout} has {held} m, layers of multi-token prediction, in"
            f" {len(predicting)} stages; the model has {predictors}, to be in one stage"
        )
    if vpp > 1 and predicting and (predicting[0] < pp * (vpp - 1) or predicting[0] % pp == 0):
        raise UserError(
            f"PP_LAYOUT={layout}: upstream has multi-token prediction, m, only in the last virtual"
            " stage of a rank, and not of the first rank"
        )
    return stages


def _uneven_ends(layers: int, pp: int, vpp: int, ends: tuple[int | None, int | None]) -> list[int]:
    """Layers of each chunk if the first or last stage's number is given; others share the rest."""
    given = [number for number in ends if number]
    left, between = layers - sum(given), pp - len(given)
    if left < 0 or between < 0 or bool(left) != bool(between):
        raise UserError(
            f"layers ({layers}) less those of FIRST_STAGE_LAYERS and LAST_STAGE_LAYERS"
            f" ({', '.join(map(str, given))}) leave {left} for {between} other stages"
        )
    each = _divided("layers of the other stages", left, between, vpp) if between else 0
    first, last = (
        _divided(f"{name}_STAGE_LAYERS", number, 1, vpp) if number else each
        for name, number in zip(("FIRST", "LAST"), ends, strict=True)
    )
    return ([first, *[each] * (pp - 2), last] if pp > 1 else [layers]) * vpp


def _divided(what: str, layers: int, stages: int, vpp: int, counted: Sequence[bool] = ()) -> int:
    """Layers of each chunk where all are alike; an embedding and a loss that count are layers."""
    names = [name for name, counts in zip(("embedding", "loss"), counted, strict=False) if counts]
    places = layers + len(names)
    by, sizes = ("PP x VPP", (stages, vpp)) if stages > 1 else ("VPP", (vpp,))
    if broken := indivisible(" + ".join([what, *names]), places, by, *sizes):
        raise UserError(broken)
    return places // (stages * vpp)
