"""A sweep as Slurm job arrays: one task for each point."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import UserError
from harness.launching import scheduler, slurm
from harness.sweep.points import Point
from harness.sweep.request import SweepRequest
from harness.system.files import make_folder, told_if_unwritable, write_text
from harness.system.screen import harmless

TASKS = "tasks"
"""Folder of the points' batch scripts, each as ``make <id> SLURM=1`` would submit it."""
JOB = "job"
"""File with the number of a submitted array, beside its scripts."""
_OPTION = re.compile(r"^#SBATCH --([\w-]+)=(.*)$", re.MULTILINE)
_OF_ONE_POINT = ("job-name",)
"""Options in which the points of an array may differ."""


def submit_or_print(
    request: SweepRequest, points: Sequence[Point], settings: Mapping[str, str]
) -> int:
    """Submit an array for ``points`` where sbatch exists, else write it and say where.

    Tasks of an array get the same resources, so points that need others are another array.

    With DRY_RUN=1 the arrays are printed and nothing is written. Returns the exit status.

    Raises:
        UserError: a setting is malformed, an array of this sweep has not ended, the folder cannot
            be written, or Slurm refuses a job.
    """
    dry_run = settings.get("DRY_RUN") == "1"
    if not points:
        print("every point has its result; FORCE=1 runs them again")
        return 0
    if not dry_run:
        _check_none_is_queued(request.folder)
    for number, group in enumerate(_by_resources(points), 1):
        folder = request.folder / f"{TASKS}-{number}"
        text = render(request, group, folder)
        if dry_run:
            print(f"\n{text}", end="")
            continue
        script = _write(text, group, folder)
        if not scheduler.is_here():
            print(
                f"no sbatch here; on a login node that sees {folder}: sbatch {script}",
                file=sys.stderr,
            )
            continue
        job = scheduler.submit(text)
        write_text(folder / JOB, job)
        print(f"submitted array {job}, {len(group)} tasks: squeue --job {job}")
    if not dry_run:
        print("the same command shows the table so far, and submits what is missing at the end")
    return 0


def render(request: SweepRequest, group: Mapping[str, str], folder: Path) -> str:
    """The batch script of an array.

    Args:
        group: batch scripts by the name of their point.
        folder: where these scripts are, ``0.sh`` and so on.
    """
    options = dict(_OPTION.findall(next(iter(group.values()))))
    options |= {
        "job-name": f"sweep-{request.row.id}",
        "array": f"0-{len(group) - 1}",
        "output": options["output"].replace("%j", "%A_%a"),
    }
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH --{name}={value}" for name, value in options.items()),
            "",
            _comment(f"{request.row.name}: {request.command}"),
            *(_comment(f"  task {task}: {name}") for task, name in enumerate(group)),
            "set -euo pipefail",
            f'exec bash {shlex.quote(str(folder))}/"$SLURM_ARRAY_TASK_ID".sh',
            "",
        ]
    )


def _comment(text: str) -> str:
    """A line of a script that says ``text``, whatever line breaks a value has."""
    return f"# {harmless(text.replace(chr(10), ' '))}"


def _by_resources(points: Sequence[Point]) -> list[dict[str, str]]:
    """Batch scripts by name of their point, those that need the same resources together."""
    groups: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for point in points:
        script = slurm.render_sbatch(point.plan, point.candidate.typed)
        options = [one for one in _OPTION.findall(script) if one[0] not in _OF_ONE_POINT]
        groups.setdefault(tuple(options), {})[point.name] = script
    return [*groups.values()]


def _write(text: str, group: Mapping[str, str], folder: Path) -> Path:
    """Write the array's script and those of its tasks; return the path of the first."""
    with told_if_unwritable(folder):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        for task, script in enumerate(group.values()):
            write_text(folder / f"{task}.sh", script)
        write_text(folder / "array.sh", text)
    return folder / "array.sh"


def _check_none_is_queued(folder: Path) -> None:
    """Raise UserError where Slurm still has a job of an array of this sweep."""
    squeue = shutil.which("squeue")
    for path in folder.glob(f"{TASKS}-*/{JOB}") if squeue else ():
        job = path.read_text().strip()
        listed = subprocess.run(
            [squeue, "--noheader", "--job", job], capture_output=True, text=True
        )  # it fails for a job that ended a while ago
        if listed.returncode == 0 and listed.stdout.strip():
            raise UserError(
                f"array {job} of this sweep has not ended: squeue --job {job}\n"
                f"wait for it, or end it: scancel {job}"
            )
