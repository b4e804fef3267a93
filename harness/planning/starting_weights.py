"""The weights that a run starts from: ``WEIGHTS=`` names imported weights, a run, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.data import data_sets
from harness.errors import UserError, first_line, nearest
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.finetune.adapters import FOLDER, read_record
from harness.run import checkpoints, finding
from harness.run.directory import RunDir
from harness.system.files import expanded


@dataclass(frozen=True)
class StartingWeights:
    """Weights to start from.

    Attributes:
        named: what ``WEIGHTS=`` called them.
        folder: for upstream's ``--pretrained-checkpoint``; relative to the repository where it lies
        in it.
        model: what their model is.
        positions: the longest sequence that learned positions are there for.
        tokenizer: the folder of the tokenizer that the model was trained with; None: not known.
    """

    named: str
    folder: str
    model: Model
    positions: int
    tokenizer: Path | None

    def fields_for(self, row: Experiment) -> dict[str, object]:
        """The fields of ``row`` that these weights set, by name."""
        length = min(row.seq_length, self.positions) if self._has_learned_positions else None
        return {
            "weights": self.folder,
            "model": self.model.model_copy(update={"dropout": row.model.dropout}),
            "positions": self.positions,
            "seq_length": length or row.seq_length,
        }

    def check_model(self, experiment: Experiment) -> None:
        """Raise UserError where ``ARGS=`` made another model of ``experiment`` than theirs."""
        from harness.convert import weights

        if wrong := weights.differences(self.model, experiment.model):
            said = ", ".join(f"{key} {there}, not {here}" for key, (there, here) in wrong.items())
            raise UserError(
                f"WEIGHTS={self.named}: their model has {said}\nleave out of ARGS what says"
                " otherwise"
            )
        positions = experiment.positions or self.positions
        if self._has_learned_positions and positions != self.positions:
            raise UserError(
                f"WEIGHTS={self.named}: they have {self.positions} learned positions, not"
                f" {positions}\nleave --max-position-embeddings out of ARGS"
            )

    def check_data(self, data: str) -> None:
        """Raise UserError where another tokenizer than theirs made the data set ``data``."""
        from harness.convert import weights

        if data != data_sets.MOCK:
            weights.check_data(self.model, self.tokenizer, data_sets.blend(data))

    @property
    def _has_learned_positions(self) -> bool:
        return self.model.position_embedding == "learned_absolute"


def find(named: str, outdir: Path) -> StartingWeights:
    """What ``WEIGHTS=named`` is.

    Raises:
        UserError: there is no such thing, it holds no checkpoint, or only adapters.
    """
    from harness.convert import weights

    if imported := weights.find(named):
        folder, known = imported
        tokenizer = folder / weights.HF if known.tokenizer else None
        return StartingWeights(named, _from_root(folder), known.model, known.positions, tokenizer)
    places = (outdir / finding.label_of(named, outdir), expanded(named))
    runs = [path for path in places if RunDir(path).experiment_json.is_file()]
    if not runs:
        names = weights.names() + finding.labels_with_checkpoints(outdir)
        raise UserError(
            f"WEIGHTS={named}: {nearest(named, names)}\nmake import-hf brings some, SAVE=1 keeps a"
            " run's own"
        )
    return _of_run(named, runs[0])


def _of_run(named: str, run: Path) -> StartingWeights:
    """The newest checkpoint of the run directory ``run``."""
    from harness.convert.commands import saved

    if read_record(run / FOLDER):
        raise UserError(
            f"WEIGHTS={named}: this run trained adapters\nmake export-hf RUN={named} OUT=… merges"
            " them with the weights, make import-hf brings those back"
        )
    try:
        trained = RunDir(run).read_experiment()
    except ValueError as error:
        raise UserError(f"WEIGHTS={named}: {first_line(error)}") from None
    tokenizer = None
    if trained.data != data_sets.MOCK:
        tokenizer = data_sets.blend(trained.data).sets[0].tokenizer_model
    folder = _from_root(saved(str(run), run.parent))
    return StartingWeights(
        named, folder, trained.model, trained.positions or trained.seq_length, tokenizer
    )


def check_whole(weights: str) -> None:
    """Read the checkpoint that upstream will take from the folder ``weights`` to its end.

    Raises:
        UserError: it is damaged, it holds code, or there is none.
    """
    folder = ROOT / weights
    named = checkpoints.tracked(folder)
    found = checkpoints.verify(checkpoints.examine(*named)) if named else None
    if found and found.damage is None:
        return
    older = checkpoints.newest_whole(folder)
    # An empty tracker: the process takes the newest whole checkpoint itself.
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


def _from_root(folder: Path) -> str:
    whole = folder.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
