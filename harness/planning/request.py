"""First stage: what was asked for, an experiment with settings on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from harness.errors import UserError
from harness.experiment import overrides
from harness.experiment.experiment import Experiment
from harness.run import finding, job
from harness.upstreams.megatron_lm.flags import Device
from harness.upstreams.megatron_lm.tracking import Tracking, tracking

FOR_GPUS = ("GPUS_IDS", "CARD")
"""Settings that mean nothing to the CPU miniature."""
FOR_BATCH = {
    "SLURM": (
        *("PARTITION", "ACCOUNT", "TIME", "QOS", "CONSTRAINT", "EXCLUSIVE", "GRACE", "CHAIN"),
        *("CLUSTER", "CONTAINER", "IMAGE"),
    ),
    "K8S": ("IMAGE", "CLAIM", "NAMESPACE", "QUEUE", "RDMA", "HOST_NETWORK", "RESTARTS"),
}
"""What makes a run a batch job -> settings that only such a job has."""


@dataclass(frozen=True)
class RunRequest:
    """What was asked for.

    Attributes:
        row: the experiment as the catalogue has it.
        settings: every ``KEY=VALUE`` of the command line.
        given: those that change the experiment, with what ``ARGS=`` says of them.
        outdir: where run directories go.
    """

    row: Experiment
    settings: Mapping[str, str]
    device: Device
    given: Mapping[str, str]
    outdir: Path
    tracking: Tracking | None

    @property
    def resume(self) -> str | None:
        """``1``, ``auto`` or the label of the run to resume; None: a new run."""
        asked = self.settings.get("RESUME", "0")
        return asked if asked != "0" else None

    @property
    def batch(self) -> str | None:
        """What it becomes a job of: ``SLURM`` or ``K8S``; None: it runs here."""
        return batch_of(self.settings)


def batch_of(settings: Mapping[str, str]) -> str | None:
    """What a run with ``settings`` becomes a job of: ``SLURM`` or ``K8S``; None: it runs here."""
    return next((key for key in FOR_BATCH if settings.get(key, "0") != "0"), None)


def read_request(row: Experiment, settings: Mapping[str, str], device: Device) -> RunRequest:
    """The request for ``row`` with ``settings`` on ``device``.

    Raises:
        UserError: settings contradict each other, or the device lacks what one of them needs.
    """
    if device == "cpu":
        _refuse(
            settings,
            FOR_GPUS,
            "needs a GPU, and this would run the miniature on the CPU",
            "leave {key}= out, or run it where the NVIDIA driver shows a GPU (make doctor)",
        )
    wanted = [batch for batch in FOR_BATCH if settings.get(batch, "0") != "0"]
    if len(wanted) > 1:
        raise UserError(f"{'=1 and '.join(wanted)}=1: a run is a job of one of them; leave one out")
    for key in dict.fromkeys(chain(*FOR_BATCH.values())):
        batches = [batch for batch, keys in FOR_BATCH.items() if key in keys]
        if not {*batches} & {*wanted}:
            jobs = " or ".join(f"{batch}=1" for batch in batches)
            _refuse(
                settings,
                (key,),
                f"is for a batch job, and {jobs} is not given",
                f"add {jobs}, or leave {{key}}= out",
            )
    if settings.get("SAVE") == "0" and (
        saving := [key for key in ("SAVE_EVERY", "KEEP") if key in settings]
    ):
        raise UserError(
            f"SAVE=0 keeps no checkpoints, but {' and '.join(saving)} is given; leave one out"
        )
    outdir = finding.outdir(settings)
    return RunRequest(
        row,
        _resuming_in_a_job(settings, outdir),
        device,
        overrides.given(settings),
        outdir,
        tracking(settings),
    )


def _resuming_in_a_job(settings: Mapping[str, str], outdir: Path) -> Mapping[str, str]:
    """``settings``; in a batch job that starts again, with its own run as the one to resume."""
    own_job = job.current()
    started = own_job and job.run_of(own_job.id, outdir)
    if started and started.read_saving():
        return {**settings, "RESUME": started.label}
    return settings


def _refuse(settings: Mapping[str, str], keys: tuple[str, ...], why: str, way_out: str) -> None:
    """Raise UserError where one of ``keys`` is given."""
    for key in keys:
        if key in settings:
            raise UserError(f"{key}={settings[key]} {why}\n{way_out.format(key=key)}")
