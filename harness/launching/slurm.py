"""Batch scripts for Slurm: a launcher on each node; before the time limit, it saves and resumes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from harness.errors import UserError
from harness.launching import clusters
from harness.launching.clusters import Cluster
from harness.launching.scheduler import duration_s
from harness.planning.request import FOR_BATCH
from harness.planning.script import shell_word
from harness.run.job import FILES_VARIABLE, JOB_VARIABLE

if TYPE_CHECKING:
    from harness.planning.plan import Plan

TIME = "00:30:00"
GRACE_S = 120
"""Slurm asks a job to save and end this long before its time limit; Slurm may do so 60 s early."""
WITHOUT_SAVING_GRACE_S = 60
"""The same for a run that keeps no checkpoints: its launcher writes the result."""
BEFORE_LIMIT, CANCELED = "before the time limit of its job", "because its job was canceled"
CHAIN_VARIABLE = "HARNESS_CHAIN"
"""Environment variable of the second and later jobs of a chain: the number of the first."""

REMOVE_FILES = f'rm -f "${FILES_VARIABLE}.end" "${FILES_VARIABLE}.again"'
LAUNCHER = ("scripts/setup.sh", "light", "--", "-m", "harness", "run")
ON_A_NODE = {"node_rank": "$SLURM_NODEID", "rendezvous": "$RENDEZVOUS"}
NOT_FOR_NODES = (
    *FOR_BATCH["SLURM"],
    "SLURM",
    "DRY_RUN",
    "NODE_RANK",
    "RENDEZVOUS",
    "OUTDIR",
    "DEVICE",
    "PACK",
    "FORCE",
)
_NAME = re.compile(r"[\w.,@+-]+")
_FEATURES = re.compile(r"[\w.,@+&|*()\[\]-]+")
_DURATION = re.compile(r"\d+|(\d+-)?\d+(:\d\d){1,2}|\d+-\d+")


def render_sbatch(plans: Sequence[Plan] | Plan, settings: Mapping[str, str], name: str = "") -> str:
    """The batch script for ``plans``: resources, rendezvous, one launcher on each node.

    Several plans, which need the same nodes and GPUs, become an array: one task each.

    Args:
        settings: the user's; those of FOR_BATCH are for Slurm, the others are passed to the
            launchers.
        name: of an array.

    Raises:
        UserError: a setting for Slurm, or the cluster's profile, is malformed.
    """
    plans = list(plans) if isinstance(plans, Sequence) else [plans]
    first, cluster = plans[0], clusters.find(settings)
    e, several = first.experiment, len(plans) > 1
    options = _options(plans, settings, cluster) | {"job-name": name if several else e.name}
    lines = [
        "#!/usr/bin/env bash",
        *(_sbatch_line(key, value) for key, value in options.items() if value is not None),
        "",
        f"# {f'{len(plans)} experiments, one a task' if several else f'{e.name}: {e.shows}'}",
        "set -euo pipefail",
        f"cd {shlex.quote(str(ROOT))}",
        *cluster.setup,
        *(f"export {key}={shell_word(value)}" for key, value in cluster.environment.items()),
        "",
        *_start_and_end(plans),
        "",
        *_packages(cluster),
        *_commands(plans, settings),
        *(_on_every_node() if e.nodes > 1 else ['command=("${run[@]}")']),
        f'srun {" ".join(_srun_words(first, settings, cluster))} "${{command[@]}}" &',
        *_wait_and_requeue("CHAIN" in settings),
    ]
    if not several:
        here = replace(first, place=replace(first.place, **ON_A_NODE)) if e.nodes > 1 else first
        script = here.script().splitlines()
        lines += ["", "# What runs on each node:", *(f"#   {line}".rstrip() for line in script)]
    return "\n".join([*lines, ""])


def limit_of(settings: Mapping[str, str], cluster: Cluster) -> str:
    """The time limit: TIME=, else the profile's, else ``TIME``."""
    found = {"TIME": cluster.options.get("time", TIME), **settings}
    return checked(found, "TIME") or TIME


def grace_s(plan: Plan, settings: Mapping[str, str], limit: str) -> int:
    """Seconds before the time limit at which the run saves and ends.

    Raises:
        UserError: GRACE= is no number, or the time limit leaves nothing to train.
    """
    default = GRACE_S if plan.extras.saving else WITHOUT_SAVING_GRACE_S
    text = settings.get("GRACE", str(default))
    if not text.isdecimal() or not int(text):
        raise UserError(f"GRACE={text}: expected seconds before the time limit, such as GRACE=300")
    if duration_s(limit) <= int(text):
        raise UserError(
            f"TIME={limit} is {duration_s(limit)} s, and GRACE={text} of them are for saving:"
            " nothing is left to train; set a longer TIME=, or a shorter GRACE="
        )
    return int(text)


def cpus(plan: Plan, cluster: Cluster) -> int:
    """Cores of a node that a job asks for: some for each GPU; on a CPU one for each rank."""
    ranks = plan.experiment.ranks_per_node
    return ranks if plan.device == "cpu" else ranks * cluster.cpus_per_gpu


def checked(settings: Mapping[str, str], key: str) -> str | None:
    """The value of a setting for sbatch; None where it is not given.

    Raises:
        UserError: sbatch would not take it as one word.
    """
    value = settings.get(key)
    pattern, example = {
        "TIME": (_DURATION, "00:30:00"),
        "CONSTRAINT": (_FEATURES, "h100"),
    }.get(key, (_NAME, "normal" if key == "QOS" else "gpu"))
    if value is not None and not pattern.fullmatch(value):
        raise UserError(f"{key}={value} is not what sbatch takes, such as {key}={example}")
    return value


def _options(
    plans: Sequence[Plan], settings: Mapping[str, str], cluster: Cluster
) -> dict[str, str | None]:
    """Options of sbatch; an empty value is a switch, None leaves it out."""
    plan, several = plans[0], len(plans) > 1
    ranks, limit = plan.experiment.ranks_per_node, limit_of(settings, cluster)
    gpus = f"gpu:{ranks}" if cluster.gpu_option == "gres" else str(ranks)
    exclusive = settings.get("EXCLUSIVE", "1" if "exclusive" in cluster.options else "0")
    folder = _in_a_comment(str(plan.outdir))
    return {
        "job-name": None,
        **{key: value for key, value in cluster.options.items() if key != "exclusive"},
        **{
            key.lower(): value
            for key in ("PARTITION", "ACCOUNT", "QOS", "CONSTRAINT")
            if (value := checked(settings, key))
        },
        "time": limit,
        "nodes": str(plan.experiment.nodes),
        "ntasks-per-node": "1",
        cluster.gpu_option: gpus if plan.device == "cuda" else None,
        "cpus-per-task": str(cpus(plan, cluster)),
        "exclusive": cluster.options.get("exclusive", "") if exclusive == "1" else None,
        "array": f"0-{len(plans) - 1}" if several else None,
        "signal": f"B:USR1@{max(grace_s(each, settings, limit) for each in plans)}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder}/slurm-{'%A_%a' if several else '%j'}.txt",
    }


def _sbatch_line(key: str, value: str) -> str:
    quoted = f'"{value}"' if re.search(r"[\s*|&()]", value) else value
    return f"#SBATCH --{key}{f'={quoted}' if value else ''}"


def _start_and_end(plans: Sequence[Plan]) -> list[str]:
    """How the job knows itself again, and how Slurm asks it to end."""
    return [
        "# A job that starts again, and the later jobs of a chain, resume the run of this number.",
        'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
        f'export {JOB_VARIABLE}="${{{CHAIN_VARIABLE}:-$job}}"',
        f'export {FILES_VARIABLE}={shell_word(str(plans[0].outdir))}/slurm-"$job"',
        REMOVE_FILES,
        "# USR1 comes from Slurm before the time limit, TERM from make cancel. The launcher",
        "# sees the file: ranks save a checkpoint if they keep some, and end.",
        f"trap 'echo {BEFORE_LIMIT} > \"${FILES_VARIABLE}.end\"' USR1",
        f"trap 'echo {CANCELED} > \"${FILES_VARIABLE}.end\"; canceled=1' TERM",
        "canceled=",
    ]


def _packages(cluster: Cluster) -> list[str]:
    if cluster.container:
        return ["# Packages are those of the container.", "export VENV=0", ""]
    return [
        "# Packages are brought up to date once, before every node uses them.",
        "scripts/setup.sh light heavy",
        "",
    ]


def _commands(plans: Sequence[Plan], settings: Mapping[str, str]) -> Iterator[str]:
    """The launcher's words, ``run``; of an array, those of its task."""
    if len(plans) == 1:
        yield f"run=({_words(plans[0], settings)})"
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for number, plan in enumerate(plans):
        yield f"{number}) run=({_words(plan, settings)}) ;;"
    yield "esac"


def _words(plan: Plan, settings: Mapping[str, str]) -> str:
    given = [f"{key}={value}" for key, value in settings.items() if key not in NOT_FOR_NODES]
    if "FORCE" in settings and "RESUME" in settings:
        given.append(f"FORCE={settings['FORCE']}")
    words = [*LAUNCHER, plan.experiment.id, *given]
    return " ".join(map(shell_word, [*words, f"DEVICE={plan.device}", f"OUTDIR={plan.outdir}"]))


def _on_every_node() -> list[str]:
    return [
        "# The rendezvous is on the first node, at a port that differs between jobs.",
        'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export RENDEZVOUS="$first:$((20000 + SLURM_JOB_ID % 20000))"',
        "# shellcheck disable=SC2016  # expanded on each node",
        "command=(bash -c "
        """'exec "$@" NODE_RANK="$SLURM_NODEID" RENDEZVOUS="$RENDEZVOUS"' node "${run[@]}")""",
    ]


def _srun_words(plan: Plan, settings: Mapping[str, str], cluster: Cluster) -> list[str]:
    """Options of srun, and the command that enters the container."""
    # srun does not read --cpus-per-task of sbatch since Slurm 22.05
    words = ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus(plan, cluster)}", *cluster.srun]
    container = cluster.container
    if container is None:
        return [shell_word(word) for word in words]
    folders = dict.fromkeys([*_folders(plan), *container.mounts])
    if container.kind == "pyxis":
        mounts = ",".join(each if ":" in each else f"{each}:{each}" for each in folders)
        words += [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        words += [f"--container-workdir={ROOT}", *container.options]
    else:
        gpus = {"nvidia": "--nv", "amd": "--rocm"}[cluster.gpus]
        words += [container.kind, container.command, *([gpus] if plan.device == "cuda" else [])]
        words += [*container.options, "--pwd", str(ROOT)]
        words += [word for each in folders for word in ("--bind", each)]
        words.append(container.image)
    return [shell_word(word) for word in words]


def _folders(plan: Plan) -> Iterator[str]:
    """Folders of the host that a run reads or writes."""
    yield str(ROOT)
    yield str(plan.outdir)
    if tree := os.environ.get("MEGATRON_LM"):
        yield str(Path(tree).resolve())
    if plan.extras.saving and plan.extras.saving.folder:
        yield str(plan.extras.saving.folder)
    if plan.extras.loading:
        yield str(plan.extras.loading.folder)


def _wait_and_requeue(in_chain: bool) -> list[str]:
    """Wait for srun; start the job again where the launcher says so."""
    lines = [
        "step=$! status=0",
        "# A signal ends wait, not srun.",
        "while true; do",
        '  if wait "$step"; then status=0; else status=$?; fi',
        '  kill -0 "$step" 2>/dev/null || break',
        "done",
        'if [[ -n $canceled ]]; then scancel "$SLURM_JOB_ID"; fi # its state is then CANCELLED',
    ]
    if not in_chain:
        lines += [
            "# The launcher ended before the time limit, or lost a node: the run is to resume.",
            f'if [[ -z $canceled && -e "${FILES_VARIABLE}.again" ]]; then',
            '  if scontrol requeue "$SLURM_JOB_ID"; then sleep 60; fi # ends this script',
            "fi",
        ]
    return [*lines, REMOVE_FILES, 'exit "$status"']


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
