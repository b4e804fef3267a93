"""The layouts of the same work over GPUs that are legal and may fit a card, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, get_args

import numpy as np

from harness.experiment.constraints import RULES, divisors
from harness.experiment.experiment import SHARDING, Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE, Card
from harness.predict.capacity import cannot_fit
from harness.search.estimates import Sizes, least_gib, sizes
from harness.search.table import Column, Row, Table

Choice = Mapping[str, Sequence[Any]]
"""Fields and their values, chosen together: the first of each, the second of each…"""
Rule = Callable[[Experiment], Iterator[str]]
LEVERS = {"cross_entropy_fusion": "CROSS_ENTROPY_FUSION", "cuda_graphs": "CUDA_GRAPHS"}
"""What makes the same work faster in the same layout, and its setting; tried one after the other.
"""
FASTEST = {
    "recompute": ("none",),
    "recompute_modules": ((),),
    **dict.fromkeys(LEVERS, (True,)),
}
"""What makes steps shortest, whatever else is chosen."""
MONOTONE = {"vpp"}
"""Fields whose least value breaks no rule that another would keep."""
DERIVED = {
    "tp": ("replicas", "is_pipelined"),
    "sharding": ("expert_replicas", "fully_sharded"),
    "micro_batch_size": ("num_microbatches", "rank_tokens", "exchanges_heads"),
}
"""Properties of an experiment with fewer values than the fields behind them have combinations, and
the choice after which they are known."""
PRUNING = {"sharding", "micro_batch_size", "recompute", "vpp", "cross_entropy_fusion"}
"""Choices after which more is known of the memory."""
CP_COMM_TYPES = get_args(Experiment.model_fields["cp_comm_type"].annotation)


PACE = 3
"""Layouts that take so many times the fastest's step are left out; all are judged without
recomputation, with all levers, and without virtual stages. Recomputation makes a step longer by a
third at most, and virtual stages shorter by half: they need as many micro-batches as stages."""


def legal(
    row: Experiment,
    ranks: int,
    fixed: Mapping[str, Any],
    card: Card | None = None,
    steps_ms: Callable[[Table], np.ndarray] | None = None,
) -> Table:
    """Every layout of ``row`` over ``ranks`` GPUs that constraints admit.

    The batch stays. Left out are layouts that differ from another in nothing (sharding without
    replicas, ways of context parallelism without any), those that count embedding or loss as
    layers though the layers divide, and two levels of context parallelism within a node.

    Tensor parallel ranks are in one node, unless ``fixed`` says how many there are.

    Args:
        fixed: values of fields that are not to vary.
        card: leave out layouts of which it is known that they do not fit it.
        steps_ms: how long steps take by formula; leave out layouts that cannot be near the fastest.
    """
    choices = list(_choices(row, ranks, fixed, card.node_gpus if card else GPUS_OF_A_NODE))
    if not all(values for choice in choices for values in choice.values()):
        return _start(row, ranks, {}).take([])
    waiting = {name: values[0] for choice in choices for name, values in choice.items()}
    table, rules = _start(row, ranks, waiting), list(RULES)
    for choice in choices:
        for name in choice:
            del waiting[name]
        table = table.expanded(choice)
        table = table.take(~table.true(lambda one: _same_as_another(one, row)))
        table, rules = _admitted(table, rules, waiting.keys())
        for name in DERIVED.keys() & choice.keys() if len(table) else ():
            table = table.with_derived(DERIVED[name])
        if card and PRUNING & choice.keys() and len(table):
            table = table.take(~cannot_fit(_least(table, waiting.keys()), card))
        if steps_ms and "micro_batch_size" in choice and len(table):
            fast_ms = steps_ms(table.expanded(FASTEST))
            table = table.take(fast_ms <= PACE * fast_ms.min())
        if not len(table):
            break
    return table


def _start(row: Experiment, ranks: int, waiting: Mapping[str, Any]) -> Table:
    """One row, before anything is chosen."""
    one = np.zeros(1, dtype=np.int32)
    return Table(
        row,
        {name: Column(one, [value]) for name, value in waiting.items()}
        | {"world_size": Column(one, [ranks])},
    )


def _choices(
    row: Experiment, ranks: int, fixed: Mapping[str, Any], most_tp: int
) -> Iterator[Choice]:
    """What may be chosen, in the order in which it narrows the space.

    Of what is chosen later, memory is judged with the first value: it takes least.
    """
    model = row.model
    yield _fixed(_axes(ranks, ranks if "tp" in fixed else most_tp), fixed)
    yield _fixed(_counted(row), fixed)
    yield _fixed({"sequence_parallel": (True, False)}, fixed)
    yield _fixed(_exchanges(row, fixed.get("cp_a2a")), fixed)
    if model.num_experts:
        within = [ways for ways in divisors(ranks) if ways <= most_tp]
        yield _fixed({"ep": divisors(model.num_experts)}, fixed)
        yield _fixed({"etp": [1] if model.add_bias_linear else within}, fixed)
    yield _fixed({"sharding": tuple(dict.fromkeys((_alone(row), *SHARDING)))}, fixed)
    yield _fixed({"micro_batch_size": divisors(row.global_batch_size)}, fixed)
    yield _fixed(_recomputations(row), fixed)
    counted = range(model.num_layers, model.num_layers + 3)  # with embedding and loss
    chunks = {
        vpp for layers in counted for vpp in divisors(layers) if 2 * vpp <= layers or vpp == 1
    }
    yield _fixed({"vpp": sorted(chunks)}, fixed)
    for lever in LEVERS:
        yield _fixed({lever: tuple(dict.fromkeys((getattr(row, lever), True)))}, fixed)


def _axes(ranks: int, most_tp: int) -> Choice:
    """Tensor, pipeline, context and data parallel sizes whose product is ``ranks``."""
    sizes = [
        (tp, pp, cp, ranks // (tp * pp * cp))
        for tp in divisors(ranks)
        if tp <= most_tp
        for pp in divisors(ranks // tp)
        for cp in divisors(ranks // tp // pp)
    ]
    return dict(zip(("tp", "pp", "cp", "dp"), zip(*sizes, strict=True), strict=True))


def _counted(row: Experiment) -> Choice:
    """Whether embedding and loss count as layers: other numbers of layers divide evenly then."""
    if row.first_stage_layers or row.last_stage_layers or row.pp_layout:
        return {"embedding_as_layer": (False,), "loss_as_layer": (False,)}
    return {"embedding_as_layer": (False, True, False), "loss_as_layer": (False, True, True)}


def _exchanges(row: Experiment, cp_a2a: int | None) -> Choice:
    """Ways of context parallelism, that of ``row`` first; only the one that takes ``cp_a2a``."""
    ways = [(row.cp_comm_type, row.cp_a2a), *((way, None) for way in CP_COMM_TYPES)]
    if cp_a2a:
        ways = [("a2a+p2p", cp_a2a)]
    return dict(
        zip(("cp_comm_type", "cp_a2a"), zip(*dict.fromkeys(ways), strict=True), strict=True)
    )


def _recomputations(row: Experiment) -> Choice:
    """Full, none, and selective with the modules of ``row``."""
    modules = row.recompute_modules if row.recompute == "selective" else ()
    return {
        "recompute": ("full", "none", "selective"),
        "recompute_modules": ((), (), modules),
    }


def _fixed(choice: Choice, fixed: Mapping[str, Any]) -> Choice:
    """``choice`` with the ``fixed`` values only, even if it has none of them."""
    wanted = {name: fixed[name] for name in choice if name in fixed}
    kept = [
        values
        for values in zip(*choice.values(), strict=True)
        if wanted.items() <= dict(zip(choice, values, strict=True)).items()
    ]
    if len(choice) == 1 and wanted:
        return {name: (value,) for name, value in wanted.items()}
    return {name: tuple(values[i] for values in kept) for i, name in enumerate(choice)}


def _alone(row: Experiment) -> str:
    """The sharding of one replica, which shards nothing."""
    return "no_shard" if row.fully_sharded else row.sharding


def _same_as_another(one: Experiment, row: Experiment) -> bool:
    """Whether a choice that makes no difference is another than that of ``row``.

    Nor are two levels of context parallelism of use within a node, whose links are all as fast.
    """
    if one.cp_comm_type != row.cp_comm_type:
        within_node = one.tp * one.cp <= one.ranks_per_node
        untyped_levels = one.cp_comm_type == "a2a+p2p" and not one.cp_a2a
        if one.cp == 1 or (untyped_levels and within_node):
            return True
    if (one.embedding_as_layer or one.loss_as_layer) and one.model.num_layers % one.pp == 0:
        return not row.uneven_pipeline
    return one.dp * one.cp == 1 and one.sharding != _alone(row)


def _admitted(table: Table, rules: Sequence[Rule], waiting: Set[str]) -> tuple[Table, list[Rule]]:
    """The rows that break no rule, and the rules that depend on what is still ``waiting``."""
    left = []
    for rule in rules:

        def judged(one: Row, rule: Rule = rule) -> tuple[bool, bool]:
            broken = next(rule(one), None) is not None
            certain = (waiting - MONOTONE).isdisjoint(one.read)
            return broken and certain, not waiting.isdisjoint(one.read)

        broken, depends = (np.broadcast_to(each, len(table)) for each in table.each(judged))
        if depends.any():
            left.append(rule)
        if broken.any():
            table = table.take(np.flatnonzero(broken == 0))
        if not len(table):
            break
    return table, left


def _least(table: Table, waiting: Set[str]) -> Sizes:
    """The least that every row takes, whatever is chosen of what is ``waiting``."""
    if "recompute" in waiting:  # its first value keeps least
        return Sizes(least_gib(table, "micro_batch_size" not in waiting), np.zeros(1))
    return sizes(table)
