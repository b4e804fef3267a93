"""The batch job that a launcher runs in: its identity, and the files through which both talk.

A batch script exports ``HARNESS_JOB`` and ``HARNESS_JOB_FILES`` (harness/launching/slurm.py). A job
that starts again after a time limit or the failure of a node keeps its identity, and so finds its
run.

FILES.end      the script makes it shortly before the time limit, or where the job is canceled: save
               a checkpoint and end; its text is the reason, such as ``before its time limit``
FILES.again    the launcher makes it where the job should start again, and the run would resume
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from harness.run.directory import RunDir
from harness.system import locks
from harness.system.files import text_lines, write_text
from harness.system.locks import Holder

JOB_VARIABLE = "HARNESS_JOB"
"""Environment variable with its identity: its number, or that of the first job of its chain."""
FILES_VARIABLE = "HARNESS_JOB_FILES"
"""Environment variable with the path of the job's files, without their endings."""
RESTARTS_VARIABLE = "SLURM_RESTART_COUNT"
"""Slurm's count of how often it started the job again; absent at its first start."""
MOST_VAIN_STARTS = 3
"""A job starts again so often without progress: a broken set-up would do so for ever."""


EARLIER_START_S = 600.0
"""A job that starts again waits so long for the end of its earlier start: where the slurmd of a
node was killed alone, what it had started runs on."""
MOVED = "because its job was started again elsewhere"


@dataclass(frozen=True)
class Job:
    """The job of this process."""

    id: str
    files: Path | None
    restarts: int

    @property
    def ends(self) -> str | None:
        """Why the batch script asks the run to save and end; None where it does not."""
        lines = text_lines(Path(f"{self.files}.end")) if self.files else []
        return lines[0] if lines else None

    def start_again(self, made_progress: bool) -> None:
        """Have the batch script start the job again, unless it did so in vain too often."""
        if self.files and (made_progress or self.restarts < MOST_VAIN_STARTS):
            Path(f"{self.files}.again").touch()


def current() -> Job | None:
    """The job of this process; None where there is none."""
    if not (id_ := os.environ.get(JOB_VARIABLE)):
        return None
    files, restarts = os.environ.get(FILES_VARIABLE), os.environ.get(RESTARTS_VARIABLE, "0")
    return Job(id_, Path(files) if files else None, int(restarts) if restarts.isdigit() else 0)


def holder_after_waiting(folder: Path) -> Holder | None:
    """The process that holds the lock of ``folder``, or None.

    Where that is the run of this process's job, it is what is left of the job's earlier start: it
    is asked to save and end, and waited for.
    """
    holder, own = locks.holder(folder), current()
    running = RunDir(folder).read_running()
    if not holder or not own or not own.files or not running or running.job != own.id:
        return holder
    ends = Path(f"{own.files}.end")
    write_text(ends, f"{MOVED}\n")
    deadline = time.monotonic() + EARLIER_START_S
    while (holder := locks.holder(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    ends.unlink(missing_ok=True)
    return holder


def run_of(id_: str, outdir: Path) -> RunDir | None:
    """The newest run in ``outdir`` that belongs to job ``id_``."""
    found = []
    for path in outdir.glob("*/running.json"):
        run = RunDir(path.parent.resolve())
        if (running := run.read_running()) and running.job == id_:
            found.append((running.started, run))
    return max(found, key=lambda each: each[0])[1] if found else None
