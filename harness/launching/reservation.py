"""The folders a run writes to: made and locked before it starts, released at its end, removed where
the run is refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.launching.rendezvous.peers import Peers
from harness.run import directory, writing
from harness.run.directory import RunDir
from harness.system import locks
from harness.system.files import make_folder, told_if_unwritable

if TYPE_CHECKING:
    from harness.planning.plan import Plan


@dataclass(frozen=True)
class Reservation:
    """A run directory that this launcher may write to.

    Attributes:
        keeps_records: whether it writes the run's files; of nodes that share them, only one does.
        made: the outermost folders that did not exist before.
        locked: folders this launcher has locked for the run.
        peers: connections to the other nodes; a run of one node has none.
    """

    run_dir: RunDir
    keeps_records: bool = True
    made: tuple[Path, ...] = ()
    locked: tuple[Path, ...] = ()
    peers: Peers = field(default_factory=Peers)

    def abandon(self, why: object) -> None:
        """Remove what was made for a run that is refused; send the peers ``why``."""
        self.peers.send({"ended": {"status": "bad-configuration", "detail": str(why)}})
        self.peers.close()
        for folder in self.made:
            shutil.rmtree(folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the locks."""
        for folder in self.locked:
            with suppress(OSError):
                locks.release(folder)


def reserve(plan: Plan, label: str, report: Callable[[str], None]) -> Reservation:
    """Make and lock the run directory of ``plan``, new or resumed, and on node 0 its SAVE= folder.

    Args:
        label: of the new run; not the experiment's for a node that keeps its own records.
        report: see ``locks.take``.

    Raises:
        UserError: a folder cannot be made, or another run uses it. Nothing is left then.
    """
    made: list[Path] = []
    locked: list[Path] = []
    try:
        if folder := _saved_to(plan):
            with told_if_unwritable(folder, "SAVE"):
                made += _make(folder)
                _lock_save_folder(folder, report)
            locked.append(folder)
        resumed = plan.resumes if label == plan.experiment.label else None
        run_dir = resumed or writing.create(plan.outdir, label)
        if not resumed:
            made.append(run_dir.path)
        with told_if_unwritable(run_dir.path):
            _lock_run(run_dir, report)
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in locked:
            locks.release(folder)
        raise
    return Reservation(run_dir, made=tuple(made), locked=(run_dir.path, *locked))


def _saved_to(plan: Plan) -> Path | None:
    """The folder that SAVE= names; None on further nodes, since node 0 locks it for all."""
    saving = plan.extras.saving
    return saving.folder if saving and plan.place.node_rank == "0" else None


def _lock_run(run_dir: RunDir, report: Callable[[str], None]) -> None:
    try:
        locks.take(run_dir.path, report)
    except locks.Taken as taken:
        raise UserError(directory.still_runs(run_dir, taken.holder)) from None


def _lock_save_folder(folder: Path, report: Callable[[str], None]) -> None:
    """Lock ``folder``. The run whose directory it is in, if any, must be over."""
    try:
        if holder := locks.holder(folder.parent):
            raise locks.Taken(folder.parent, holder)
        locks.take(folder, report)
    except locks.Taken as taken:
        raise UserError(
            f"SAVE={folder}: another run keeps its checkpoints there: {taken}\n"
            "name another folder, or wait until that run is over"
        ) from None


def _make(folder: Path) -> list[Path]:
    """Make ``folder``; the outermost folder that did not exist before, if there is one."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return make_folder(folder)[-1:]
