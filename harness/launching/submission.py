"""``SLURM=1``: submits experiments as jobs, chains or arrays, and records what was submitted."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from harness import ROOT
from harness.errors import UserError
from harness.experiment import command_line
from harness.launching import clusters, scheduler, slurm
from harness.system.files import json_object, text_lines, write_json

if TYPE_CHECKING:
    from harness.planning.plan import Plan

NO_CHECKPOINTS = (
    "it keeps no checkpoints: after a failed node or the time limit it begins at step 1;"
    " SAVE_EVERY=100 saves every 100 steps"
)


class Submitted(BaseModel):
    """slurm-<job>.json in OUTDIR: one job, or an array, that was submitted.

    Attributes:
        tasks: the labels of its experiments, one for each task of an array.
        first: the first job of its chain, whose run it resumes; its own number where there is none.
        time: Unix seconds.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str
    tasks: tuple[str, ...]
    first: str
    time: float

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1


def submit_or_print(plan: Plan, settings: Mapping[str, str]) -> int:
    """Submit ``plan`` as a job, or as CHAIN= jobs, where sbatch exists (unless DRY_RUN=1), else
    print the script. Returns the exit status.

    Raises:
        UserError: a setting is malformed, the cluster offers no such nodes, the output directory
            cannot be made, or Slurm refuses the job.
    """
    chain = command_line.count_in(settings, "CHAIN")
    if chain and not plan.extras.saving:
        raise UserError(
            f"CHAIN={chain}: each job resumes at the checkpoint of the one before, and"
            f" {plan.experiment.id} keeps none: add SAVE_EVERY=100"
        )
    script = slurm.render_sbatch(plan, settings)
    if not _submits(settings, script, f"make {plan.experiment.id} SLURM=1"):
        return 0
    _check([plan], settings)
    _make_outdir(plan.outdir)
    jobs: list[str] = []
    for _ in range(chain or 1):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        export = [f"--export=ALL,{slurm.CHAIN_VARIABLE}={jobs[0]}"] if jobs else []
        jobs.append(scheduler.submit(script, *after, *export))
        _record([plan], jobs[-1], first=jobs[0])
    print(f"submitted job{'s' * (len(jobs) > 1)} {', '.join(jobs)}: {plan.experiment.label}")
    if not plan.extras.saving:
        print(f"  {NO_CHECKPOINTS}")
    print(f"  make jobs-{jobs[0]} follows it; its output is in {plan.outdir}/slurm-{jobs[0]}.txt")
    return 0


def submit_all(plans: Sequence[Plan], settings: Mapping[str, str], target: str) -> int:
    """Submit ``plans`` as arrays, one for each number of nodes and GPUs: ``submit_or_print``."""
    if "CHAIN" in settings:
        raise UserError("CHAIN= is for one experiment; an array has a job for each already")
    groups: dict[tuple[int, int], list[Plan]] = {}
    for plan in plans:
        e = plan.experiment
        groups.setdefault((e.nodes, e.ranks_per_node), []).append(plan)
    for (nodes, ranks), group in groups.items():
        script = slurm.render_sbatch(group, settings, target)
        if not _submits(settings, script, f"make {target} SLURM=1"):
            continue
        _check(group, settings)
        _make_outdir(group[0].outdir)
        job = scheduler.submit(script)
        _record(group, job, first=job)
        each = f"{nodes} node{'s' * (nodes > 1)} x {ranks} rank{'s' * (ranks > 1)}"
        print(f"submitted job {job}: {len(group)} experiments of {target}, {each} each")
        print(f"  make jobs-{job} follows it")
    return 0


def submitted(outdir: Path) -> list[Submitted]:
    """Every job that was submitted for ``outdir``, the newest first."""
    found = []
    for path in outdir.glob("slurm-*.json"):
        try:
            found.append(Submitted.model_validate(json_object("\n".join(text_lines(path)))))
        except ValidationError:
            continue
    return sorted(found, key=lambda each: each.time, reverse=True)


def _submits(settings: Mapping[str, str], script: str, command: str) -> bool:
    """Whether to submit ``script``; prints it where not."""
    here = scheduler.is_here()
    if here and settings.get("DRY_RUN") != "1":
        return True
    print(script, end="")
    if not here:
        print(
            f"# no sbatch here; on a login node that sees {ROOT}: {command}, or sbatch this script",
            file=sys.stderr,
        )
    return False


def _check(plans: Sequence[Plan], settings: Mapping[str, str]) -> None:
    """Compare what ``plans`` need with what sinfo offers."""
    cluster, plan = clusters.find(settings), plans[0]
    ranks = plan.experiment.ranks_per_node
    if plan.device == "cuda" and cluster.gpus_per_node and ranks > cluster.gpus_per_node:
        raise UserError(
            f"{plan.experiment.id} needs {ranks} GPUs of a node, and"
            f" CLUSTER={settings.get('CLUSTER')} has {cluster.gpus_per_node}\nset NODES="
        )
    scheduler.check(
        scheduler.Ask(
            settings.get("PARTITION") or cluster.options.get("partition"),
            slurm.duration_s(slurm.limit_of(settings, cluster)),
            plan.experiment.nodes,
            slurm.cpus(plan, cluster),
            ranks if plan.device == "cuda" else 0,
            settings.get("CONSTRAINT") or cluster.options.get("constraint"),
        )
    )


def _make_outdir(outdir: Path) -> None:
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {outdir}: {error.strerror}") from None


def _record(plans: Sequence[Plan], job: str, first: str) -> None:
    labels = tuple(plan.experiment.label for plan in plans)
    record = Submitted(job=job, tasks=labels, first=first, time=time.time())
    write_json(plans[0].outdir / f"slurm-{job}.json", record.model_dump())
