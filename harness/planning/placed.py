"""Fourth stage: the node and its GPUs, the run to resume, and the folder of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.experiment import command_line
from harness.planning import run_to_resume
from harness.planning.fitted import FittedRun
from harness.planning.request import RunRequest
from harness.planning.run_to_resume import RunToResume
from harness.planning.script import NUMA_BINDINGS, Place
from harness.run.checkpoints import Saving


@dataclass(frozen=True)
class PlacedRun:
    """Where the run happens.

    Attributes:
        resumed: the run that it resumes; None: it begins a new one.
        saving: how it keeps checkpoints; None: it keeps none.
    """

    fitted: FittedRun
    place: Place
    resumed: RunToResume | None
    saving: Saving | None


NODE_IN_JOB = {"SLURM": "$SLURM_NODEID", "K8S": "$JOB_COMPLETION_INDEX"}
"""The variable that says in a job which of its nodes this is."""


def place(fitted: FittedRun) -> PlacedRun:
    """Find the node, the GPUs and the folders of ``fitted``.

    Raises:
        UserError: a setting is malformed, or there is no run to resume.
    """
    request, experiment = fitted.resolved.request, fitted.experiment
    here = _place(request, fitted.memory_fraction)
    if request.resume and (resumed := run_to_resume.find(fitted)):
        return PlacedRun(fitted, here, resumed, _saving(request.settings, resumed.saving))
    if not (experiment.save_every or {"SAVE", "SAVE_EVERY", "KEEP"} & request.settings.keys()):
        return PlacedRun(fitted, here, None, None)
    where = request.settings.get("SAVE")
    folder = Path(where).resolve() if where not in (None, "1") else None
    row = Saving(experiment.save_every or experiment.steps, experiment.keep, folder)
    return PlacedRun(fitted, here, None, _saving(request.settings, row))


def _place(request: RunRequest, memory_fraction: float | None) -> Place:
    settings = request.settings
    node_rank = command_line.count("NODE_RANK", settings.get("NODE_RANK", "0"), least=0)
    rendezvous = settings.get("RENDEZVOUS")
    host, _, port = (rendezvous or "").rpartition(":")
    if rendezvous and not (host and port.isdigit()):
        raise UserError(f"RENDEZVOUS={rendezvous}: expected host:port, such as node0:29500")
    binding = settings.get("NUMA_BINDING", "0")
    if binding != "0":
        command_line.choice("NUMA_BINDING", binding, NUMA_BINDINGS)
    return Place(
        NODE_IN_JOB[request.batch] if request.batch else str(node_rank),
        rendezvous,
        command_line.gpu_ids(settings),
        memory_fraction,
        binding if binding != "0" and request.device == "cuda" else None,
    )


def _saving(settings: Mapping[str, str], default: Saving) -> Saving | None:
    """How often checkpoints are saved and how many are kept: as the settings say, else as in
    ``default``; None with ``SAVE=0``."""
    if settings.get("SAVE") == "0":
        return None
    every = command_line.count_in(settings, "SAVE_EVERY") or default.every
    keep = command_line.count_in(settings, "KEEP") or default.keep
    return Saving(every, keep, default.folder)
