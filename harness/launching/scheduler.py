"""Slurm's own commands: what a cluster offers, submitting, and the states of jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.errors import UserError, nearest

ANSWER_S = 30
"""A controller that is busy answers within this time."""
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)
"""States of a job that is over: JOB STATE CODES in squeue(1)."""


@dataclass(frozen=True)
class Partition:
    """What one line of sinfo says of a partition: nodes of one kind.

    Attributes:
        limit_s: its time limit; None: none.
        nodes: how many, whatever their state.
        gpus: of a node; 0 where there are none, or Slurm does not count them.
    """

    name: str
    up: bool
    limit_s: int | None
    nodes: int
    cpus: int
    gpus: int
    features: frozenset[str]
    is_default: bool


@dataclass(frozen=True)
class Ask:
    """What a job asks for, to be checked against the partitions."""

    partition: str | None
    limit_s: int
    nodes: int
    cpus: int
    gpus: int
    constraint: str | None


@dataclass(frozen=True)
class JobState:
    """A job, or a task of an array (``77_3``), as squeue or sacct shows it.

    ``reason``: why it waits. ``where``: its nodes. Both are empty where there is nothing to say.
    """

    id: str
    state: str
    reason: str = ""
    ran: str = ""
    limit: str = ""
    where: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def partitions() -> list[Partition]:
    """What sinfo shows; empty where it is missing or does not answer."""
    text = _asked("sinfo", "--noheader", "--all", "--format=%R|%a|%l|%D|%c|%G|%f|%P")
    return [_partition(line) for line in (text or "").splitlines() if line.count("|") == 7]


def check(ask: Ask) -> None:
    """Compare ``ask`` with what sinfo offers, where there is a sinfo that answers.

    Raises:
        UserError: no partition is called so, or none of its nodes can ever run the job.
    """
    offered = partitions()
    if not offered:
        return
    names = list(dict.fromkeys(each.name for each in offered))
    if ask.partition is None:
        kinds = [each for each in offered if each.is_default]
        if not kinds:
            raise UserError(f"no partition is the default here: PARTITION={' or '.join(names)}")
    elif "," in ask.partition:
        return  # Slurm takes whichever of them starts first
    else:
        kinds = [each for each in offered if each.name == ask.partition]
        if not kinds:
            raise UserError(f"PARTITION={ask.partition}; {nearest(ask.partition, names)}")
    name = kinds[0].name
    limits = [each.limit_s for each in kinds]
    if None not in limits and ask.limit_s > max(limits):
        raise UserError(
            f"TIME: {ask.limit_s} s, and partition {name} ends jobs after {max(limits)} s"
            f"\nset a shorter TIME=; with SAVE_EVERY= the job is requeued and resumes, and CHAIN=8"
            " submits eight of them"
        )
    wanted = _required_features(ask.constraint)
    if wanted and not any(wanted <= each.features for each in kinds):
        there = sorted(frozenset().union(*(each.features for each in kinds)))
        raise UserError(
            f"CONSTRAINT={ask.constraint}: no node of partition {name} has that; features there:"
            f" {', '.join(there) or 'none'}"
        )
    kinds = [each for each in kinds if wanted <= each.features]
    # where Slurm counts no GPUs, it may still have them
    counted = any(each.gpus for each in offered)
    for what, key, asked in (("GPUs", "gpus", ask.gpus), ("cores", "cpus", ask.cpus)):
        most = max(getattr(each, key) for each in kinds)
        if asked > most and (key != "gpus" or counted):
            raise UserError(
                f"the job needs {asked} {what} of a node, and nodes of partition {name} have at"
                f" most {most}\nanother PARTITION=, or more NODES= with fewer GPUs each"
            )
    if ask.nodes > (there := sum(each.nodes for each in kinds)):
        raise UserError(f"NODES={ask.nodes}: partition {name} has {there} that fit the job")


def submit(script: str, *options: str) -> str:
    """Submit ``script``; the number of the job.

    Raises:
        UserError: sbatch refuses it.
    """
    done = subprocess.run(
        ["sbatch", "--parsable", *options], input=script, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}\nDRY_RUN=1 shows it")
    return done.stdout.strip().split(";")[0]


def states(numbers: Iterable[str]) -> dict[str, JobState]:
    """The states of jobs, by number, tasks of arrays one by one (``77_3``).

    Jobs that Slurm has forgotten, and its accounting does not know, are left out.
    """
    wanted = set(numbers)
    if not wanted or not is_here():
        return {}
    every = ("--noheader", "--all", "--me", "--array", "--states=all")
    text = _asked("squeue", *every, "--format=%i|%T|%r|%M|%l|%N")
    found = {each.id: each for each in map(_state, (text or "").splitlines()) if each}
    forgotten = wanted - {id_.partition("_")[0] for id_ in found}
    if forgotten and shutil.which("sacct"):
        which = f"--jobs={','.join(sorted(forgotten))}"
        fields = "--format=JobID,State,Reason,Elapsed,Timelimit,NodeList"
        text = _asked("sacct", "--noheader", "--parsable2", "--allocations", which, fields)
        for line in (text or "").splitlines():
            if each := _state(line):
                found[each.id] = each
    return {id_: each for id_, each in found.items() if id_.partition("_")[0] in wanted}


def duration_s(text: str) -> int:
    """Seconds of a time limit as Slurm reads and writes it: ``30`` (minutes), ``30:00``,
    ``1:00:00``, ``2-12``, ``2-12:00`` or ``2-12:00:00``."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def cancel(number: str, at_once: bool) -> None:
    """Cancel a job: at once, or by a SIGTERM to its batch script, which has the run save first.

    Raises:
        UserError: scancel refuses.
    """
    how = [] if at_once else ["--batch", "--signal=TERM"]
    done = subprocess.run(["scancel", *how, number], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scancel refused: {done.stderr.strip()}")


def _asked(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or is silent for ``ANSWER_S``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def _state(line: str) -> JobState | None:
    fields = [field.strip() for field in line.split("|")]
    if len(fields) != 6:
        return None
    id_, state, reason, *rest = fields
    # sacct writes "CANCELLED by 1000"; both write no reason as None
    return JobState(id_, state.split(" ")[0], "" if reason == "None" else reason, *rest)


def _partition(line: str) -> Partition:
    name, available, limit, nodes, cpus, gres, features, marked = line.split("|")
    gpus = [int(count) for count in re.findall(r"gpu(?::[^:,()]+)*:(\d+)", gres)]
    return Partition(
        name,
        available == "up",
        None if limit in ("infinite", "n/a") else duration_s(limit),
        int(nodes),
        int(cpus.rstrip("+")),
        sum(gpus),
        frozenset() if features == "(null)" else frozenset(features.split(",")),
        marked.endswith("*"),
    )


def _required_features(constraint: str | None) -> frozenset[str]:
    """Features that every node must have; none where the constraint has alternatives."""
    if constraint is None or re.search(r"[|*\[(]", constraint):
        return frozenset()
    return frozenset(re.split(r"[&,]", constraint))


def of_user(numbers: Sequence[str], found: Mapping[str, JobState]) -> list[JobState]:
    """The states of each of ``numbers`` and of its tasks, in this order."""
    return [
        found[id_]
        for number in numbers
        for id_ in sorted(found, key=_by_task)
        if id_.partition("_")[0] == number
    ]


def _by_task(id_: str) -> tuple[str, int]:
    number, _, task = id_.partition("_")
    return number, int(task) if task.isdigit() else -1
