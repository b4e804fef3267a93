"""``make jobs``: the Slurm jobs of an output directory: state, progress, log and result."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError, nearest
from harness.launching import scheduler, terminal
from harness.launching.scheduler import JobState
from harness.launching.submission import Submitted, submitted
from harness.launching.tails import Tail
from harness.run.directory import RunDir
from harness.run.job import run_of
from harness.system.screen import harmless, say

ASK_EVERY_S = 5.0
"""Slurm is asked for a job's state so often: its controller serves a whole cluster."""
READ_EVERY_S = 0.5
MOST_SHOWN = 30
UNKNOWN = "UNKNOWN"
"""The state of a job that Slurm has forgotten, and its accounting does not know."""


@dataclass(frozen=True)
class Row:
    """One job or one task of an array, as it is now."""

    id: str
    label: str
    state: JobState
    run: RunDir | None
    output: Path

    @property
    def progress(self) -> str:
        """Steps and loss of its run, why it waits, or how it ended."""
        if self.run is None:
            return self.state.reason if not self.state.is_over else ""
        result = _result(self.run)
        metrics = self.run.read_metrics()
        done = metrics[-1].step if metrics else 0
        text = f"step {done}"
        with suppress(ValueError):
            text += f" of {self.run.read_experiment().steps}"
        if metrics and metrics[-1].loss is not None:
            text += f", loss {metrics[-1].loss:.4f}"
        if result and (self.state.is_over or self.state.state == UNKNOWN):
            text = f"{result.status}, {text}"
        return text


def show(outdir: Path) -> int:
    """Print a table of the jobs that were submitted for ``outdir``, the newest first."""
    every = submitted(outdir)
    if not every:
        print(f"no job was submitted for {outdir}; make 101 SLURM=1 submits one")
        return 0
    _print(_rows(outdir, every[:MOST_SHOWN]), outdir)
    if len(every) > MOST_SHOWN:
        print(f"… and {len(every) - MOST_SHOWN} older ones")
    return 0


def follow(outdir: Path, number: str) -> int:
    """Print a job's output as it comes, then the result of its run; Ctrl-C leaves the job alone.

    Jobs of a chain follow one another. An array is listed, and ``number`` may be that of a task.

    Returns:
        the exit status: 0 where the run ended well.

    Raises:
        UserError: no such job was submitted for ``outdir``.
    """
    chain, task = _find(outdir, number)
    if chain[0].is_array and not task:
        _print(_rows(outdir, chain), outdir)
        say(f"make jobs JOB={chain[0].job}_0 follows its first task")
        return 0
    outputs = {job.job: Tail(_output(outdir, job.job, task)) for job in chain}
    asked_at, known, over = -math.inf, "", False
    while True:
        if time.monotonic() - asked_at > ASK_EVERY_S:
            asked_at = time.monotonic()
            states = [row.state for row in _rows(outdir, chain) if row.id.endswith(task)]
            if (now := "; ".join(map(_in_words, states))) != known:
                say(now)
            known = now
            over = all(state.is_over or state.state == UNKNOWN for state in states)
        for output in outputs.values():
            for line in output.lines():
                print(harmless(line), flush=True)
        if over:
            break
        time.sleep(READ_EVERY_S)
    run = run_of(chain[0].first + task, outdir)
    result = _result(run) if run else None
    if result is None:
        say(f"job {number} left no result; its output: {_output(outdir, chain[-1].job, task)}")
        return 1
    print(terminal.summary(run.label, run.path, result))
    return 0 if result.status == "ok" else 1


def cancel(outdir: Path, number: str, at_once: bool) -> int:
    """Cancel a job, and those of its chain that come later.

    What runs saves a checkpoint first, if it keeps some, unless ``at_once``.

    Raises:
        UserError: no such job was submitted for ``outdir``, or it is over.
    """
    chain, task = _find(outdir, number)
    own = number.partition("_")[0]
    jobs = [job for job in chain if int(job.job) >= int(own)]
    found = scheduler.states(job.job for job in jobs)
    left = [
        state for state in found.values() if not state.is_over and (not task or state.id == number)
    ]
    if not left:
        raise UserError(f"job {number} is over\nmake jobs lists those that are not")
    waiting = [state for state in left if state.state != "RUNNING"]
    for state in [*waiting, *(state for state in left if state not in waiting)]:
        runs = state.state == "RUNNING"
        scheduler.cancel(state.id, at_once=at_once or not runs)
        saves = " once its run has ended, with a checkpoint if it keeps some"
        print(f"canceled job {state.id}{saves if runs and not at_once else ''}")
    return 0


def _find(outdir: Path, number: str) -> tuple[list[Submitted], str]:
    """The jobs of the chain of ``number`` in their order, and its task: ``_3``, or empty."""
    if not re.fullmatch(r"\d+(_\d+)?", number):
        raise UserError(f"JOB={number}: expected the number of a job, such as 77 or 77_3")
    every = submitted(outdir)
    own, underscore, task = number.partition("_")
    job = next((each for each in every if each.job == own), None)
    if job is None:
        numbers = [each.job for each in every]
        raise UserError(f"JOB={number}: no such job of {outdir}; {nearest(own, numbers)}")
    if underscore and int(task) >= len(job.tasks):
        raise UserError(f"JOB={number}: job {own} has tasks 0 to {len(job.tasks) - 1}")
    chain = [each for each in every if each.first == job.first]
    return sorted(chain, key=lambda each: int(each.job)), underscore + task


def _rows(outdir: Path, jobs: Sequence[Submitted]) -> list[Row]:
    found = scheduler.states(job.job for job in jobs)
    rows = []
    for job in jobs:
        for number, label in enumerate(job.tasks):
            task = f"_{number}" if job.is_array else ""
            state = found.get(job.job + task, JobState(job.job + task, UNKNOWN))
            run = run_of(job.first + task, outdir)
            rows.append(Row(job.job + task, label, state, run, _output(outdir, job.job, task)))
    return rows


def _output(outdir: Path, job: str, task: str) -> Path:
    return outdir / f"slurm-{job}{task}.txt"


def _print(rows: Sequence[Row], outdir: Path) -> None:
    cells = [
        (
            row.id,
            row.state.state.lower(),
            f"{row.state.ran}/{row.state.limit}" if row.state.ran else "",
            row.progress,
            row.run.label if row.run else row.label,
        )
        for row in rows
    ]
    heads = ("job", "state", "time", "progress", "run")
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in (heads, *cells):
        padded = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        print(harmless(padded).rstrip())
    print(f"output: {outdir}/slurm-<job>.txt; make jobs-{rows[0].id} follows it")


def _in_words(state: JobState) -> str:
    waits = f" ({state.reason})" if state.reason and not state.is_over else ""
    runs_on = f" on {state.where}" if state.where and state.state == "RUNNING" else ""
    return f"job {state.id} {state.state.lower()}{waits}{runs_on}"


def _result(run: RunDir):
    try:
        return run.read_result()
    except ValueError:
        return None
