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
    settings = fitted.resolved.request.settings
    here = _place(settings, fitted)
    resumed = run_to_resume.find(fitted) if fitted.resolved.request.resume else None
    saving = _saving(settings, fitted.experiment, resumed)
    return PlacedRun(fitted, here, resumed, saving)


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


def _saving(
    settings: Mapping[str, str], experiment: Experiment, resumed: RunToResume | None
) -> Saving | None:
    """How checkpoints are kept: as the settings say, else as the resumed run did, else as the
    experiment's row says."""
    where = settings.get("SAVE")
    wanted = {"SAVE", "SAVE_EVERY", "KEEP"} & settings.keys()
    if where == "0" or not (wanted or resumed or experiment.save_every):
        return None
    every = command_line.count_in(settings, "SAVE_EVERY")
    keep = command_line.count_in(settings, "KEEP")
    if resumed:
        before = resumed.saving
        return Saving(every or before.every, keep or before.keep, before.folder)
    folder = Path(where).resolve() if where not in (None, "1") else None
    every = every or experiment.save_every or experiment.steps
    return Saving(every, keep or experiment.keep, folder)
