"""An experiment made from a model's name and settings, without a row of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.errors import UserError, nearest
from harness.experiment import overrides
from harness.experiment.catalog import load_models
from harness.experiment.command_line import count_in
from harness.experiment.constraints import divisors, with_changes
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE
from harness.experiment.model import Model

MOST_GPUS = 16_384
BATCH_TOKENS = 2**22
"""Tokens of a batch where ``GBS=`` says nothing: what Llama 3 405B began with (Dubey et al. 2024,
arXiv:2407.21783, section 3.4.1)."""
GPUS_A_SEQUENCE = 8
"""More GPUs than this for each sequence of a batch make the default batch larger: Llama 3 405B had
2,048 sequences for 16,384 GPUs (table 4 there)."""
USUAL_LENGTH = {True: 2048, False: 8192}
"""Whether positions are learned -> tokens of a sequence where ``SEQ=`` says nothing: of GPT-3
(Brown et al. 2020, arXiv:2005.14165) and of Llama 3."""


def experiment_from(model: str | Model, settings: Mapping[str, str]) -> Experiment:
    """``model`` (or its name in models.yaml) with ``settings`` as typed: ``GPUS=``, ``TP=``…

    ``LAYERS=`` cuts the model. Where nothing else is typed: bf16, ``SHARDING=optim``, ``MBS=1``,
    sequence parallelism with tensor parallelism, parallel sizes of 1 and the rest of ``GPUS`` data
    parallel, nodes by ``nodes_of``, ``SEQ`` of USUAL_LENGTH and a batch of BATCH_TOKENS.

    Raises:
        UserError: the model is unknown, there are more than MOST_GPUS, or a setting or a constraint
            is broken, as ``overrides.apply``.
    """
    models = load_models()
    if not isinstance(model, Model):
        if model not in models:
            raise UserError(f"MODEL={model}; {nearest(model, models)}")
        model = models[model]
    typed = {key: value for key, value in settings.items() if key != "LAYERS"}
    row = row_of(model, count_in(settings, "LAYERS"))
    gpus = count_in(typed, "GPUS")
    if gpus and gpus > MOST_GPUS:
        raise UserError(f"GPUS={gpus}: at most {MOST_GPUS:,}")
    if "GBS" not in typed:
        length = count_in(typed, "SEQ") or row.seq_length
        typed["GBS"] = str(usual_batch(length, gpus or 1))
    if count_in(typed, "TP") not in (None, 1):
        typed.setdefault("SP", "1")
    experiment = overrides.apply(row, typed)
    nodes = nodes_of(experiment.world_size)
    return experiment if "NODES" in typed else with_changes(experiment, nodes=nodes)


def row_of(model: Model, layers: int | None = None) -> Experiment:
    """What a row of ``model`` on one GPU would say, cut to so many ``layers``."""
    if layers and layers != model.num_layers:
        cut = {"name": f"{model.name}-{layers}-layers", "num_layers": layers}
        if model.layer_pattern:
            cut["layer_pattern"] = model.layer_pattern[:layers]
        model = model.model_copy(update=cut)
    length = USUAL_LENGTH[model.position_embedding == "learned_absolute"]
    return Experiment(
        id=model.name,
        slug="plan",
        chapter=0,
        shows="a plan, no row of the catalogue",
        model=model,
        entry="hybrid" if model.mamba else "gpt",
        micro_batch_size=1,
        global_batch_size=usual_batch(length),
        seq_length=length,
        sharding="optim",
        published_data=None,
    )


def nodes_of(gpus: int, gpus_of_a_node: int = GPUS_OF_A_NODE) -> int:
    """The fewest nodes with ``gpus`` GPUs in all, as many on each."""
    return next(nodes for nodes in divisors(gpus) if nodes * gpus_of_a_node >= gpus)


def usual_batch(length: int, gpus: int = 1) -> int:
    """Sequences of a batch where ``GBS=`` says nothing: a power of two, so that sizes divide it."""
    tokens = max(BATCH_TOKENS, gpus * length / GPUS_A_SEQUENCE)
    return 2 ** math.ceil(math.log2(max(tokens / length, 1)))
