"""The other nodes of a run while it lasts: what they report, how they end, and that they are still
there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.launching.links import Link, printable


@dataclass(frozen=True)
class Ending:
    """How a node's part of a run ended. ``follows``: only because another node's did."""

    node: int
    host: str
    status: str
    detail: str
    rank: int | None = None
    follows: bool = False
    ranks: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"node {self.node} ({self.host}): {self.detail}"


@dataclass
class Others:
    """Links to the other launchers: node 0 has one to each, the others have one to node 0.

    Attributes:
        shares: whether all of them write to one run directory.
        endings: of the nodes whose part is over.
        lines: what the node with the last rank wrote since the last ``poll``, by file name.
        heard: whether anything came with the last ``poll``.
    """

    node: int
    links: list[Link]
    shares: bool
    endings: dict[int, Ending] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    heard: bool = False

    def poll(self) -> None:
        """Take in what has come."""
        self.lines, self.heard = {}, False
        for link in self.links:
            for message in link.receive():
                self.heard = True
                for name, lines in message.get("lines", {}).items():
                    self.lines.setdefault(name, []).extend(lines)
                self.shares = self.shares and "apart" not in message
                if "ended" in message:
                    self.endings[link.node] = _ending(link, message["ended"])
            if not link.is_open and link.node not in self.endings:
                gone = (
                    "it is gone: its launcher was killed, or its machine or the network between"
                    " failed"
                )
                self.endings[link.node] = Ending(link.node, link.host, "crash", gone)

    def tell(self, message: dict[str, Any]) -> None:
        """Send ``message`` to all that are there."""
        for link in self.links:
            if link.is_open:
                link.send(message)

    def close(self) -> None:
        for link in self.links:
            link.close()

    @property
    def all_ended(self) -> bool:
        return len(self.endings) == len(self.links)

    @property
    def failure(self) -> Ending | None:
        """What ended another node's part, the cause before what followed from it; None where all is
        well."""
        failed = [
            ending
            for ending in self.endings.values()
            if ending.status not in ("ok", "target-missed")
        ]
        return min(failed, key=lambda ending: (ending.follows, ending.node), default=None)


def _ending(link: Link, known: dict[str, Any]) -> Ending:
    rank = known.get("rank")
    return Ending(
        link.node,
        link.host,
        printable(known.get("status", "crash")),
        printable(known.get("detail") or known.get("status")),
        rank if isinstance(rank, int) else None,
        bool(known.get("follows")),
        tuple(known.get("ranks", ())),
    )
