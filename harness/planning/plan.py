"""Plan a run: from an experiment and settings to the script that runs here, stage by stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.identity import Difference
from harness.planning.checked import CheckedRun, check
from harness.planning.fitted import fit
from harness.planning.placed import place
from harness.planning.request import read_request
from harness.planning.resolved import resolve
from harness.planning.script import NOTHING_ELSE, Extras, Place, render
from harness.run.directory import RunDir
from harness.upstreams.megatron_lm.flags import Device


def plan(experiment: Experiment, settings: Mapping[str, str], device: Device) -> Plan:
    """Plan ``experiment`` with ``settings`` on ``device``.

    Each stage is made once, from the one before.

    Raises:
        UserError: settings contradict each other, sizes do not fit together, or what the run needs
        is not there.
    """
    request = read_request(experiment, settings, device)
    resolved = resolve(request)
    fitted = fit(resolved)
    placed = place(fitted)
    checked = check(placed)
    return _plan_of(checked)


@dataclass(frozen=True)
class Plan:
    """One run, ready to launch.

    Attributes:
        full: the experiment at full size.
        experiment: what runs on ``device``.
        headline: in what it differs from the published run; None: in nothing.
        resumes: the run directory of the run that it resumes.
        changed: settings in which it differs from the run that it resumes.
        notices: what its user should know before it starts.
    """

    full: Experiment
    experiment: Experiment
    device: Device
    place: Place
    outdir: Path
    headline: str | None
    extras: Extras = NOTHING_ELSE
    resumes: RunDir | None = None
    changed: tuple[Difference, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """The step after which it resumes; 0 where it begins anew."""
        loading = self.extras.loading
        return loading.step if loading and not loading.only_weights else 0

    def script(self, gpu_ids: tuple[int, ...] | None = None) -> str:
        """The run's bash script, on these GPUs (by default those of ``place``)."""
        place = self.place if gpu_ids is None else replace(self.place, gpu_ids=gpu_ids)
        return render(
            self.experiment,
            self.device,
            place,
            headline=self.headline,
            apex=importlib.util.find_spec("apex") is not None,
            extras=self.extras,
        )


def _plan_of(checked: CheckedRun) -> Plan:
    placed = checked.placed
    fitted, resumed = placed.fitted, placed.resumed
    request = fitted.resolved.request
    return Plan(
        full=fitted.resolved.experiment,
        experiment=fitted.experiment,
        device=request.device,
        place=placed.place,
        outdir=request.outdir,
        headline="; ".join(fitted.remarks) or None,
        extras=Extras(placed.saving, checked.loading, request.tracking),
        resumes=resumed and resumed.run,
        changed=resumed.changed if resumed else (),
        notices=checked.notices,
    )


def choose_device(settings: Mapping[str, str], *, only_show: bool = False) -> Device:
    """``DEVICE`` where it is given, else cuda where NVML sees a GPU, else cpu.

    Raises:
        UserError: ``DEVICE`` is another word, or it is cuda where there is no GPU (unless the
        command is only shown).
    """
    wanted = settings.get("DEVICE")
    if wanted not in (None, "cpu", "cuda"):
        raise UserError(f"DEVICE={wanted}: expected cpu or cuda")
    if wanted == "cpu" or (wanted == "cuda" and only_show):
        return wanted
    from harness.machine.gpus import list_gpus

    if list_gpus():
        return "cuda"
    if wanted == "cuda":
        raise UserError(
            "DEVICE=cuda, but the NVIDIA driver shows no GPU here\n"
            "make doctor says what is missing; DEVICE=cpu runs the miniature"
        )
    return "cpu"
