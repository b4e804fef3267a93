"""``make preflight``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from harness.errors import UserError
from harness.experiment import command_line
from harness.machine import gpus
from harness.planning.plan import choose_device
from harness.predict import machine_file
from harness.preflight import node, peers
from harness.preflight.show import show
from harness.run import finding


def preflight(settings: Mapping[str, str]) -> int:
    """Measure this machine and keep its machine file; 1 where one is slow or a part failed.

    Raises:
        UserError: a GPU is busy or is not there, or a rank of the measurement failed.
    """
    device = choose_device(settings)
    outdir = finding.outdir(settings)
    ids = idle_gpus(command_line.gpu_ids(settings)) if device == "cuda" else ()
    machine = node.measure(device, ids, settings.get("QUICK") == "1", outdir)
    path = outdir / machine_file.NAME
    machine_file.write(path, machine)
    show(machine)
    print(f"{path}: what was measured, in {machine.seconds:.0f} s")
    slow = peers.slow(machine)
    for line in slow:
        print(f"slow: {line}", file=sys.stderr)
    return 1 if slow or machine.failures else 0


def idle_gpus(wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The GPUs to measure: those wanted, else all; none may be busy, which would slow it."""
    free = gpus.available()
    chosen = gpus.available(wanted) if wanted else tuple(gpu.index for gpu in gpus.list_gpus())
    if busy := [use for use in gpus.use() if use.gpu.index in chosen and use.busy]:
        lines = "\n".join(f"  {gpus.describe(use)}" for use in busy)
        instead = f"; GPUS_IDS={','.join(map(str, free))} measures the idle ones" if free else ""
        raise UserError(
            f"busy GPUs cannot be measured:\n{lines}\n"
            f"make stop ends the runs of this machine{instead}"
        )
    return chosen
