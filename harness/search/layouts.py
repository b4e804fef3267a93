"""The best layouts of the same work over GPUs that fit a card (``make faster-420``, ``plan``)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np

from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE, Card
from harness.experiment.unlisted import MOST_GPUS, nodes_of, row_of
from harness.predict.calibrations import Machine
from harness.predict.capacity import surely_fits, verdict
from harness.predict.memory import Memory, predict
from harness.predict.step_time import StepTime, unknown
from harness.search.estimates import sizes, steps_ms
from harness.search.space import LEVERS, legal
from harness.search.table import Table

WORTH = 0.99
"""A layout is faster if its step takes at most this share of the time; a lever is kept if the same
holds for the pessimistic ends of both bands."""
MOST = 50
"""Layouts that ``faster`` returns."""
SLACK = 0.05
"""How far the estimate of a pipeline's step may be off: layouts within it are predicted exactly
before the order is said. A test compares both."""
LESSER = {
    *("vpp", "recompute", "recompute_modules", "sequence_parallel", "cp_comm_type", "cp_a2a"),
    *LEVERS,
}
"""Of layouts that differ in nothing else, only the best is listed."""
SIZES = {
    "tp": "TP",
    "pp": "PP",
    "cp": "CP",
    "ep": "EP",
    "etp": "ETP",
    "micro_batch_size": "MBS",
    "sharding": "SHARDING",
    "recompute": "RECOMPUTE",
    "cp_comm_type": "CP_COMM_TYPE",
    "cp_a2a": "CP_A2A",
}
"""Fields that are typed whatever their value, but for None, and the setting."""
COUNTED = {"embedding_as_layer": "EMBEDDING_AS_LAYER", "loss_as_layer": "LOSS_AS_LAYER"}


@dataclass(frozen=True)
class Layout:
    """An experiment in another layout, with its memory and step time by formula."""

    experiment: Experiment
    """Its ``overrides`` are the settings that make the layout."""
    memory: Memory
    step: StepTime | None
    """None where no constants cover it."""
    error: float = 0.0
    """How far steps of its kind of work were off, relative: the 90th percentile."""

    @property
    def slowest_ms(self) -> float:
        """The pessimistic end of its band."""
        return self.step.total * (1 + self.error)

    def ties_with(self, other: Layout) -> bool:
        """Whether their bands overlap, so that either may be faster."""
        return self.step.total * (1 - self.error) < other.slowest_ms

    @property
    def settings(self) -> str:
        """What is typed after ``make <id>``."""
        changed = self.experiment.overrides
        return overrides.typed({key: changed[key] for key in changed if key != "CARD"})


@dataclass(frozen=True)
class Search:
    """What is to be laid out, over how many GPUs of which kind."""

    experiment: Experiment
    ranks: int
    card: Card | None
    """None: layouts that fit none as well."""
    machine: Machine | None
    """None: layouts are ordered without a step time."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are not to vary, with their values."""
    given_nodes: int | None = None
    """None: the experiment's on as many GPUs, else the fewest."""

    @cached_property
    def row(self) -> Experiment:
        """The row of the catalogue; where the work starts from weights, with their model."""
        experiment = self.experiment
        if not experiment.chapter:
            return row_of(experiment.model)
        listed = load_catalog().find(experiment.id)
        if not experiment.weights:
            return listed
        of_weights = ("model", "positions", "seq_length")
        return listed.model_copy(update={name: getattr(experiment, name) for name in of_weights})

    @property
    def nodes(self) -> int:
        if self.given_nodes:
            return self.given_nodes
        same = self.ranks == self.experiment.world_size
        return self.experiment.nodes if same else nodes_of(self.ranks, self.gpus_of_a_node)

    @property
    def gpus_of_a_node(self) -> int:
        return self.card.node_gpus if self.card else GPUS_OF_A_NODE

    def table(self) -> Table:
        """The legal layouts of which it is not known that they do not fit."""
        recomputed = self.experiment if self.experiment.recompute == "selective" else self.row
        kept = {
            "recompute": recomputed.recompute,
            "recompute_modules": recomputed.recompute_modules,
        }
        base = self.experiment.model_copy(update=kept | {"nodes": self.nodes})
        pace = None
        if self.machine and not unknown(base):
            pace = partial(steps_ms, speed=self.machine.speed(nodes=self.nodes))
        return legal(base, self.ranks, self.fixed, self.card, pace)

    def laid_out(self, table: Table, row: int) -> Experiment | None:
        """The experiment of a row of ``table``, with the settings that make it."""
        chosen = {name: column.values[column.codes[row]] for name, column in table.columns.items()}
        settings = {
            key: value
            for key, value in self.experiment.overrides.items()
            if key not in ("DP", "SP", "VPP", "CP_A2A", "EMBEDDING_AS_LAYER", "LOSS_AS_LAYER")
        }
        settings |= {"GPUS": self.ranks, "NODES": self.nodes}
        settings |= {
            key: chosen[name] for name, key in SIZES.items() if chosen.get(name) is not None
        }
        if chosen["tp"] > 1:
            settings["SP"] = int(chosen["sequence_parallel"])
        if chosen["pp"] > 1:
            settings["VPP"] = chosen["vpp"]
        settings |= {key: int(chosen[name]) for name, key in COUNTED.items()}
        settings |= {key: 1 for name, key in LEVERS.items() if chosen[name]}
        return overrides.admitted(self.row, settings)


def faster(experiment: Experiment, machine: Machine, most: int = MOST) -> list[Layout]:
    """The ``most`` surest layouts that fit ``machine``'s cards and are faster than ``experiment``.

    Their order is that of the pessimistic ends of their bands, so that an unsure layout does not
    come before a sure one that is nearly as fast. Of layouts that are as fast, the smallest comes
    first; of those that differ only in virtual stages, recomputation and levers, only the first is
    listed. If ``experiment`` may not fit: the surest that fit.
    """
    now_ms = math.inf
    if verdict(predict(experiment), machine.card) == "fits":
        now_ms = WORTH * machine.predict(experiment).total
    search = Search(experiment, experiment.world_size, machine.card, machine)
    table = search.table()
    return list(islice(_timed(search, table, now_ms), most)) if len(table) else []


def best(search: Search) -> Iterator[Layout]:
    """Every layout that fits, the surest to be fast first, then those whose time is unknown.

    Those come in the order of how little they recompute and split the model.
    """
    table = search.table()
    if search.machine and len(table):
        yield from _timed(search, table)
    yield from _untimed(search, table)


def by_gpus(
    experiment: Experiment, card: Card, machine: Machine | None, most: int = MOST_GPUS
) -> Iterator[tuple[int, Layout | None]]:
    """The best layout over 1, 2, 4… GPUs; None where none fits ``card``.

    More nodes than hold the work are only asked about where step times are known.
    """
    ranks, held = 1, False
    while ranks <= most:
        found = next(best(Search(experiment, ranks, card, machine)), None)
        if held and ranks > GPUS_OF_A_NODE and not (found and found.step):
            return
        yield ranks, found
        ranks, held = 2 * ranks, held or found is not None


def smallest(search: Search) -> tuple[int, Layout] | None:
    """The fewest GPUs beyond ``search``'s, in whole nodes beyond one, and the best layout on them.

    Their number is doubled until a layout fits, then those between are tried.
    """

    def on(ranks: int) -> Layout | None:
        return next(best(replace(search, ranks=ranks, given_nodes=None)), None)

    more = 2 * search.ranks
    while more <= MOST_GPUS and not (found := on(more)):
        more *= 2
    if more > MOST_GPUS:
        return None
    apart = 1 if more <= search.gpus_of_a_node else search.gpus_of_a_node
    between = range(more // 2 // apart * apart + apart, more, apart)
    fewer = next(((ranks, layout) for ranks in between if (layout := on(ranks))), None)
    return fewer or (more, found)


def _timed(search: Search, table: Table, below_ms: float = math.inf) -> Iterator[Layout]:
    """The layouts that fit whose steps are predicted to take less, the surest first."""
    machine = search.machine
    table = table.take(~table.true(lambda one: bool(unknown(one))))
    if not len(table):
        return
    total_ms = steps_ms(table, machine.speed(nodes=search.nodes))
    slowest_ms = total_ms * (1 + table.each(machine.error))
    wanted = _levers_bring(table, slowest_ms) & (total_ms * (1 - SLACK) < below_ms)
    order = np.lexsort((sizes(table).all_tensors, np.round(slowest_ms, 1)))
    same, seen = table.which(set(table.columns) - LESSER), set()
    waiting: list[tuple[tuple[float, ...], int, Layout]] = []

    def settled(until_ms: float) -> Iterator[Layout]:
        while waiting and waiting[0][0][0] < until_ms:
            _, row, layout = heapq.heappop(waiting)
            if same[row] not in seen and surely_fits(layout.memory, search.card):
                seen.add(same[row])
                yield layout

    for row in order[wanted[order]].tolist():
        yield from settled(slowest_ms[row] * (1 - SLACK))
        if same[row] in seen or not (experiment := search.laid_out(table, row)):
            continue
        step, error = machine.predict(experiment), machine.error(experiment)
        if step.total < below_ms:
            layout = Layout(experiment, predict(experiment), step, error)
            heapq.heappush(waiting, (_preference(layout), row, layout))
    yield from settled(math.inf)


def _untimed(search: Search, table: Table) -> Iterator[Layout]:
    """The layouts that fit, in the order of ``_preference``."""
    if not len(table):
        return
    plain = ~np.any([table.array(lever) != getattr(search.row, lever) for lever in LEVERS], axis=0)
    table = table.take(plain)
    if search.machine:
        table = table.take(table.true(lambda one: bool(unknown(one))))
    if not len(table):
        return
    split = np.prod([table.array(axis) for axis in ("tp", "pp", "cp", "ep")], axis=0)
    keys = (
        sizes(table).all_tensors,
        -table.array("micro_batch_size"),
        split,
        table.array("recompute") != "none",
    )
    for row in np.lexsort(keys).tolist():
        if experiment := search.laid_out(table, row):
            layout = Layout(experiment, predict(experiment), None)
            if surely_fits(layout.memory, search.card):
                yield layout


def _levers_bring(table: Table, slowest_ms: np.ndarray) -> np.ndarray:
    """Which rows have no lever, or just those that each bring enough after the ones before."""
    plain = table.which(set(table.columns) - set(LEVERS))
    bits = [1 << place for place in range(len(LEVERS))]
    pulled = sum(table.array(lever) * bit for lever, bit in zip(LEVERS, bits, strict=True))
    known_ms = np.full((plain.max() + 1, 2 * bits[-1]), math.inf)
    known_ms[plain, pulled] = slowest_ms
    first = np.argmin(np.isinf(known_ms), axis=1)
    every, chosen = np.arange(len(known_ms)), first.copy()
    for bit in bits:
        better = known_ms[every, chosen | bit] <= WORTH * known_ms[every, chosen]
        chosen[better] |= bit
    return (pulled == chosen[plain]) | (pulled == first[plain])


def _preference(layout: Layout) -> tuple[float, ...]:
    """Sorts the best layout first."""
    experiment, gib = layout.experiment, layout.memory.all_tensors
    if layout.step:
        return round(layout.slowest_ms, 1), gib
    split = experiment.tp * experiment.pp * experiment.cp * experiment.ep
    recomputes = experiment.recompute != "none"
    return math.inf, recomputes, split, -experiment.micro_batch_size, gib
