"""``make clean``: lists runs that can be removed, asks, and removes them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.errors import UserError
from harness.finetune import adapters
from harness.run import checkpoints
from harness.run.directory import RunDir
from harness.system import locks
from harness.system.screen import grid, say

FINISHED = ("ok", "oom", "target-missed")
"""Statuses that are results."""


@dataclass(frozen=True)
class _Found:
    """A run directory, its state, and the step of its newest whole checkpoint."""

    path: Path
    state: str
    resumable_at: int | None

    @property
    def has_work(self) -> bool:
        """Whether it has checkpoints to resume from, or adapters."""
        return (
            self.resumable_at is not None
            or (self.path / adapters.FOLDER / adapters.RECORD).exists()
        )


def clean(outdir: Path, *, everything: bool = False, agreed: bool = False) -> int:
    """List runs that failed or were killed and have nothing to resume, then remove them.

    Running runs stay in any case.

    Args:
        everything: also remove results and runs that can be resumed.
        agreed: do not ask. Otherwise a terminal is asked; without one nothing is removed.

    Returns:
        the exit status: 1 where runs remain that should have been removed.

    Raises:
        UserError: a run cannot be removed.
    """
    found = list(_runs(outdir))
    running = [run for run in found if run.state == "running"]
    ended = [run for run in found if run.state != "running"]
    to_remove = (
        ended
        if everything
        else [run for run in ended if run.state not in FINISHED and not run.has_work]
    )
    kept = [run for run in ended if run not in to_remove and run.state not in FINISHED]
    venv = ROOT / ".venv"
    extra = [venv] if everything and venv.is_dir() else []
    if to_remove or extra:
        _list_removals(outdir, to_remove, extra)
    for run in kept:
        way = f"RESUME={run.path.name} continues after step {run.resumable_at}"
        say(
            f"kept: {run.path.name} ({run.state}):"
            f" {'its adapters' if run.resumable_at is None else way}"
        )
    if not to_remove and not extra:
        say(f"nothing to remove in {outdir}")
        return 0
    if not (agreed or _asked()):
        say("nothing was removed; YES=1 removes it without asking")
        return 1
    removed = [run.path.name for run in to_remove if _remove(run.path)]
    say(f"removed {', '.join(removed)}" if removed else "no run was removed")
    if everything and running:
        say(
            f"{', '.join(run.path.name for run in running)} still running: kept, and .venv with it;"
            " make stop ends runs"
        )
        return 1
    return 0


def _runs(outdir: Path) -> Iterator[_Found]:
    for path in sorted(outdir.glob("*/")):
        if not ((path / "running.json").exists() or (path / "result.json").exists()):
            continue
        run = RunDir(path)
        try:
            state = run.state()
        except ValueError:
            state = "crash"
        whole = [
            found.step for found in checkpoints.in_folder(run.checkpoints) if found.damage is None
        ]
        yield _Found(path, state, max(whole, default=None))


def _list_removals(outdir: Path, to_remove: list[_Found], extra: list[Path]) -> None:
    sizes = {path: _size_bytes(path) for path in [*(run.path for run in to_remove), *extra]}
    say(f"to be removed from {outdir}:" if to_remove else "to be removed:")
    work = {
        run.path: f", step {run.resumable_at} can be resumed"
        for run in to_remove
        if run.resumable_at is not None
    }
    lines = [
        (run.path.name, run.state + work.get(run.path, ""), checkpoints.gib(sizes[run.path]))
        for run in to_remove
    ]
    lines += [(str(path), "installed packages", checkpoints.gib(sizes[path])) for path in extra]
    print(
        *(
            f"  {line}"
            for line in grid([*lines, ("in all", "", checkpoints.gib(sum(sizes.values())))])
        ),
        sep="\n",
    )


def _asked() -> bool:
    """Whether the user at the terminal says yes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input("remove this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(path: Path) -> bool:
    """Remove a run directory, unless a run has been started in it meanwhile."""
    try:
        locks.take(path, say)
        shutil.rmtree(path)
    except locks.Taken:
        return False
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from None
    finally:
        locks.release(path)
    return True


def _size_bytes(folder: Path) -> int:
    sizes = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                sizes += Path(inner, name).lstat().st_size
            except OSError:
                continue
    return sizes
