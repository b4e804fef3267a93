"""Runs as Slurm jobs: a batch script that starts one launcher on each node."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from harness import ROOT
from harness.errors import UserError
from harness.planning.script import shell_word

if TYPE_CHECKING:
    from harness.planning.plan import Plan

TIME = "00:30:00"
CPUS_PER_GPU = 4
"""A rank's main thread, two data loaders and NCCL's proxy thread."""
ENDS_EARLY_S = 60
"""Slurm sends SIGTERM this long before the time limit: the launcher then writes the result."""

LAUNCHER = ("scripts/setup.sh", "light", "--", "-m", "harness", "run")
ON_A_NODE = {"node_rank": "$SLURM_NODEID", "rendezvous": "$RENDEZVOUS"}
NOT_FOR_NODES = (
    "SLURM",
    "PARTITION",
    "ACCOUNT",
    "TIME",
    "DRY_RUN",
    "NODE_RANK",
    "RENDEZVOUS",
    "OUTDIR",
    "DEVICE",
)
_NAME = re.compile(r"[\w.,@+-]+")
_DURATION = re.compile(r"\d+|(\d+-)?\d+(:\d\d){1,2}|\d+-\d+")


def submit_or_print(plan: Plan, settings: Mapping[str, str]) -> int:
    """Submit ``plan`` as a job where sbatch exists (unless DRY_RUN=1), else print the script.
    Returns the exit status.

    Raises:
        UserError: a setting is malformed, the output directory cannot be made, or Slurm refuses
            the job.
    """
    script = render_sbatch(plan, settings)
    sbatch = shutil.which("sbatch")
    if sbatch is None or settings.get("DRY_RUN") == "1":
        print(script, end="")
        if sbatch is None:
            e = plan.experiment
            print(
                f"# no sbatch here; on a login node that sees {ROOT}: "
                f"make {e.id} SLURM=1, or sbatch this script",
                file=sys.stderr,
            )
        return 0
    try:
        plan.outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {plan.outdir}: {error.strerror}") from None
    done = subprocess.run([sbatch, "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"sbatch refused the job: {done.stderr.strip()}\nmake {plan.experiment.id} SLURM=1"
            " DRY_RUN=1 shows it"
        )
    job = done.stdout.strip().split(";")[0]
    print(
        f"submitted job {job}: {plan.experiment.label}\n  squeue --job {job}\n  tail -F"
        f" {plan.outdir}/slurm-{job}.txt"
    )
    return 0


def render_sbatch(plan: Plan, settings: Mapping[str, str]) -> str:
    """The batch script for ``plan``: resources, rendezvous, one launcher on each node.

    Args:
        settings: the user's; PARTITION, ACCOUNT and TIME are for Slurm, the others are passed to
            the launchers.

    Raises:
        UserError: a setting for Slurm is malformed.
    """
    e = plan.experiment
    options = {
        "job-name": e.name,
        "partition": _checked(settings, "PARTITION", _NAME),
        "account": _checked(settings, "ACCOUNT", _NAME),
        "time": _checked(settings, "TIME", _DURATION) or TIME,
        "nodes": str(e.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(e.ranks_per_node),
        "cpus-per-gpu": str(CPUS_PER_GPU),
        "signal": f"TERM@{ENDS_EARLY_S}",
        "output": f"{_in_a_comment(str(plan.outdir))}/slurm-%j.txt",
    }
    words = [f"{key}={value}" for key, value in settings.items() if key not in NOT_FOR_NODES]
    run = [*LAUNCHER, e.id, *words, "DEVICE=cuda", f"OUTDIR={plan.outdir}"]
    here = replace(plan, place=replace(plan.place, **ON_A_NODE)) if e.nodes > 1 else plan
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{name}={_option(value)}" for name, value in options.items() if value),
        "",
        f"# {e.name}: {e.shows}",
        (
            f"# Slurm sends SIGTERM {ENDS_EARLY_S} s before the time limit: ranks end, results so"
            " far are kept."
        ),
        "set -euo pipefail",
        f"cd {shlex.quote(str(ROOT))}",
        "",
        "# Packages are brought up to date once, before every node uses them.",
        "scripts/setup.sh light heavy",
        "",
        f"run=({' '.join(map(shell_word, run))})",
        *(_on_every_node() if e.nodes > 1 else ['exec srun "${run[@]}"']),
        "",
        "# What runs on each node:",
        *(f"#   {line}".rstrip() for line in here.script().splitlines()),
    ]
    return "\n".join([*lines, ""])


def _on_every_node() -> list[str]:
    return [
        "# The rendezvous is on the first node, at a port that differs between jobs.",
        'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 20000))"',
        "# shellcheck disable=SC2016  # expanded on each node",
        "exec srun bash -c "
        """'exec "$@" NODE_RANK="$SLURM_NODEID" RENDEZVOUS="$RENDEZVOUS"' node "${run[@]}\"""",
    ]


def _in_a_comment(folder: str) -> str:
    """``folder`` as an option in a line of ``#SBATCH``, where % must be doubled.

    Raises:
        UserError: it has characters that would end the option or the line.
    """
    if not folder.isprintable() or re.search(r"[\"'\\]", folder):
        raise UserError(
            f"OUTDIR={folder!r}: sbatch takes no folder with quotes, backslashes or line breaks in"
            " its name"
        )
    return folder.replace("%", "%%")


def _option(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value


def _checked(settings: Mapping[str, str], key: str, pattern: re.Pattern[str]) -> str | None:
    value = settings.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise UserError(
            f"{key}={value} is not what sbatch takes, such as"
            f" {key}={'00:30:00' if key == 'TIME' else 'gpu'}"
        )
    return value
