"""Fourth stage: the node and its GPUs, the run to resume, and the folder of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.experiment import command_line
from harness.experiment.experiment import Experiment
from harness.planning import run_to_resume
from harness.planning.fitted import FittedRun
from harness.planning.run_to_resume import RunToResume
from harness.planning.script import Place
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


def place(fitted: FittedRun) -> PlacedRun:
    """Find the node, the GPUs and the folders of ``fitted``.

    Raises:
        UserError: a setting is malformed, or there is no run to resume.
    """
    request = fitted.resolved.request
    here = _place(request.settings, fitted)
    if request.resume is None:
        return PlacedRun(fitted, here, None, _saving(request.settings, fitted.experiment))
    resumed = run_to_resume.find(fitted)
    return PlacedRun(fitted, here, resumed, _saving_as_before(request.settings, resumed.saving))


def _place(settings: Mapping[str, str], fitted: FittedRun) -> Place:
    ids = settings.get("GPUS_IDS")
    gpu_ids = (
        tuple(command_line.count("GPUS_IDS", i, least=0) for i in ids.split(",")) if ids else None
    )
    node_rank = command_line.count("NODE_RANK", settings.get("NODE_RANK", "0"), least=0)
    rendezvous = settings.get("RENDEZVOUS")
    host, _, port = (rendezvous or "").rpartition(":")
    if rendezvous and not (host and port.isdigit()):
        raise UserError(f"RENDEZVOUS={rendezvous}: expected host:port, such as node0:29500")
    return Place(
        "$SLURM_NODEID" if fitted.resolved.request.slurm else str(node_rank),
        rendezvous,
        gpu_ids,
        fitted.memory_fraction,
    )


def _saving(settings: Mapping[str, str], experiment: Experiment) -> Saving | None:
    """How a new run keeps checkpoints: as the settings say, else as the experiment's row says."""
    where = settings.get("SAVE")
    wanted = {"SAVE", "SAVE_EVERY", "KEEP"} & settings.keys()
    if where == "0" or not (wanted or experiment.save_every):
        return None
    folder = Path(where).resolve() if where not in (None, "1") else None
    every = command_line.count_in(settings, "SAVE_EVERY")
    keep = command_line.count_in(settings, "KEEP")
    every = every or experiment.save_every or experiment.steps
    return Saving(every, keep or experiment.keep, folder)


def _saving_as_before(settings: Mapping[str, str], before: Saving) -> Saving:
    """How a resumed run keeps checkpoints: in the same folder, as often as before unless the
    settings say otherwise."""
    every = command_line.count_in(settings, "SAVE_EVERY")
    keep = command_line.count_in(settings, "KEEP")
    return Saving(every or before.every, keep or before.keep, before.folder)
