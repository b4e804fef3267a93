"""``make stop``: ends the runs of this machine, also where their launcher is gone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError, nearest
from harness.launching import processes
from harness.launching.active_run import SAVES_S
from harness.launching.torchrun import GRACE_S
from harness.run import directory
from harness.run.directory import RUN_DIR_VARIABLE, StoredRun
from harness.system import locks
from harness.system.screen import say

if TYPE_CHECKING:
    import psutil


def stop(outdir: Path, label: str | None = None) -> int:
    """End every run of this machine in ``outdir``, or the one called ``label``; results stay.

    Returns:
        the exit status: 1 where a run on another machine was not ended.

    Raises:
        UserError: no run is called ``label``.
    """
    runs, _ = directory.runs(outdir)
    labels = [run.dir.label for run in runs]
    if label and label not in labels:
        hint = f"; {nearest(label, labels)}" if labels else ""
        raise UserError(f"no run in {outdir} is called {label}{hint}")
    ended: dict[str, list[psutil.Process]] = {}
    elsewhere: list[str] = []
    for run in runs:
        name = run.dir.label
        unfinished = run.state == "running" or run.result is None
        if not unfinished or label not in (None, name):
            continue
        holder = locks.holder(run.dir.path, watch=False)
        if found := _to_end(run, holder, launcher_first=label is None):
            ended[name] = found
        elif holder:
            elsewhere.append(f"{name} is not stopped: {holder} runs it, stop it there")
    # a launcher itself waits GRACE_S for its ranks, and lets them save before
    saving = any(run.dir.read_saving() for run in runs if run.dir.label in ended)
    limit_s = 2 * GRACE_S + (SAVES_S if saving else 0)
    processes.end({p for found in ended.values() for p in found}, limit_s)
    if ended or not elsewhere:
        print(f"stopped {', '.join(ended)}" if ended else f"nothing runs in {outdir}")
    for line in elsewhere:
        say(line)
    return 1 if elsewhere else 0


def _to_end(
    run: StoredRun, holder: locks.Holder | None, launcher_first: bool
) -> list[psutil.Process]:
    """The launcher of ``run``, which ends its ranks; else whatever else belongs to the run.

    A single run of a chapter is ended without its launcher, which then starts the next one.
    """
    import psutil

    if launcher_first and holder and holder.lives:
        return [psutil.Process(holder.pid)]
    return processes.marked(**{RUN_DIR_VARIABLE: str(run.dir.path.resolve())})
