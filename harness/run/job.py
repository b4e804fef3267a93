"""The batch job that a launcher runs in: its identity, and the files through which both talk.

A batch script exports ``HARNESS_JOB`` and ``HARNESS_JOB_FILES`` (harness/launching/slurm.py). A job
that starts again after a time limit or the failure of a node keeps its identity, and so finds its
run.

FILES.end      the script makes it shortly before the time limit: save a checkpoint and end
FILES.again    the launcher makes it where the job should start again, and the run would resume
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.run.directory import RunDir

JOB_VARIABLE = "HARNESS_JOB"
"""Environment variable with its identity: its number, or that of the first job of its chain."""
FILES_VARIABLE = "HARNESS_JOB_FILES"
"""Environment variable with the path of the job's files, without their endings."""
RESTARTS_VARIABLE = "SLURM_RESTART_COUNT"
"""Slurm's count of how often it started the job again; absent at its first start."""
MOST_VAIN_STARTS = 3
"""A job starts again so often without progress: a broken set-up would do so for ever."""


@dataclass(frozen=True)
class Job:
    """The job of this process."""

    id: str
    files: Path | None
    restarts: int

    @property
    def must_end(self) -> bool:
        """Whether the batch script asks the run to save and end."""
        return self.files is not None and Path(f"{self.files}.end").exists()

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


def run_of(id_: str, outdir: Path) -> RunDir | None:
    """The newest run in ``outdir`` that belongs to job ``id_``."""
    found = []
    for path in outdir.glob("*/running.json"):
        run = RunDir(path.parent.resolve())
        if (running := run.read_running()) and running.job == id_:
            found.append((running.started, run))
    return max(found, key=lambda each: each[0])[1] if found else None
