"""How the launchers of several nodes meet before anything trains: all there, all alike, and where
records are kept.

Node 0 listens at RENDEZVOUS; the others connect and say what they would run. Node 0 compares that
with its own and tells
all: go, or why not. Then it stops listening, for torchrun listens there next; the connections last
as long as the run.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.launching import processes
from harness.launching.agreement import differences, facts
from harness.launching.links import Link, connect, listen, parts, printable, resolve
from harness.launching.others import Others
from harness.launching.reserve import Reservation, reserve
from harness.run.directory import RunDir
from harness.system import locks

if TYPE_CHECKING:
    from pathlib import Path

    from harness.launching.processes import Signals
    from harness.launching.terminal import Terminal
    from harness.planning.plan import Plan

MEET_S = 600.0
"""The nodes wait for each other this long. A first run installs packages before, which takes
minutes."""
LOOK_S = 0.2
SHARED_S = 3
"""What another node wrote appears here within this time, where the file system is shared."""
GREETING_S = 10.0
"""A launcher at RENDEZVOUS answers within this time; what does not is another program."""
LINGER_S = 3.0
"""A node that refuses tries to tell the others for this long."""
MARK = "harness"


class Refused(UserError):
    """The nodes do not run together; all that are there know."""


def run_directory(plan: Plan, signals: Signals, shown: Terminal) -> Reservation:
    """Where this launcher writes; where the run has several nodes, after all of them have met and
    agreed.

    A further node joins the directory of node 0 where it sees it, else it keeps records of its own.

    Raises:
        UserError: the directory cannot be made, another program has the rendezvous' port, a node
            does not come within ``MEET_S``, refuses, or would run something else.
        KeyboardInterrupt: a signal came while waiting.
    """
    if plan.experiment.nodes == 1:
        return reserve(plan, plan.experiment.label, shown.print)
    resolve(plan.place.rendezvous)
    if plan.place.node_rank == "0":
        return _lead(plan, signals, shown)
    return _follow(plan, signals, shown)


@contextmanager
def told_to_others(words: Iterable[str]) -> Iterator[None]:
    """Where this node refuses by itself what ``KEY=VALUE`` words ask for, tell the nodes that wait
    for it.

    That takes ``LINGER_S`` at most.
    """
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        rendezvous, node = settings.get("RENDEZVOUS", ""), settings.get("NODE_RANK", "0")
        only_shown = "1" in (settings.get("SLURM"), settings.get("DRY_RUN"))
        if not only_shown and node.isdecimal() and parts_are_there(rendezvous):
            with suppress(OSError, UserError):
                _tell(rendezvous, int(node), str(error))
        raise


def parts_are_there(rendezvous: str) -> bool:
    """Whether ``rendezvous`` is of the form host:port."""
    host, _, port = rendezvous.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def _tell(rendezvous: str, node: int, why: str) -> None:
    deadline = time.monotonic() + LINGER_S
    if node == 0:
        with listen(rendezvous) as server:
            _refuse_all(server, [], 0, f"node 0 ({socket.gethostname()}) refuses: {why}", deadline)
        return
    resolve(rendezvous)
    while time.monotonic() < deadline:
        if (link := connect(rendezvous)) and _greeted(link, deadline):
            link.send({**_hello(node), "refused": why})
            link.close()
            return
        time.sleep(LOOK_S)


def _hello(node: int) -> dict[str, Any]:
    return {MARK: 1, "node": node, "host": socket.gethostname()}


def _lead(plan: Plan, signals: Signals, shown: Terminal) -> Reservation:
    """Node 0: wait for the others, compare, make the run directory, let all go."""
    e, rendezvous = plan.experiment, plan.place.rendezvous
    with _server(rendezvous) as server:
        links: dict[int, Link] = {}
        try:
            shown.print(
                f"{e.label}: node 0 waits at {rendezvous} for {_nodes(range(1, e.nodes))}, "
                f"{MEET_S / 60:g} minutes at most"
            )
            _gather(server, plan, links, signals, shown)
            reserved = reserve(plan, e.label, shown.print)
        except BaseException as error:
            why = str(error) if isinstance(error, UserError) else "it was stopped"
            told = (
                why
                if isinstance(error, Refused)
                else f"node 0 ({socket.gethostname()}) refuses: {why}"
            )
            with suppress(KeyboardInterrupt):
                _refuse_all(
                    server, list(links.values()), e.nodes - 1, told, time.monotonic() + LINGER_S
                )
            raise
    lock = locks.own(reserved.run_dir.path)
    for link in links.values():
        link.send({"go": {"label": reserved.run_dir.label, "token": lock.token if lock else ""}})
    return reserved.with_others(Others(0, list(links.values()), shares=True))


def _server(rendezvous: str) -> socket.socket:
    """Listen at ``rendezvous``. Raises UserError where another program does, for torchrun would
    wait for it in vain."""
    host, port = parts(rendezvous)
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
    whose = (
        "another run of this harness, or another node 0," if _is_ours(port) else "another program"
    )
    raise UserError(
        f"RENDEZVOUS={rendezvous}: {whose} has port {port}; try RENDEZVOUS={host}:{free} on all"
        " nodes"
    )


def _is_ours(port: int) -> bool:
    """Whether a run of the harness listens there."""
    import psutil

    listening = [
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    return any(
        pid and processes.has_variable(pid, processes.LAUNCHER_VARIABLE) for pid in listening
    )


def _gather(
    server: socket.socket, plan: Plan, links: dict[int, Link], signals: Signals, shown: Terminal
) -> None:
    """Fill ``links`` with one to every other node. Raises Refused where that is not to be."""
    nodes, own = plan.experiment.nodes, facts(plan)
    deadline, unknown = time.monotonic() + MEET_S, []
    while len(links) < nodes - 1:
        if signals.take():
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            missing = _nodes(sorted(set(range(1, nodes)) - links.keys()))
            raise Refused(
                f"{missing} did not come to RENDEZVOUS={plan.place.rendezvous} within"
                f" {MEET_S / 60:g} minutes\nstart it there with the same settings and its own"
                " NODE_RANK=; that port must be open"
            )
        unknown += _accepted(server)
        for link in list(unknown):
            if (message := link.receive_one()) is not None:
                unknown.remove(link)
                _admit(link, message, links, own, nodes)
                shown.print(f"node {link.node} ({link.host}) is there")
            elif not link.is_open:
                unknown.remove(link)
        for node, link in list(links.items()):
            link.receive()
            if not link.is_open:
                shown.print(f"node {node} ({link.host}) left again")
                del links[node]
        time.sleep(0.02)
    for link in unknown:
        link.close()


def _admit(
    link: Link, message: dict[str, Any], links: dict[int, Link], own: dict[str, Any], nodes: int
) -> None:
    """Add a node that says hello to ``links``. Raises Refused where it refuses, is one too many, or
    differs."""
    known = {number: known.host for number, known in links.items()}
    link.host, node = printable(message.get("host", "?"))[:255], message.get("node")
    # it is told in any case
    links[node if isinstance(node, int) and node not in links else -1] = link
    if message.get(MARK) != 1 or not isinstance(node, int):
        raise Refused(
            "a launcher of another version came to the rendezvous: all nodes want the same commit"
        )
    link.node = node
    if (why := message.get("refused")) is not None:
        raise Refused(f"node {node} ({link.host}) refuses: {printable(why)}")
    problem = ""
    if not 0 < node < nodes:
        problem = f"NODE_RANK={node} came from {link.host}, and NODES={nodes} on node 0"
    elif node in known:
        problem = f"NODE_RANK={node} came twice, from {known[node]} and from {link.host}"
    elif differ := differences(own, message.get("facts") or {}, ("node 0", f"node {node}")):
        problem = (
            f"node 0 ({socket.gethostname()}) and node {node} ({link.host}) would not run the"
            " same\n"
        )
        problem += "\n".join(f"  {printable(line)}" for line in differ)
    if problem:
        raise Refused(f"{problem}\ngive all nodes the same settings, code, packages and data")


def _accepted(server: socket.socket) -> list[Link]:
    """Links to those who have just connected; each is greeted."""
    found = []
    with suppress(BlockingIOError):
        while True:
            link = Link(server.accept()[0])
            link.send(_hello(0))
            found.append(link)
    return found


def _refuse_all(
    server: socket.socket, links: list[Link], count: int, why: str, deadline: float
) -> None:
    """Tell ``why`` to those who are there, and until ``deadline`` to those who still come;
    ``count`` are expected."""
    for link in links:
        link.send({"refused": why})
    told, new = len(links), []
    while time.monotonic() < deadline and (not count or told < count):
        for link in _accepted(server):
            link.send({"refused": why})
            new.append(link)
            told += 1
        time.sleep(0.02)
    for link in [*links, *new]:
        link.close()


def _follow(plan: Plan, signals: Signals, shown: Terminal) -> Reservation:
    """A further node: say what this one would run, wait for the answer, find node 0's run directory
    or make another."""
    node, label, rendezvous = (
        int(plan.place.node_rank),
        plan.experiment.label,
        plan.place.rendezvous,
    )
    own = facts(plan)
    shown.print(
        f"{label}: node {node} waits for node 0 at {rendezvous}, {MEET_S / 60:g} minutes at most"
    )
    deadline = time.monotonic() + MEET_S
    link, go = None, None
    while go is None:
        if signals.take():
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            state = "did not let this node go" if link else "did not come"
            raise Refused(
                f"node 0 {state} within {MEET_S / 60:g} minutes: RENDEZVOUS={rendezvous}\n"
                "it must be node 0's address, with that port open, and the same on all nodes"
            )
        if link is None and (link := connect(rendezvous)):
            if _greeted(link, time.monotonic() + GREETING_S):
                link.send({**_hello(node), "facts": own})
            elif link.is_open:
                link.close()
                raise UserError(
                    f"RENDEZVOUS={rendezvous}: another program has that port; choose another, on"
                    " all nodes"
                )
        for message in link.receive() if link else ():
            if "refused" in message:
                raise Refused(printable(message["refused"]))
            go = message.get("go", go)
        if link and not link.is_open:  # node 0 was stopped, and may come again
            link = None
        time.sleep(0.02 if link else LOOK_S)
    others = Others(node, [link], shares=True)
    directory = plan.outdir / str(go["label"])
    if directory.name == go["label"] and _appears(directory, go["token"]):
        return Reservation(RunDir(directory.resolve()), keeps_records=False, others=others)
    others.shares = False
    try:
        reserved = reserve(plan, f"{label}.node{node}", shown.print)
    except UserError as error:
        others.tell({"ended": {"status": "bad-configuration", "detail": str(error)}})
        raise
    others.tell({"apart": True})
    return reserved.with_others(others)


def _greeted(link: Link, deadline: float) -> bool:
    """Whether node 0's launcher answers."""
    message = None
    while message is None and link.is_open and time.monotonic() < deadline:
        message = link.receive_one()
        time.sleep(0.01)
    if message is None or (message.get(MARK), message.get("node")) != (1, 0):
        return False
    link.node, link.host = 0, printable(message.get("host", "?"))[:255]
    return True


def _appears(directory: Path, token: str) -> bool:
    """Whether node 0's run directory is to be seen here, too, within ``SHARED_S``."""
    deadline = time.monotonic() + SHARED_S
    while not (seen := locks.is_visible(directory, token)) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        with suppress(OSError):
            list(directory.parent.iterdir())  # has NFS look again
    return seen


def _nodes(nodes: Any) -> str:
    numbers = list(nodes)
    return f"node{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
