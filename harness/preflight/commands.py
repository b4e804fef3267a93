"""``make preflight``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from harness.errors import UserError
from harness.experiment import command_line
from harness.launching.rendezvous.connections import check_resolves
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
    device, place = choose_device(settings), _place(settings)
    outdir = finding.outdir(settings)
    ids = idle_gpus(command_line.gpu_ids(settings)) if device == "cuda" else ()
    machine = node.measure(device, ids, settings.get("QUICK") == "1", outdir)
    if place:
        machine = node.measure_between(machine, ids, place, outdir)
    path = outdir / machine_file.NAME
    machine_file.write(path, machine)
    show(machine)
    print(f"{path}: what was measured, in {machine.seconds:.0f} s")
    slow = peers.slow(machine)
    for line in slow:
        print(f"slow: {line}", file=sys.stderr)
    return 1 if slow or machine.failures else 0


def _place(settings: Mapping[str, str]) -> node.Place | None:
    """This node among those to measure together; None: it alone."""
    nodes = command_line.count_in(settings, "NODES") or 1
    if nodes == 1:
        return None
    rank, rendezvous = settings.get("NODE_RANK", ""), settings.get("RENDEZVOUS")
    if not (rendezvous and rank.isdigit() and int(rank) < nodes):
        raise UserError(
            f"NODES={nodes} measures the network between nodes: start make preflight on each with"
            f" the same RENDEZVOUS=host:port and its own NODE_RANK, 0 to {nodes - 1}"
        )
    check_resolves(rendezvous)
    return node.Place(nodes, int(rank), rendezvous)


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
