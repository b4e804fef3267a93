"""Plan a run: from an experiment and settings to the script that runs here, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.planning.checked import check
from harness.planning.fitted import fit
from harness.planning.placed import place
from harness.planning.request import read_request
from harness.planning.resolved import resolve
from harness.planning.script import Plan
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
    return check(placed)


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
