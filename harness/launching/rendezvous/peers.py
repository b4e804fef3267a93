"""The other nodes of a run while it lasts: what they report, and how their parts end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.launching.rendezvous.connections import Connection
from harness.system.screen import harmless

DISCONNECTED = "its launcher no longer answers: it was killed, or its machine or the network failed"


@dataclass(frozen=True)
class NodeEnd:
    """How one node's part of a run ended.

    Attributes:
        is_consequence: it ended only because another node's part did.
        ranks: contents of its ranks/<rank>.json, where their files are not visible to node 0.
    """

    node: int
    host: str
    status: str
    detail: str
    rank: int | None = None
    is_consequence: bool = False
    ranks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"node {self.node} ({self.host}): {self.detail}"


@dataclass
class Peers:
    """Connections to the other launchers: node 0 has one to each node, the others one to node 0.

    Attributes:
        node: the number of this node.
        shares: whether all nodes write to one run directory.
        ends: of the nodes whose part is over, by node.
        lines: lines of metrics and evaluations since the last ``poll``, by file name; sent by the
            node of the last rank where it does not share the run directory.
        is_active: whether the last ``poll`` brought a message.
    """

    node: int = 0
    connections: list[Connection] = field(default_factory=list)
    shares: bool = True
    ends: dict[int, NodeEnd] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    is_active: bool = False

    def poll(self) -> None:
        """Read what has arrived; never blocks."""
        self.lines, self.is_active = {}, False
        for peer in self.connections:
            for message in peer.receive():
                self.is_active = True
                for name, lines in message.get("lines", {}).items():
                    self.lines.setdefault(name, []).extend(lines)
                self.shares = self.shares and "own_records" not in message
                if "ended" in message:
                    self.ends[peer.node] = _end(peer, message["ended"])
            if not peer.is_open and peer.node not in self.ends:
                self.ends[peer.node] = NodeEnd(peer.node, peer.host, "crash", DISCONNECTED)

    def send(self, message: dict[str, Any]) -> None:
        """Send ``message`` to every node that is still connected."""
        for peer in self.connections:
            if peer.is_open:
                peer.send(message)

    def close(self) -> None:
        for peer in self.connections:
            peer.close()

    @property
    def lost_one(self) -> bool:
        """Whether a node disconnected before it said how its part ended."""
        return any(end.detail == DISCONNECTED for end in self.ends.values())

    @property
    def all_ended(self) -> bool:
        return len(self.ends) == len(self.connections)

    @property
    def failure(self) -> NodeEnd | None:
        """How another node's part failed, causes before consequences; None where none failed."""
        failed = [end for end in self.ends.values() if end.status not in ("ok", "target-missed")]
        return min(failed, key=lambda end: (end.is_consequence, end.node), default=None)


def _end(peer: Connection, message: dict[str, Any]) -> NodeEnd:
    rank = message.get("rank")
    return NodeEnd(
        peer.node,
        peer.host,
        harmless(str(message.get("status", "crash"))),
        harmless(str(message.get("detail") or message.get("status"))),
        rank if isinstance(rank, int) else None,
        bool(message.get("is_consequence")),
        tuple(message.get("ranks", ())),
    )
