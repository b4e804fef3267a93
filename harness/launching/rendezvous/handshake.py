"""How the launchers of several nodes agree before anything trains.

Node 0 listens at RENDEZVOUS. Every other node connects and sends what it would run; node 0 compares
that with its own run and answers all of them: start, or the reason not to. Node 0 then stops
listening, because torchrun listens on the same port next. The connections last as long as the run.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.launching import processes
from harness.launching.rendezvous.agreement import differences, facts
from harness.launching.rendezvous.connections import (
    Connection,
    check_resolves,
    connect,
    host_and_port,
    is_address,
    listen,
)
from harness.launching.rendezvous.peers import Peers
from harness.launching.reservation import Reservation, reserve
from harness.planning.request import batch_of
from harness.run.directory import RunDir
from harness.system import locks
from harness.system.screen import harmless

if TYPE_CHECKING:
    from pathlib import Path

    from harness.launching.processes import Signals
    from harness.launching.terminal import Terminal
    from harness.planning.plan import Plan

TIMEOUT_S = 600.0
"""The nodes wait this long for each other. A first run installs packages before, which takes
minutes."""
RETRY_S = 0.2
POLL_S = 0.02
VISIBLE_S = 3
"""On a shared file system, what one node writes is visible to the others within this time."""
HELLO_S = 10.0
"""A launcher at RENDEZVOUS says hello within this time; a peer that does not is another program."""
REFUSAL_S = 3.0
"""A node that refuses to run tries for this long to send the others its reason."""
PROTOCOL = "harness"
"""Key of a hello message; its value is the version of the protocol."""


class Refused(UserError):
    """The nodes do not run together, and all connected nodes know the reason."""


def reserve_run_directory(plan: Plan, signals: Signals, terminal: Terminal) -> Reservation:
    """The run directory this launcher writes to; with several nodes, once all of them agreed.

    A further node uses the directory of node 0 where that is visible, else one of its own.

    Raises:
        UserError: the directory cannot be made, another program uses the rendezvous' port, a node
            does not connect within ``TIMEOUT_S``, refuses, or would run something else.
        KeyboardInterrupt: a signal arrived while waiting.
    """
    if plan.experiment.nodes == 1:
        return reserve(plan, plan.experiment.label, terminal.print)
    check_resolves(plan.place.rendezvous)
    if plan.place.node_rank == "0":
        return _lead(plan, signals, terminal)
    return _follow(plan, signals, terminal)


@contextmanager
def refusals_sent(words: Iterable[str]) -> Iterator[None]:
    """Send a UserError raised in this context to the nodes that wait for this one.

    ``words`` are the command's KEY=VALUE settings. Sending takes ``REFUSAL_S`` at most.
    """
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        rendezvous, node = settings.get("RENDEZVOUS", ""), settings.get("NODE_RANK", "0")
        only_shown = settings.get("DRY_RUN") == "1" or batch_of(settings)
        if not only_shown and node.isdecimal() and is_address(rendezvous):
            with suppress(OSError, UserError):
                _send_refusal(rendezvous, int(node), str(error))
        raise


def _send_refusal(rendezvous: str, node: int, why: str) -> None:
    deadline = time.monotonic() + REFUSAL_S
    if node == 0:
        with listen(rendezvous) as server:
            _refuse_all(server, [], 0, _refusal_of_node_0(why), deadline)
        return
    check_resolves(rendezvous)
    while time.monotonic() < deadline:
        if (peer := connect(rendezvous)) and _is_node_0(peer, deadline):
            peer.send({**_hello(node), "refused": why})
            peer.close()
            return
        time.sleep(RETRY_S)


def _hello(node: int) -> dict[str, Any]:
    return {PROTOCOL: 1, "node": node, "host": socket.gethostname()}


def _refusal_of_node_0(why: str) -> str:
    return f"node 0 ({socket.gethostname()}) refuses: {why}"


def _lead(plan: Plan, signals: Signals, terminal: Terminal) -> Reservation:
    """Node 0: wait for the other nodes, compare, make the run directory, let all start."""
    experiment, rendezvous = plan.experiment, plan.place.rendezvous
    others = experiment.nodes - 1
    with _server(rendezvous) as server:
        peers: dict[int, Connection] = {}
        try:
            terminal.print(
                f"{experiment.label}: node 0 waits at {rendezvous} for "
                f"{_nodes(range(1, experiment.nodes))}, {TIMEOUT_S / 60:g} minutes at most"
            )
            _wait_for_nodes(server, plan, peers, signals, terminal)
            reserved = reserve(plan, experiment.label, terminal.print)
        except BaseException as error:
            why = str(error) if isinstance(error, UserError) else "it was stopped"
            if not isinstance(error, Refused):
                why = _refusal_of_node_0(why)
            with suppress(KeyboardInterrupt):
                deadline = time.monotonic() + REFUSAL_S
                _refuse_all(server, list(peers.values()), others, why, deadline)
            raise
    lock = locks.own(reserved.run_dir.path)
    for peer in peers.values():
        peer.send({"start": {"label": reserved.run_dir.label, "token": lock.token if lock else ""}})
    return replace(reserved, peers=Peers(0, list(peers.values()), shares=True))


def _server(rendezvous: str) -> socket.socket:
    """Listen at ``rendezvous``.

    Raises:
        UserError: another program listens there; torchrun would wait for that port in vain.
    """
    host, port = host_and_port(rendezvous)
    try:
        return listen(rendezvous)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(
                f"RENDEZVOUS={rendezvous}: cannot listen at port {port}: {error.strerror}"
            ) from None
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    owner = "another run of this harness, or another node 0," if _is_ours(port) else None
    raise UserError(
        f"RENDEZVOUS={rendezvous}: {owner or 'another program'} has port {port}; "
        f"try RENDEZVOUS={host}:{free} on all nodes"
    )


def _is_ours(port: int) -> bool:
    """Whether a run of the harness listens at ``port``."""
    import psutil

    listening = [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    return any(
        pid and processes.has_variable(pid, processes.LAUNCHER_VARIABLE) for pid in listening
    )


def _wait_for_nodes(
    server: socket.socket,
    plan: Plan,
    peers: dict[int, Connection],
    signals: Signals,
    terminal: Terminal,
) -> None:
    """Fill ``peers`` with a connection to every other node.

    Raises:
        Refused: a node is missing, refuses, or would run something else.
    """
    nodes, own = plan.experiment.nodes, facts(plan)
    deadline, unknown = time.monotonic() + TIMEOUT_S, []
    while len(peers) < nodes - 1:
        if signals.take():
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            missing = _nodes(sorted(set(range(1, nodes)) - peers.keys()))
            raise Refused(
                f"{missing} did not connect to RENDEZVOUS={plan.place.rendezvous} within "
                f"{TIMEOUT_S / 60:g} minutes\n"
                "start it there with the same settings and its own NODE_RANK=; that port must be "
                "open"
            )
        unknown += _accepted(server)
        for peer in list(unknown):
            if (message := peer.receive_one()) is not None:
                unknown.remove(peer)
                _admit(peer, message, peers, own, nodes)
                terminal.print(f"node {peer.node} ({peer.host}) connected")
            elif not peer.is_open:
                unknown.remove(peer)
        for node, peer in list(peers.items()):
            peer.receive()
            if not peer.is_open:
                terminal.print(f"node {node} ({peer.host}) disconnected")
                del peers[node]
        time.sleep(POLL_S)
    for peer in unknown:
        peer.close()


def _admit(
    peer: Connection,
    hello: dict[str, Any],
    peers: dict[int, Connection],
    own: dict[str, Any],
    nodes: int,
) -> None:
    """Add the node that said ``hello`` to ``peers``.

    Raises:
        Refused: it refuses, its number is taken or too high, or it would run something else.
    """
    hosts = {number: known.host for number, known in peers.items()}
    peer.host, node = harmless(str(hello.get("host", "?")))[:255], hello.get("node")
    # also where its number is taken: all in peers are sent the reason of a refusal
    peers[node if isinstance(node, int) and node not in peers else -1] = peer
    if hello.get(PROTOCOL) != 1 or not isinstance(node, int):
        raise Refused(
            "a launcher of another version connected to the rendezvous: all nodes need the same "
            "commit"
        )
    peer.node = node
    if (why := hello.get("refused")) is not None:
        raise Refused(f"node {node} ({peer.host}) refuses: {harmless(str(why))}")
    problem = ""
    if not 0 < node < nodes:
        problem = f"NODE_RANK={node} came from {peer.host}, and NODES={nodes} on node 0"
    elif node in hosts:
        problem = f"NODE_RANK={node} came twice, from {hosts[node]} and from {peer.host}"
    elif differ := differences(own, hello.get("facts") or {}, ("node 0", f"node {node}")):
        lines = "\n".join(f"  {harmless(line)}" for line in differ)
        here = socket.gethostname()
        problem = f"node 0 ({here}) and node {node} ({peer.host}) would not run the same\n{lines}"
    if problem:
        raise Refused(f"{problem}\ngive all nodes the same settings, code, packages and data")


def _accepted(server: socket.socket) -> list[Connection]:
    """New connections; each is sent a hello."""
    found = []
    with suppress(BlockingIOError):
        while True:
            peer = Connection(server.accept()[0])
            peer.send(_hello(0))
            found.append(peer)
    return found


def _refuse_all(
    server: socket.socket, peers: list[Connection], count: int, why: str, deadline: float
) -> None:
    """Send ``why`` to ``peers``, and until ``deadline`` to those who still connect.

    ``count`` nodes are expected in all; 0 where that is not known.
    """
    for peer in peers:
        peer.send({"refused": why})
    late: list[Connection] = []
    while time.monotonic() < deadline and (not count or len(peers) + len(late) < count):
        for peer in _accepted(server):
            peer.send({"refused": why})
            late.append(peer)
        time.sleep(POLL_S)
    for peer in [*peers, *late]:
        peer.close()


def _follow(plan: Plan, signals: Signals, terminal: Terminal) -> Reservation:
    """A further node: wait until node 0 lets it start, then use its run directory or make one."""
    node, label = int(plan.place.node_rank), plan.experiment.label
    terminal.print(
        f"{label}: node {node} waits for node 0 at {plan.place.rendezvous}, "
        f"{TIMEOUT_S / 60:g} minutes at most"
    )
    peer, start = _wait_for_start(plan, node, signals)
    peers = Peers(node, [peer], shares=True)
    folder = plan.outdir / str(start["label"])
    # the label comes from another machine: it must be a name, not a path
    if folder.name == start["label"] and _becomes_visible(folder, start["token"]):
        return Reservation(RunDir(folder.resolve()), keeps_records=False, peers=peers)
    peers.shares = False
    try:
        reserved = reserve(plan, f"{label}.node{node}", terminal.print)
    except UserError as error:
        peers.send({"ended": {"status": "bad-configuration", "detail": str(error)}})
        raise
    peers.send({"own_records": True})
    return replace(reserved, peers=peers)


def _wait_for_start(plan: Plan, node: int, signals: Signals) -> tuple[Connection, dict[str, str]]:
    """The connection to node 0, and the label and lock token of its run directory."""
    rendezvous, own = plan.place.rendezvous, facts(plan)
    deadline = time.monotonic() + TIMEOUT_S
    peer = None
    while True:
        if signals.take():
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            state = "did not let this node start" if peer else "did not answer"
            raise Refused(
                f"node 0 {state} within {TIMEOUT_S / 60:g} minutes: RENDEZVOUS={rendezvous}\n"
                "it must be node 0's address, with that port open, and the same on all nodes"
            )
        if peer is None and (peer := connect(rendezvous)):
            if _is_node_0(peer, time.monotonic() + HELLO_S):
                peer.send({**_hello(node), "facts": own})
            elif peer.is_open:
                peer.close()
                raise UserError(
                    f"RENDEZVOUS={rendezvous}: another program has that port; choose another, on "
                    "all nodes"
                )
        for message in peer.receive() if peer else ():
            if "refused" in message:
                raise Refused(harmless(str(message["refused"])))
            if "start" in message:
                return peer, message["start"]
        if peer and not peer.is_open:
            peer = None  # node 0 was stopped, and may be started again
        time.sleep(POLL_S if peer else RETRY_S)


def _is_node_0(peer: Connection, deadline: float) -> bool:
    """Whether ``peer`` says hello as node 0's launcher before ``deadline``."""
    hello = None
    while hello is None and peer.is_open and time.monotonic() < deadline:
        hello = peer.receive_one()
        time.sleep(0.01)
    if hello is None or (hello.get(PROTOCOL), hello.get("node")) != (1, 0):
        return False
    peer.node, peer.host = 0, harmless(str(hello.get("host", "?")))[:255]
    return True


def _becomes_visible(folder: Path, token: str) -> bool:
    """Whether node 0's run directory is visible on this node within ``VISIBLE_S``."""
    deadline = time.monotonic() + VISIBLE_S
    while not (visible := locks.is_visible(folder, token)) and time.monotonic() < deadline:
        time.sleep(RETRY_S)
        with suppress(OSError):
            # NFS caches that a name does not exist; listing the folder refreshes the cache
            list(folder.parent.iterdir())
    return visible


def _nodes(numbers: Iterable[int]) -> str:
    names = ", ".join(map(str, numbers))
    return f"nodes {names}" if "," in names else f"node {names}"
