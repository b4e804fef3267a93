"""What a run starts from: ``WEIGHTS=`` names imported weights, an earlier run, or a folder with
either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.data import data_sets
from harness.errors import UserError, first_line, nearest
from harness.experiment import extra_arguments, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.finetune.adapters import FOLDER, read_record
from harness.planning.resume import labels_with_checkpoints
from harness.run import checkpoints
from harness.run.directory import RunDir
from harness.run.finding import label_of
from harness.system.files import expanded


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
        folder: for upstream's ``--pretrained-checkpoint``; below the repository as a path from
        there.
        model: what their model is.
        positions: the longest sequence that learned positions are there for.
        tokenizer: the folder of the tokenizer that its tokens are from; none where it is not known.
    """

    folder: str
    model: Model
    positions: int
    tokenizer: Path | None


def find(named: str, outdir: Path) -> Start:
    """What ``WEIGHTS=named`` is.

    Raises:
        UserError: there is no such thing, it holds no checkpoint, or adapters alone.
    """
    from harness.convert import weights

    if imported := weights.find(named):
        folder, known = imported
        return Start(
            _from_root(folder),
            known.model,
            known.positions,
            folder / weights.HF if known.tokenizer else None,
        )
    places = (outdir / label_of(named, outdir), expanded(named))
    runs = [path for path in places if RunDir(path).experiment_json.is_file()]
    if not runs:
        names = weights.names() + labels_with_checkpoints(outdir)
        raise UserError(
            f"WEIGHTS={named}: {nearest(named, names)}\nmake import-hf brings some, SAVE=1 keeps a"
            " run's own"
        )
    return _of_run(named, runs[0])


def check_whole(weights: str) -> None:
    """Read the checkpoint that upstream will take from the folder ``weights``, once, before a run
    starts from it.

    Raises:
        UserError: it is damaged, it holds code, or there is none.
    """
    folder = ROOT / weights
    named = checkpoints.tracked(folder)
    found = checkpoints.verify(checkpoints.examine(*named)) if named else None
    if found and found.damage is None:
        return
    older = checkpoints.newest_whole(folder)
    # inside the run it stands in for the tracker's
    if older and not named and (folder / checkpoints.TRACKER).exists():
        return
    problem = f"{found.path}: {found.damage}" if found else f"no whole checkpoint in {folder}"
    if older:
        way_out = (
            f"{older.path.name} is whole: write {older.step} into {folder / checkpoints.TRACKER} to"
            " start from it"
        )
    else:
        way_out = "make import-hf brings weights (FORCE=1: again), SAVE=1 keeps a run's own"
    raise UserError(f"WEIGHTS: {problem}\n{way_out}")


def _of_run(named: str, run: Path) -> Start:
    from harness.convert.commands import saved

    if read_record(run / FOLDER):
        raise UserError(
            f"WEIGHTS={named}: this run trained adapters\nmake export-hf RUN={named} OUT=… merges"
            " them with the weights, make import-hf brings those back"
        )
    try:
        e = RunDir(run).read_experiment()
    except ValueError as error:
        raise UserError(f"WEIGHTS={named}: {first_line(error)}") from None
    tokenizer = (
        data_sets.blend(e.data).sets[0].tokenizer_model if e.data != data_sets.MOCK else None
    )
    return Start(
        _from_root(saved(str(run), run.parent)), e.model, e.positions or e.seq_length, tokenizer
    )


def with_settings(e: Experiment, settings: Mapping[str, str], outdir: Path) -> Experiment:
    """``e`` with ``settings``, on the model of the weights that ``WEIGHTS=`` names, where it does.

    The model is known before sizes are checked: what 25 heads forbid, a model of 4 may allow.
    Dropout stays that of ``e``; sequences are as long as there are learned positions for, unless
    ``SEQ`` says how long.

    Raises:
        UserError: see ``find`` and ``overrides.apply``.
    """
    named = settings.get("WEIGHTS", e.weights)
    modules = extra_arguments.translate(settings.get("ARGS", "")).fields.get("recompute_modules")
    if modules and settings.get("RECOMPUTE", "selective") != "selective":
        how = settings["RECOMPUTE"]
        raise UserError(
            f"RECOMPUTE={how} recomputes no single modules, but ARGS names {', '.join(modules)}\n"
            "set RECOMPUTE=selective, or leave --recompute-modules out"
        )
    if not named:
        return overrides.apply(e, settings)
    start = find(named, outdir)
    made = overrides.apply(e, settings, _brought(e, start))
    _check_shapes(named, start, made)
    return made


def of_catalogue(id_: str, settings: Mapping[str, str]) -> Experiment:
    """Experiment ``id_`` with ``settings``, as predictions take it. Raises UserError as
    ``with_settings``, and where ARGS= has what no formula knows.
    """
    outdir = Path(settings.get("OUTDIR") or ROOT / "outdir").resolve()
    e = with_settings(load_catalog().find(id_), settings, outdir)
    if reason := extra_arguments.refusal(e.id, e.extra_args):
        raise UserError(reason)
    return e


def _check_shapes(named: str, start: Start, e: Experiment) -> None:
    """Raise UserError where ARGS= makes another model of ``e`` than the weights are of."""
    from harness.convert import weights

    if wrong := weights.differences(start.model, e.model):
        said = ", ".join(f"{key} {there}, not {here}" for key, (there, here) in wrong.items())
        raise UserError(
            f"WEIGHTS={named}: their model has {said}\nleave out of ARGS what says otherwise"
        )
    if (
        start.model.position_embedding == "learned_absolute"
        and (e.positions or start.positions) != start.positions
    ):
        raise UserError(
            f"WEIGHTS={named}: they have {start.positions} learned positions, not {e.positions}\n"
            "leave --max-position-embeddings out of ARGS"
        )


def _brought(e: Experiment, start: Start) -> dict[str, object]:
    """The fields of ``e`` that its weights set."""
    model = start.model.model_copy(update={"dropout": e.model.dropout})
    learned = model.position_embedding == "learned_absolute"
    length = min(e.seq_length, start.positions) if learned else e.seq_length
    return {
        "weights": start.folder,
        "model": model,
        "positions": start.positions,
        "seq_length": length,
    }


def check_data(e: Experiment, named: str, outdir: Path) -> None:
    """Refuse data of ``e`` that another tokenizer made than that of its weights, which are called
    ``named`` (UserError)."""
    from harness.convert import weights

    if e.data != data_sets.MOCK:
        start = find(named, outdir)
        weights.check_data(start.model, start.tokenizer, data_sets.blend(e.data))


def _from_root(folder: Path) -> str:
    whole = folder.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
