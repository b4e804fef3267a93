"""Whether a checkpoint fits an experiment: its model, sharding, tokenizer and learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from harness.convert import weights
from harness.data import data_sets
from harness.errors import UserError
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.run.checkpoints import Checkpoint, Contents
from harness.run.directory import RunDir
from harness.run.finding import experiment_of


def check_fits(checkpoint: Checkpoint, experiment: Experiment) -> None:
    """Check that ``experiment`` can begin with ``checkpoint``.

    Raises:
        UserError: it is of another model, it was saved under a sharding whose format
        ``experiment`` cannot load, its data had another tokenizer, or it holds an optimizer of
        other learning rates.
    """
    folder = checkpoint.path.parent
    trained = experiment_of(folder)
    imported = weights.read(folder) if trained is None else None
    known = trained or imported
    if known:
        check_model(checkpoint.path, known.model, experiment)
    _check_width(checkpoint, experiment)
    _check_positions(checkpoint, experiment)
    if trained:
        _check_sharding(checkpoint, trained, experiment)
        _check_tokenizer(checkpoint, trained, experiment)
        _check_rates(checkpoint, trained, experiment)


def check_model(path: Path, trained: Model, experiment: Experiment) -> None:
    """Raise UserError where ``experiment``'s model cannot take the weights of ``trained``, the
    model of ``path``."""
    found = weights.differences(trained, experiment.model)
    if not found:
        return
    # Widths follow from other fields: they are named only where nothing else differs.
    own = {key: pair for key, pair in found.items() if key in type(trained).model_fields} or found
    there, here = (", ".join(f"{key} {pair[side]}" for key, pair in own.items()) for side in (0, 1))
    _refuse(path, there, here, experiment)


def _check_width(checkpoint: Checkpoint, experiment: Experiment) -> None:
    """The word embedding, [vocabulary, hidden size], is in every checkpoint, whatever else says of
    which model it is."""
    shape = _shape_of("word_embeddings.weight", checkpoint.contents)
    width = experiment.model.hidden_size
    if shape and shape[1] != width:
        _refuse(checkpoint.path, f"hidden_size {shape[1]}", f"hidden_size {width}", experiment)


def _check_positions(checkpoint: Checkpoint, experiment: Experiment) -> None:
    """A learned position is a row of a tensor, whose shape upstream compares
    (``--max-position-embeddings``)."""
    shape = _shape_of("position_embeddings.weight", checkpoint.contents)
    wanted = experiment.positions or experiment.seq_length
    learned = experiment.model.position_embedding == "learned_absolute"
    if not shape or not learned or shape[0] == wanted:
        return
    folder = checkpoint.path.parent
    run = folder.parent if RunDir(folder.parent).experiment_json.exists() else folder
    shorter = (
        f", WEIGHTS={run} trains its weights on shorter sequences" if wanted < shape[0] else ""
    )
    raise UserError(
        f"{checkpoint.path} has {shape[0]} learned positions, {experiment.label} has {wanted}\n"
        f"SEQ={shape[0]} loads it{shorter}"
    )


def _check_sharding(checkpoint: Checkpoint, trained: Experiment, experiment: Experiment) -> None:
    """Megatron-FSDP saves in a format (fsdp_dtensor) that nothing else loads, and loads no
    other."""
    if trained.sharding.startswith("fsdp") != experiment.sharding.startswith("fsdp"):
        raise UserError(
            f"{checkpoint.path} was saved with SHARDING={trained.sharding}, {experiment.label} has"
            f" SHARDING={experiment.sharding}\nMegatron-FSDP's checkpoints are for Megatron-FSDP"
            f" alone: SHARDING={trained.sharding} loads it"
        )


def _check_tokenizer(checkpoint: Checkpoint, trained: Experiment, experiment: Experiment) -> None:
    pair = (trained.data, experiment.data)
    if data_sets.MOCK in pair or len(set(pair)) < 2:
        return
    try:
        before = data_sets.blend(trained.data).sets[0]
    except UserError:  # it is no longer there
        return
    now = data_sets.blend(experiment.data).sets[0]
    if before.tokenizer_sha256 != now.tokenizer_sha256:
        raise UserError(
            f"{checkpoint.path} was trained on {before.name}, DATA={now.name} was made by another"
            f" tokenizer\nprepare {now.name} again with TOKENIZER={before.home / 'tokenizer'}"
        )


def _check_rates(checkpoint: Checkpoint, trained: Experiment, experiment: Experiment) -> None:
    """Upstream finds an optimizer's state by its rates (``param_group_identifier_keys`` of
    megatron/core/optimizer)."""
    if not checkpoint.contents or not checkpoint.contents.has_optimizer:
        return
    if {"--no-load-optim", "--finetune"} & {*experiment.extra_args}:
        return
    there, here = (
        "LR={:g} MIN_LR={:g}".format(*identity.rates(each)) for each in (trained, experiment)
    )
    if there != here:
        raise UserError(
            f"{checkpoint.path} was trained with {there}, {experiment.label} has {here}\n"
            f"{there} resumes it; ARGS=--no-load-optim takes the weights alone, at any rate"
        )


def _refuse(path: Path, there: str, here: str, experiment: Experiment) -> NoReturn:
    raise UserError(
        f"{path} holds another model: {there} there, {here} in {experiment.label}\n"
        "load a checkpoint of the same model, or train without LOAD= and RESUME="
    )


def _shape_of(tensor: str, contents: Contents | None) -> tuple[int, ...] | None:
    """Shape of the tensor whose name ends so; None where a checkpoint has none, or its contents are
    not known."""
    shapes = contents.shapes.items() if contents else ()
    return next((shape for key, shape in shapes if key.endswith(tensor)), None)
