"""The folders that a run writes to: made and locked before it starts, given back at its end,
removed where it is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.run import directory
from harness.run.directory import RunDir
from harness.system import locks
from harness.system.files import told_if_unwritable

if TYPE_CHECKING:
    from harness.launching.others import Others
    from harness.planning.plan import Plan


@dataclass(frozen=True)
class Reservation:
    """A run directory that this launcher may write to.

    Attributes:
        keeps_records: whether it writes the run's files; of nodes that share them only one does.
        made: folders that were not there before, outermost first.
        others: the other nodes, where there are some.
    """

    run_dir: RunDir
    keeps_records: bool = True
    made: tuple[Path, ...] = ()
    others: Others | None = None

    def with_others(self, others: Others) -> Reservation:
        return replace(self, others=others)

    def abandon(self, why: object) -> None:
        """Leave nothing of a run that was refused before it started; the other nodes are told
        ``why``."""
        if self.others:
            self.others.tell({"ended": {"status": "bad-configuration", "detail": str(why)}})
            self.others.close()
        for folder in self.made:
            shutil.rmtree(folder, ignore_errors=True)
        give_back(self.run_dir)


def reserve(plan: Plan, label: str, tell: Callable[[str], None] = lambda _: None) -> Reservation:
    """Make and lock the run directory of ``plan``, new or resumed, and on node 0 its ``SAVE=``
    folder.

    Args:
        label: of the new run; another than the experiment's for a node that keeps records of its
        own.
        tell: see ``locks.take``.

    Raises:
        UserError: a folder cannot be made, or another run has it. Nothing is left then.
    """
    made: list[Path] = []
    taken: list[Path] = []
    try:
        if folder := _saved_to(plan):
            with told_if_unwritable(folder, "SAVE"):
                made += _make(folder)
                _take_save_folder(folder, tell)
            taken.append(folder)
        resumed = plan.resumes if label == plan.experiment.label else None
        run_dir = resumed or directory.create(plan.outdir, label)
        if not resumed:
            made.append(run_dir.path)
        with told_if_unwritable(run_dir.path):
            _take_run(run_dir, tell)
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in taken:
            locks.release(folder)
        raise
    _folders[run_dir.path] = (run_dir.path, *taken)
    return Reservation(run_dir, made=tuple(made))


def folders_of(run_dir: RunDir) -> tuple[Path, ...]:
    """The folders that this launcher has locked for the run in ``run_dir``."""
    return _folders.get(run_dir.path, ())


def give_back(run_dir: RunDir) -> None:
    """Release every lock of the run in ``run_dir``."""
    for folder in _folders.pop(run_dir.path, ()):
        with suppress(OSError):
            locks.release(folder)


_folders: dict[Path, tuple[Path, ...]] = {}


def _saved_to(plan: Plan) -> Path | None:
    """The folder that SAVE= names, on the node that locks it for all of them."""
    saving = plan.extras.saving
    return saving.folder if saving and plan.place.node_rank == "0" else None


def _take_run(run_dir: RunDir, tell: Callable[[str], None]) -> None:
    try:
        locks.take(run_dir.path, tell)
    except locks.Taken as taken:
        raise UserError(directory.still_runs(run_dir, taken.holder)) from None


def _take_save_folder(folder: Path, tell: Callable[[str], None]) -> None:
    """Lock ``folder``; where it belongs to a run directory, that run must be over."""
    try:
        if holder := locks.holder(folder.parent):
            raise locks.Taken(folder.parent, holder)
        locks.take(folder, tell)
    except locks.Taken as taken:
        raise UserError(
            f"SAVE={folder}: another run keeps its checkpoints there: {taken}\n"
            "name another folder, or wait until that run is over"
        ) from None


def _make(folder: Path) -> list[Path]:
    """Make ``folder``; those of it and its parents that were not there, outermost first."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    missing = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[:1]
