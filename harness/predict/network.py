"""How long messages between ranks take, by the levels of links and networks that they cross.

Ranks are laid out as upstream does, tp-cp-ep-dp-pp (megatron/core/parallel_state.py,
core_v0.19.0), so the ranks of a group are ``stride`` apart. Costs of rings and trees are those by
which NCCL chooses between them (ncclTopoTuneModel in NCCL's src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from harness.experiment.experiment import Experiment
from harness.experiment.fabrics import LINKS, NETWORKS, Level
from harness.experiment.hardware import Card

MESSAGE_S = 20e-6
"""A collective within a node with nothing to send; a rough value."""
NETWORK_HOP_S = 14e-6
"""A step of a ring or tree between nodes (hwLatencies of NCCL_HW_NET, simple protocol)."""
FEWEST_REDUCED = 5
"""Ranks from which on NCCL lets the switch reduce (fabrics.MEASURED)."""


class Group(NamedTuple):
    """Ranks that exchange messages, ``stride`` apart."""

    ranks: int
    stride: int

    @property
    def span(self) -> int:
        """Neighbouring ranks from its first to its last."""
        return (self.ranks - 1) * self.stride + 1


class Groups:
    """The groups of an experiment's first rank."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    @property
    def tensor(self) -> Group:
        return Group(self.experiment.tp, 1)

    @property
    def exchanging_heads(self) -> Group:
        """Context-parallel ranks; upstream's create_hierarchical_groups takes neighbours first."""
        return Group(self.experiment.cp_levels[0], self.experiment.tp)

    @property
    def exchanging_keys(self) -> Group:
        heads, keys = self.experiment.cp_levels
        return Group(keys, self.experiment.tp * heads)

    @property
    def replicas(self) -> Group:
        """Data and context parallel ranks, which hold the same dense weights."""
        return Group(self.experiment.replicas, self.experiment.tp)

    @property
    def experts(self) -> Group:
        return Group(self.experiment.ep, self.experiment.etp)

    @property
    def split_experts(self) -> Group:
        return Group(self.experiment.etp, 1)

    @property
    def expert_replicas(self) -> Group:
        stride = self.experiment.etp * self.experiment.ep
        return Group(self.experiment.expert_replicas, stride)

    @property
    def stages(self) -> Group:
        pp = self.experiment.pp
        return Group(pp, self.experiment.world_size // pp)


@dataclass(frozen=True)
class Network:
    """The links of a machine, from the innermost level outwards, as fast as NCCL drives them."""

    levels: tuple[Level, ...]
    node: int
    """Ranks of a node, which the links join without a network."""
    reduce_gb_s: float | None = None
    """What a rank sends where the innermost switch computes all-reduces (NCCL's NVLS)."""
    pair_gb_s: float | None = None
    """What each of two ranks sends to the other at the same time, where measured."""

    @classmethod
    def of(
        cls, card: Card, pair_gb_s: float | None = None, network_gb_s: float | None = None
    ) -> Network:
        """The network of nodes with this card.

        Args:
            pair_gb_s: what each of two ranks of a node sends to the other in a second, where
                measured.
            network_gb_s: the same of two ranks of different nodes.
        """
        links, network = LINKS[card.link], NETWORKS[card.network]
        within = [replace(each, gb_per_s=links.share * each.gb_per_s) for each in links.levels]
        between = [
            replace(each, gb_per_s=network_gb_s or network.share * each.gb_per_s)
            for each in network.levels
        ]
        reduce_share = links.reduce_share
        reduce_gb_s = reduce_share and reduce_share * card.link_gb_per_s
        return cls((*within, *between), card.node_gpus, reduce_gb_s, pair_gb_s)

    def with_ranks_per_node(self, ranks: int) -> Network:
        """This network where each node has so many ranks, or all that its links join if fewer."""
        node = min(ranks, self.node)
        levels = tuple(
            replace(level, gpus=min(level.gpus, node))
            if level.gpus and level.gpus <= self.node
            else level
            for level in self.levels
        )
        return replace(self, levels=levels, node=node)

    def bytes_per_s(self, group: Group) -> float:
        """What each rank of a ring over ``group`` sends to the next one in a second.

        A domain of neighbouring ranks has one way out for each of its ranks in the group: a ring
        over several of them is as many rings, each with an adapter of its own. Two ranks of a node
        do not use all of its links at once.
        """
        if group.ranks == 2 and self.pair_gb_s and group.span <= self.levels[0].gpus:
            return 1e9 * self.pair_gb_s
        return 1e9 * min(
            level.gb_per_s * min(group.ranks, inside) for level, inside in self._crossed(group)
        )

    def crosses_nodes(self, group: Group) -> bool:
        """Whether not all ranks of ``group`` are in one node."""
        return group.ranks > 1 and group.span > self.node

    def gather_s(self, message: float, group: Group) -> float:
        """Seconds of an all-gather or reduce-scatter; ``message``: bytes of the whole result."""
        if group.ranks == 1:
            return 0.0
        sent = message * (group.ranks - 1) / group.ranks
        return sent / self.bytes_per_s(group) + MESSAGE_S + self._steps(group) * NETWORK_HOP_S

    def within_node_s(self, message: float, group: Group) -> float:
        """``gather_s`` as if all ranks were in one node, without latency."""
        sent = message * (group.ranks - 1) / group.ranks
        return sent / (1e9 * self.levels[0].gb_per_s)

    def all_reduce_s(self, message: float, group: Group) -> float:
        """Seconds of an all-reduce of ``message`` bytes.

        Where the switch adds up, a rank sends (n+1)/n of it: its message once, and for all others
        its n-th of the sum. Else 2 (n-1)/n, by a ring or a tree over the nodes.
        """
        if group.ranks == 1:
            return 0.0
        if self._reduces(group):
            sent = message * (group.ranks + 1) / group.ranks
            return sent / (1e9 * self.reduce_gb_s) + MESSAGE_S
        sent = 2 * message * (group.ranks - 1) / group.ranks
        nodes = self._steps(group) + 1
        steps = min(2 * (nodes - 1), 2 * math.ceil(math.log2(nodes)))
        return sent / self.bytes_per_s(group) + MESSAGE_S + steps * NETWORK_HOP_S

    def all_to_all_s(
        self, message: float, group: Group, between_nodes: float | None = None
    ) -> float:
        """Seconds in which each rank sends ``message`` bytes, its own share among them, evenly.

        Each level has its own way out, and all work at the same time: the slowest decides.

        Args:
            between_nodes: what a rank sends to other nodes, where that is not the even share.
        """
        if group.ranks == 1:
            return 0.0
        each, slowest = message / group.ranks, 0.0
        for level, inside in self._crossed(group):
            sent = each * (group.ranks - inside)
            if between_nodes is not None and inside * group.stride >= self.node:
                sent = between_nodes
            slowest = max(slowest, sent / level.gb_per_s / 1e9)
        return slowest + MESSAGE_S + (NETWORK_HOP_S if self.crosses_nodes(group) else 0)

    def nodes_reached(self, copies: int, group: Group) -> float:
        """Other nodes in which a token has any of its ``copies``, drawn evenly, on average."""
        nodes = self._steps(group) + 1
        return (nodes - 1) * (1 - (1 - 1 / nodes) ** copies)

    def send_s(self, message: float, group: Group) -> float:
        """Seconds to send ``message`` bytes to the next rank of ``group``; all ranks send."""
        pair = Group(2, group.stride)
        return message / self.bytes_per_s(pair) if group.ranks > 1 else 0.0

    def turn_s(self, message: float, group: Group) -> float:
        """Seconds in which all ranks of ``group`` send ``message`` bytes to the next, the last one
        to the first: the slowest pair decides."""
        seconds = self.send_s(message, group)
        if not self.crosses_nodes(group):
            return seconds
        slowest_gb_s = min(level.gb_per_s for level, _ in self._crossed(group))
        return max(seconds, message / slowest_gb_s / 1e9)

    def _reduces(self, group: Group) -> bool:
        """Whether the switch computes its all-reduce."""
        within = self.levels[0].gpus
        return bool(self.reduce_gb_s) and group.ranks >= FEWEST_REDUCED and group.span <= within

    def _crossed(self, group: Group) -> Iterator[tuple[Level, int]]:
        """The levels that ``group`` uses, each with its ranks in a domain of the level below."""
        within = 1
        for level in self.levels:
            inside = max(1, within // group.stride)
            if within < group.span and inside < group.ranks:
                yield level, inside
            within = level.gpus or math.inf

    def _steps(self, group: Group) -> int:
        """Boundaries between nodes along a ring's path through all ranks of ``group``."""
        if not self.crosses_nodes(group):
            return 0
        return math.ceil(group.ranks / max(1, self.node // group.stride)) - 1
