"""What the nodes of a run report to each other: steps, failures, and how each part ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.launching.outcome import RunOutcome
from harness.launching.rendezvous.peers import Peers
from harness.launching.tails import Tail
from harness.run.directory import RunDir
from harness.run.schema import Rank, parse_line

if TYPE_CHECKING:
    from harness.planning.plan import Plan

FAILURE_REACHES_RANKS_S = 5
"""After another node failed, ranks of this one notice within this time, or are ended."""
ENDS_S = 10
"""At its end a node waits this long for the other nodes to report theirs."""
POLL_S = 0.05


class Reports:
    """Reports of one node to its peers, and of them to it. A run of one node has no peers."""

    def __init__(self, peers: Peers, plan: Plan, run_dir: RunDir, keeps_records: bool) -> None:
        self._peers, self._run_dir, self._keeps_records = peers, run_dir, keeps_records
        self._is_last_node = plan.place.node_rank == str(plan.experiment.nodes - 1)
        self._evaluations = Tail(run_dir.validation)
        self._end_ranks_at = 0.0
        self.ended_ranks = False
        """Whether this node's ranks were ended because another node failed."""

    def send_steps(self, lines: list[str], steps_done: int) -> None:
        """Report new ``lines`` of metrics.jsonl, where the peers do not see that file.

        The node of the last rank, which writes metrics, sends the lines to node 0. Node 0 sends
        the others the number of steps, so that their hang detection sees progress.
        """
        if self._peers.shares:
            return
        if self._peers.node == 0:
            if lines:
                self._peers.send({"steps": steps_done})
        elif self._is_last_node:
            evaluations = self._evaluations.lines()
            if lines or evaluations:
                names = self._run_dir.metrics.name, self._run_dir.validation.name
                self._peers.send({"lines": dict(zip(names, (lines, evaluations), strict=True))})

    def receive(self) -> bool:
        """Take in what peers sent, their lines into this node's files; whether anything came."""
        self._peers.poll()
        for path in (self._run_dir.metrics, self._run_dir.validation):
            if (lines := self._peers.lines.get(path.name)) and self._keeps_records:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
        return self._peers.is_active

    def must_end_ranks(self) -> bool:
        """Whether a peer failed and this node's ranks had ``FAILURE_REACHES_RANKS_S`` to notice."""
        if not self._peers.failure:
            return False
        now = time.monotonic()
        self._end_ranks_at = self._end_ranks_at or now + FAILURE_REACHES_RANKS_S
        return now > self._end_ranks_at

    def exchange_ends(
        self, found: RunOutcome, stopped: bool, poll: Callable[[], object]
    ) -> RunOutcome:
        """Exchange with the peers how each part ended; the outcome of the run as a whole.

        Where a peer failed and this node did not, or only as a consequence, that is the peer's.

        Args:
            found: how this node's part ended.
            stopped: whether the user stopped it; its peers may then be gone.
            poll: called while this node waits.
        """
        is_consequence = self.ended_ranks or found.is_consequence
        message = {
            "status": found.status,
            "detail": found.detail,
            "rank": found.rank,
            "is_consequence": is_consequence,
        }
        if not self._peers.shares and self._peers.node:
            message["ranks"] = [rank.model_dump_json() for rank in self._run_dir.read_ranks()]
        self._peers.send({"ended": message})
        deadline = time.monotonic() + (0 if stopped else ENDS_S)
        while not self._peers.all_ended and time.monotonic() < deadline:
            poll()
            time.sleep(POLL_S)
        self._peers.close()
        failure, went_well = self._peers.failure, found.status in ("ok", "target-missed")
        if stopped or failure is None or not (is_consequence or went_well):
            return found
        # both only followed: without another cause, this node's own error says more
        if failure.is_consequence and found.status == "crash" and not self.ended_ranks:
            return found
        advice = f"the log of node {failure.node} says more"
        return RunOutcome(failure.status, str(failure), failure.rank, advice)

    @property
    def lost_a_node(self) -> bool:
        """Whether a peer's connection ended before it reported its end."""
        return self._peers.lost_one

    def ranks_elsewhere(self) -> list[Rank]:
        """Reports of ranks on other nodes, whose files are not visible here."""
        found = [line for end in self._peers.ends.values() for line in end.ranks]
        return [rank for line in found if (rank := parse_line(line, Rank))]
