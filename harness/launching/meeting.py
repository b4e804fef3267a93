"""How the launchers of several nodes find together: one rendezvous, and one run directory where they share a disk."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from harness import rundir
from harness.errors import UserError
from harness.launching import processes
from harness.launching.reserve import Reservation, reserve

if TYPE_CHECKING:
    from harness.launching.processes import Signals
    from harness.launching.terminal import Terminal
    from harness.planning.plan import Plan

LOOK_S = 0.2
SHARED_S = 3
"""What another node wrote appears here within this time, where the file system is shared."""


def run_directory(plan: Plan, signals: Signals, shown: Terminal) -> Reservation:
    """A new run directory, the resumed run's, or for a further node that of node 0.

    A further node waits for node 0. Where node 0's rendezvous is open but its directory is not to be seen, the file
    systems are separate, and this node keeps records of its own.

    Raises:
        UserError: the directory cannot be made, or another program has the rendezvous' port.
        KeyboardInterrupt: a signal came while waiting.
    """
    node, rendezvous, label = int(plan.place.node_rank), plan.place.rendezvous, plan.experiment.label
    if plan.experiment.nodes > 1 and node == 0:
        _check(rendezvous)
    if node == 0:
        return reserve(plan, label, shown.print)
    shown.print(f"{label}: node {node} waits for node 0 at {rendezvous}")
    opened_at = None
    while opened_at is None or time.monotonic() - opened_at < SHARED_S:
        if signals.take():
            raise KeyboardInterrupt
        if directory := rundir.running_at(plan.outdir, rendezvous):
            return Reservation(directory, keeps_records=False)
        if opened_at is None and _is_open(rendezvous):
            opened_at = time.monotonic()
        time.sleep(LOOK_S)
    return reserve(plan, f"{label}.node{node}", shown.print)


def _check(rendezvous: str) -> None:
    """Raise UserError where another program has the port, for torchrun would wait for it in vain."""
    host, _, port = rendezvous.rpartition(":")
    if _is_open(rendezvous) and not _is_ours(int(port)):
        with socket.socket() as probe:
            probe.bind(("", 0))
            free = probe.getsockname()[1]
        raise UserError(
            f"RENDEZVOUS={rendezvous}: another program has port {port}; try RENDEZVOUS={host}:{free} on all nodes"
        )


def _is_open(rendezvous: str) -> bool:
    host, _, port = rendezvous.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _is_ours(port: int) -> bool:
    """Whether a run of the harness listens there: another node of the same run on this machine, started first."""
    import psutil

    listening = [
        c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    return any(pid and processes.has_variable(pid, processes.LAUNCHER_VARIABLE) for pid in listening)
