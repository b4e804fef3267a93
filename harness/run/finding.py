"""Find runs and checkpoints by label, by the id of an experiment, or by folder.

Runs of different experiments can share an id or a label's name. The experiment in their
experiment.json tells which are the same; where they are not, a message names the candidates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from harness.errors import UserError, first_line, nearest
from harness.experiment import identity
from harness.run.checkpoints import (
    STEP_FOLDER,
    Checkpoint,
    examine,
    in_folder,
    newest_whole,
    require_whole,
)
from harness.run.directory import RunDir

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

MOST_NAMED = 5
_ID = re.compile(r"\d{3}h?(-|$)")


@dataclass(frozen=True)
class Candidate:
    """A run directory and the experiment that it froze."""

    dir: RunDir
    experiment: Experiment
    device: str

    @property
    def recency(self) -> tuple[int, int]:
        """Larger for newer ones: when experiment.json was written, then the number behind the
        label."""
        number = re.search(r"\.(\d+)$", self.dir.label)
        try:
            written_ns = self.dir.experiment_json.stat().st_mtime_ns
        except OSError:
            written_ns = 0
        return written_ns, int(number[1]) if number else 1

    @property
    def has_checkpoints(self) -> bool:
        """Whether checkpoints are there, whole or not."""
        return bool(in_folder(self.dir.checkpoints))


def candidates(outdir: Path, wanted: str | None = None) -> tuple[list[Candidate], list[str]]:
    """Runs in ``outdir``, the newest first, and what is wrong with those that cannot be read.

    Only experiment.json is read: a run whose result is torn can still be resumed.

    Args:
        wanted: the id or name of an experiment; None: runs of every experiment.
    """
    found, problems = [], []
    for path in outdir.glob("*/experiment.json"):
        run = RunDir(path.parent.resolve())
        try:
            experiment, device = run.read_experiment(), run.read_device()
        except ValueError as error:
            if wanted is None or run.label.split("-")[0] == wanted.split("-")[0]:
                problems.append(f"{run.label}: {first_line(error)}")
            continue
        if wanted in (None, experiment.id, experiment.name):
            found.append(Candidate(run, experiment, device))
    return sorted(found, key=lambda candidate: candidate.recency, reverse=True), sorted(problems)


def label_of(
    wanted: str,
    outdir: Path,
    keep: Callable[[Candidate], bool] = lambda found: found.has_checkpoints,
) -> str:
    """The label of the newest run of the experiment ``wanted``; any other name as it is.

    Args:
        keep: which runs count; by default those with checkpoints.

    Raises:
        UserError: runs of different experiments have this id.
    """
    if (outdir / wanted).is_dir() or not _ID.match(wanted):
        return wanted
    kept = [found for found in candidates(outdir, wanted)[0] if keep(found)]
    return one(wanted, kept).dir.label if kept else wanted


def with_checkpoints(wanted: str, outdir: Path) -> list[RunDir]:
    """Every run with checkpoints of the experiment ``wanted``, the newest first; none where it is a
    label."""
    if (outdir / wanted).is_dir() or not _ID.match(wanted):
        return []
    return [found.dir for found in candidates(outdir, wanted)[0] if found.has_checkpoints]


def checkpoint(
    wanted: str, outdir: Path, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """The newest whole checkpoint of a run or a folder, or the one in the folder of a step.

    Args:
        wanted: a run's label in ``outdir``, an experiment's id or name, or a folder.
        tell: called for each newer checkpoint that is damaged.

    Raises:
        UserError: there is none.
    """
    path = checkpoint_folder(wanted, outdir)
    if step := STEP_FOLDER.fullmatch(path.name):
        return require_whole(examine(path, int(step[1])))
    skipped: list[str] = []
    if found := newest_whole(path, skipped.append):
        for damage in skipped:
            tell(damage)
        return found
    way_out = "SAVE=1 makes a run keep some; make checkpoints lists them"
    raise UserError("\n".join([f"no whole checkpoint in {path}", *skipped, way_out]))


def checkpoint_folder(wanted: str, outdir: Path) -> Path:
    """The folder of checkpoints of a run, of an experiment's newest run, or ``wanted`` itself.

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
    """Labels of the runs in ``outdir`` that kept checkpoints, whole or not."""
    found = [RunDir(path.parent) for path in sorted(outdir.glob("*/experiment.json"))]
    return [run.label for run in found if run.checkpoints.is_dir()]


def experiment_of(folder: Path) -> Experiment | None:
    """The experiment whose checkpoints lie in ``folder``: its experiment.json lies there or in the
    folder above; None where neither has one."""
    for place in (folder, folder.parent):
        try:
            return RunDir(place).read_experiment()
        except ValueError:
            continue
    return None


def one(
    wanted: str, found: Sequence[Candidate], way_out: str = "name one of them by its label"
) -> Candidate:
    """The newest of ``found``, which must be runs of one experiment on one kind of device.

    Raises:
        UserError: they are not; the message names the newest run of each, and what differs.
    """
    different = distinct(found)
    if len(different) > 1:
        raise UserError(
            "\n".join(
                [
                    f"{wanted}: {len(different)} different experiments ran under this id:",
                    *named(different, different[0].experiment),
                    way_out,
                ]
            )
        )
    return found[0]


def distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """The newest run of each experiment among ``found``."""
    kept: dict[tuple[str, str], Candidate] = {}
    for candidate in found:
        kept.setdefault(
            (candidate.device, identity.frozen(candidate.experiment).model_dump_json()), candidate
        )
    return list(kept.values())


def named(found: Sequence[Candidate], other: Experiment) -> list[str]:
    """A line for each run: its label, and the settings in which it differs from ``other``."""
    lines = []
    for candidate in found[:MOST_NAMED]:
        differences = identity.differences(candidate.experiment, other)
        settings = "; ".join(f"{d.setting} {d.before}" for d in differences)
        lines.append(f"  {candidate.dir.label}" + (f"  ({settings})" if settings else ""))
    if len(found) > MOST_NAMED:
        lines.append(f"  … and {len(found) - MOST_NAMED} more")
    return lines


def outdir(settings: Mapping[str, str]) -> Path:
    """Where run directories are: OUTDIR, or outdir/ of the repository."""
    return Path(settings.get("OUTDIR") or ROOT / "outdir").resolve()
