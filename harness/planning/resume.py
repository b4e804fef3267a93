"""Checkpoints to go on from: found by run or folder, of the right model; and the list of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from harness.convert import weights
from harness.data import data_sets
from harness.errors import UserError, nearest
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.run import checkpoints, finding
from harness.run.checkpoints import (
    LARGE_BYTES,
    STEP_FOLDER,
    Checkpoint,
    Contents,
    examine,
    newest_whole,
    verify,
)
from harness.run.directory import RunDir, runs
from harness.run.finding import label_of


def find(wanted: str, outdir: Path, tell: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """The newest whole checkpoint of a run (its label in ``outdir``) or of a folder, or that of a
    step's folder.

    Raises:
        UserError: there is none.
    """
    path = folder_of(wanted, outdir)
    if step := STEP_FOLDER.fullmatch(path.name):
        found = verify(examine(path, int(step[1])))
        if found.damage:
            raise UserError(f"{path}: {found.damage}\nmake checkpoints lists those that are whole")
        return found
    skipped: list[str] = []
    if found := newest_whole(path, skipped.append):
        for damage in skipped:
            tell(damage)
        return found
    raise UserError(
        "\n".join(
            [
                f"no whole checkpoint in {path}",
                *skipped,
                "SAVE=1 makes a run keep some; make checkpoints lists them",
            ]
        )
    )


def folder_of(wanted: str, outdir: Path) -> Path:
    """Where the checkpoints of a run, of an experiment's newest run or in a folder lie.

    Raises:
        UserError: ``wanted`` is none of them.
    """
    for path in (outdir / label_of(wanted, outdir), Path(wanted)):
        run = RunDir(path.resolve())
        if run.experiment_json.exists():
            return run.checkpoints
        if path.is_dir():
            return path.resolve()
    labels = labels_with_checkpoints(outdir)
    experiment = re.match(r"\d{3}h?(?=-|$)", wanted)
    make = f"make {experiment[0] if experiment else '<id>'} SAVE=1"
    there = nearest(wanted, labels) if labels else f"SAVE=1 makes a run keep checkpoints: {make}"
    raise UserError(f"no folder and no run with a checkpoint is called {wanted}; {there}")


def labels_with_checkpoints(outdir: Path) -> list[str]:
    """Runs that have kept some, whole or not."""
    found = [RunDir(path.parent) for path in sorted(outdir.glob("*/experiment.json"))]
    return [run.label for run in found if run.checkpoints.is_dir()]


def check_fits(found: Checkpoint, experiment: Experiment) -> None:
    """Raise UserError where ``found`` is of another model than ``experiment``'s, of data of another
    tokenizer, or holds an optimizer of other learning rates."""
    model, trained = experiment.model, model_of(found.path.parent)
    if trained:
        check_model(found.path, trained, experiment)
    shape = _embedding(found.contents)
    if shape and shape[1] != model.hidden_size:
        _refuse(
            found.path, f"hidden_size {shape[1]}", f"hidden_size {model.hidden_size}", experiment
        )
    _check_positions(found, experiment)
    _check_sharding(found, experiment)
    _check_tokenizer(found, experiment)
    _check_rates(found, experiment)


def check_model(path: Path, trained: Model, experiment: Experiment) -> None:
    """Raise UserError where ``experiment``'s model cannot take the weights of ``trained``, the
    model of ``path``."""
    if found := weights.differences(trained, experiment.model):
        # not what follows
        own = {
            key: pair for key, pair in found.items() if key in type(trained).model_fields
        } or found
        there, here = (
            ", ".join(f"{key} {pair[side]}" for key, pair in own.items()) for side in (0, 1)
        )
        _refuse(path, there, here, experiment)


def _check_positions(found: Checkpoint, experiment: Experiment) -> None:
    """A learned position is a row of a tensor, whose shape upstream compares
    (``--max-position-embeddings``)."""
    shape = _shape_of("position_embeddings.weight", found.contents)
    wanted = experiment.positions or experiment.seq_length
    if shape and experiment.model.position_embedding == "learned_absolute" and shape[0] != wanted:
        folder = found.path.parent
        run = folder.parent if RunDir(folder.parent).experiment_json.exists() else folder
        shorter = (
            f", WEIGHTS={run} trains its weights on shorter sequences" if wanted < shape[0] else ""
        )
        raise UserError(
            f"{found.path} has {shape[0]} learned positions, {experiment.label} has {wanted}\n"
            f"SEQ={shape[0]} loads it{shorter}"
        )


def _check_sharding(found: Checkpoint, experiment: Experiment) -> None:
    """Megatron-FSDP saves in a format (fsdp_dtensor) that nothing else loads, and loads no
    other."""
    trained = experiment_of(found.path.parent)
    if trained and trained.sharding.startswith("fsdp") != experiment.sharding.startswith("fsdp"):
        raise UserError(
            f"{found.path} was saved with SHARDING={trained.sharding}, {experiment.label} has"
            f" SHARDING={experiment.sharding}\nMegatron-FSDP's checkpoints are for Megatron-FSDP"
            f" alone: SHARDING={trained.sharding} loads it"
        )


def _check_tokenizer(found: Checkpoint, experiment: Experiment) -> None:
    trained = experiment_of(found.path.parent)
    pair = (trained.data, experiment.data) if trained else ()
    if data_sets.MOCK in pair or len(set(pair)) < 2:
        return
    try:
        before = data_sets.blend(pair[0]).sets[0]
    except UserError:  # it is no longer there
        return
    if before.tokenizer_sha256 != (chosen := data_sets.blend(pair[1]).sets[0]).tokenizer_sha256:
        raise UserError(
            f"{found.path} was trained on {before.name}, DATA={chosen.name} was made by another"
            f" tokenizer\nprepare {chosen.name} again with TOKENIZER={before.home / 'tokenizer'}"
        )


def _check_rates(found: Checkpoint, experiment: Experiment) -> None:
    """Upstream finds an optimizer's state by its rates (``param_group_identifier_keys`` of
    megatron/core/optimizer)."""
    trained = experiment_of(found.path.parent)
    if not trained or not found.contents or not found.contents.has_optimizer:
        return
    if {"--no-load-optim", "--finetune"} & {*experiment.extra_args}:
        return
    there, here = ("LR={:g} MIN_LR={:g}".format(*identity.rates(e)) for e in (trained, experiment))
    if there != here:
        raise UserError(
            f"{found.path} was trained with {there}, {experiment.label} has {here}\n"
            f"{there} goes on; ARGS=--no-load-optim takes the weights alone, at any rate"
        )


def _refuse(path: Path, there: str, here: str, experiment: Experiment) -> NoReturn:
    raise UserError(
        f"{path} holds another model: {there} there, {here} in {experiment.label}\n"
        "load a checkpoint of the same model, or train without LOAD= and RESUME="
    )


def model_of(folder: Path) -> Model | None:
    """The model whose checkpoints lie in ``folder``: a run's, or an imported one; None where
    nothing says."""
    if experiment := experiment_of(folder):
        return experiment.model
    imported = weights.read(folder)
    return imported and imported.model


def experiment_of(folder: Path) -> Experiment | None:
    """The experiment whose checkpoints lie in ``folder``, where its run directory is around it or a
    copy beside them."""
    for place in (folder, folder.parent):
        try:
            return RunDir(place).read_experiment()
        except ValueError:
            continue
    return None


def damaged_at_the_end(run: RunDir) -> str | None:
    """Which checkpoints of a run are damaged that are newer than its newest whole one, and which
    that is; None: none are."""
    damaged: list[str] = []
    for found in reversed(checkpoints.in_folder(run.checkpoints)):
        if found.damage is None:
            way_out = (
                f"the newest whole one is of step {found.step}: LOAD={run.label} goes on from it,"
                " in a new run"
            )
            break
        damaged.append(f"checkpoint of step {found.step} is damaged: {found.damage}")
    else:
        way_out = "none is whole: SAVE=1 without RESUME= trains anew"
    return "\n".join([*damaged, way_out]) if damaged else None


def print_list(outdir: Path, label: str | None, read_bytes: float = LARGE_BYTES) -> int:
    """``make checkpoints``: the checkpoints of one run or folder, or of every run in ``outdir``.
    Returns the exit status.

    Args:
        read_bytes: so much is read to compare checksums, of the first that are listed; the others
        say that they were not.

    Raises:
        UserError: there is no such run.
    """
    if label:
        folders = [run.checkpoints for run in finding.with_checkpoints(label, outdir)] or [
            folder_of(label, outdir)
        ]
    else:
        folders = [run.dir.checkpoints for run in runs(outdir)[0]]
    found = {folder: checkpoints.in_folder(folder) for folder in dict.fromkeys(folders)}
    if not any(found.values()):
        print(f"no checkpoints in {label or outdir}: SAVE=1 makes a run keep some")
        return 1
    for folder, those in found.items():
        states = []
        for checkpoint in those:
            read_bytes -= checkpoint.size_bytes
            states.append((checkpoint, _state(checkpoint, read_bytes >= 0)))
        print(*_lines(folder, states), sep="\n", end="\n" * bool(states))
    return 0


def _lines(folder: Path, states: list[tuple[Checkpoint, str]]) -> Iterator[str]:
    run = RunDir(folder.parent)
    losses = {m.step: m.loss for m in run.read_metrics()}
    held_out = {v.step: v.loss for v in run.read_validation() if v.split == "validation"}
    if states:
        name = run.label if run.experiment_json.exists() else str(folder)
        yield name
        yield f"  {'step':>8}  {'GiB':>8}  {'parameters':>14}  {'loss':>8}  {'held-out':>8}  state"
    for c, state in states:
        loss, validation = losses.get(c.step), held_out.get(c.step)
        cells = (
            f"{c.gib:.3f}",
            f"{c.contents.parameters:,}" if c.contents else "",
            "" if loss is None else f"{loss:.4f}",
            "" if validation is None else f"{validation:.4f}",
        )
        yield "  {:>8}  {:>8}  {:>14}  {:>8}  {:>8}  {}".format(c.step, *cells, state)


def _state(found: Checkpoint, read: bool) -> str:
    """Whether it is whole; where ``read`` allows it, its bytes are compared with its checksums."""
    if read:
        found = verify(found)
    if found.damage:
        return found.damage
    what = "whole" if found.contents and found.contents.has_optimizer else "whole, weights only"
    if not found.has_checksums:
        return f"{what}, saved without checksums"
    return what if read else f"{what}, checksums not compared (VERIFY=1)"


def _embedding(contents: Contents | None) -> tuple[int, ...] | None:
    """Shape of the word embedding, [vocabulary, hidden size]."""
    return _shape_of("word_embeddings.weight", contents)


def _shape_of(tensor: str, contents: Contents | None) -> tuple[int, ...] | None:
    """Shape of the tensor whose name ends so; None where a checkpoint has none, or its contents are
    not known."""
    shapes = contents.shapes.items() if contents else ()
    return next((shape for key, shape in shapes if key.endswith(tensor)), None)
