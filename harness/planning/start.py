"""What a run starts from: ``WEIGHTS=`` names imported weights, an earlier run, or a folder with either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.data import prepared
from harness.errors import UserError, first_line, nearest
from harness.experiment.catalog import Experiment, Model
from harness.finetune.adapters import FOLDER, read_record
from harness.planning.resume import labels_with_checkpoints
from harness.rundir import RunDir, label_of


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
        folder: for upstream's ``--pretrained-checkpoint``; below the repository as a path from there.
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
        return Start(_from_root(folder), known.model, known.positions, folder / weights.HF if known.tokenizer else None)
    places = (outdir / label_of(named, outdir), Path(named).expanduser())
    runs = [path for path in places if RunDir(path).experiment_json.is_file()]
    if not runs:
        names = weights.names() + labels_with_checkpoints(outdir)
        raise UserError(f"WEIGHTS={named}: {nearest(named, names)}\nmake import-hf brings some, SAVE=1 keeps a run's own")
    return _of_run(named, runs[0])


def _of_run(named: str, run: Path) -> Start:
    from harness.convert.commands import saved

    if read_record(run / FOLDER):
        raise UserError(f"WEIGHTS={named}: this run trained adapters\nmake export-hf RUN={named} OUT=… merges them with the "
                        "weights, make import-hf brings those back")
    try:
        e = RunDir(run).read_experiment()
    except ValueError as error:
        raise UserError(f"WEIGHTS={named}: {first_line(error)}") from None
    tokenizer = prepared.blend(e.data).sets[0].tokenizer_model if e.data != prepared.MOCK else None
    return Start(_from_root(saved(str(run), run.parent)), e.model, e.positions or e.seq_length, tokenizer)


def apply(e: Experiment, outdir: Path) -> Experiment:
    """``e`` on the model of its weights, with its own dropout, on sequences as long as there are positions for.

    Raises:
        UserError: see ``find``; or its data were made by another tokenizer.
    """
    from harness.convert import weights

    start = find(e.weights, outdir)
    model = start.model.model_copy(update={"dropout": e.model.dropout})
    if e.data != prepared.MOCK:
        weights.check_data(start.model, start.tokenizer, prepared.blend(e.data))
    learned = model.position_embedding == "learned_absolute" and "SEQ" not in e.overrides
    length = min(e.seq_length, start.positions) if learned else e.seq_length
    return e.with_changes(weights=start.folder, model=model, positions=start.positions, seq_length=length)


def _from_root(folder: Path) -> str:
    whole = folder.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
