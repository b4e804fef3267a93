"""Every way to lay the same work out over GPUs, and the best that fit: ``make faster-420``, ``make
gpus-420``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import divisors
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE, Card
from harness.predict.calibrations import Machine
from harness.predict.capacity import verdict
from harness.predict.memory import Memory, predict
from harness.predict.step_time import StepTime, unknown

CP_COMM_TYPES = get_args(Experiment.model_fields["cp_comm_type"].annotation)
MOST_NODES = 16
LEVERS = ({"CROSS_ENTROPY_FUSION": "1"}, {"CUDA_GRAPHS": "1"})
"""What makes the same work faster without another layout; each is tried after those before it."""
WORTH = 0.99
"""Of a step, a lever must leave no more."""


@dataclass(frozen=True)
class Layout:
    """An experiment laid out anew: what it will take by formula. ``experiment.overrides`` are the
    settings that make it."""

    experiment: Experiment
    memory: Memory
    step: StepTime | None
    """None where no constants cover it."""

    @property
    def settings(self) -> str:
        """The words after ``make <id>``."""
        return overrides.typed(
            {key: value for key, value in self.experiment.overrides.items() if key != "CARD"}
        )


def faster(e: Experiment, machine: Machine) -> list[Layout]:
    """What fits ``machine``'s cards and by formula is faster than ``e``, fastest first; of layouts
    as fast, the smallest.

    Where ``e`` may not fit itself: what fits. Of those that differ in virtual stages alone, the
    fastest.
    """
    now = machine.predict(e).total if verdict(predict(e), machine.card) == "fits" else math.inf
    fitting = _fitting(e, e.world_size, machine.card, machine)
    found = [layout for layout in fitting if layout.step and layout.step.total < now]
    best: dict[str, Layout] = {}
    for layout in sorted(found, key=_rank):
        best.setdefault(
            repr(layout.experiment.model_copy(update={"vpp": 1, "overrides": {}})), layout
        )
    return list(best.values())


def by_gpus(
    e: Experiment, card: Card, machine: Machine | None
) -> Iterator[tuple[int, Layout | None]]:
    """The best layout of ``e``'s work over 1, 2, 4 and 8 GPUs, a node, or None where none fits
    ``card``.

    The best is the fastest; where no constants cover it, the one that splits the model least. Where
    a node does not hold the work, twice as many nodes are tried until they do, MOST_NODES at most.
    """
    ranks, held = 1, False
    while ranks <= GPUS_OF_A_NODE or (not held and ranks <= MOST_NODES * GPUS_OF_A_NODE):
        best = min(_fitting(e, ranks, card, machine), key=_rank, default=None)
        yield ranks, best
        ranks, held = 2 * ranks, held or best is not None


def _rank(layout: Layout) -> tuple[float, ...]:
    e = layout.experiment
    if layout.step:
        return round(layout.step.total, 1), layout.memory.total
    return (
        math.inf,
        e.recompute != "none",
        e.tp * e.pp * e.cp * e.ep,
        -e.micro_batch_size,
        layout.memory.total,
    )


def _fitting(e: Experiment, ranks: int, card: Card, machine: Machine | None) -> Iterator[Layout]:
    """The layouts of ``e``'s work over so many GPUs that fit ``card``.

    What does not fit without recomputation is tried with that of the catalogue, and with full
    recomputation. LEVERS are pulled where they make it faster.
    """
    listed = _listed(e)
    for layout in layouts(e, ranks):
        ways = ((way, predict(way)) for way in _recomputed(layout, listed))
        if fitting := next(
            ((way, memory) for way, memory in ways if verdict(memory, card) == "fits"), None
        ):
            way, memory = fitting
            known = machine and not unknown(way)
            yield (
                _tuned(Layout(way, memory, machine.predict(way)), listed, machine)
                if known
                else Layout(way, memory, None)
            )


def _tuned(layout: Layout, listed: Experiment, machine: Machine) -> Layout:
    for lever in LEVERS:
        pulled = overrides.admitted(listed, layout.experiment.overrides | lever)
        if pulled is None or pulled == layout.experiment or unknown(pulled):
            continue
        step = machine.predict(pulled)
        if step.total <= WORTH * layout.step.total:
            layout = Layout(pulled, predict(pulled), step)
    return layout


def layouts(e: Experiment, ranks: int) -> Iterator[Experiment]:
    """``e`` with other tensor, pipeline, context and expert parallel sizes, virtual stages,
    micro-batches and sharding.

    On ``ranks`` GPUs, with as many samples a step, without recomputation; sequence parallelism goes
    with tensor parallelism, context parallelism exchanges in every way, and experts are whole.
    Those that its sizes do not admit are left out.
    """
    listed = _listed(e)
    given = {key: value for key, value in e.overrides.items() if key not in ("DP", "SP", "VPP")}
    if ranks != e.world_size:
        given["NODES"] = str(math.ceil(ranks / GPUS_OF_A_NODE))
    for tp, pp, cp, dp in _axes(ranks):
        if e.global_batch_size % dp:
            continue
        axes = (
            given
            | {"GPUS": ranks, "TP": tp, "PP": pp, "CP": cp, "RECOMPUTE": "none"}
            | ({"SP": 1} if tp > 1 else {})
        )
        for ep in (
            divisors(math.gcd(e.model.num_experts, ranks // pp)) if e.model.num_experts else (1,)
        ):
            for mbs in divisors(e.global_batch_size // dp):
                for vpp in divisors(e.model.num_layers // pp) if pp > 1 else (1,):
                    for sharding in _shardings(e, dp * cp):
                        for way in CP_COMM_TYPES if cp > 1 else (e.cp_comm_type,):
                            more = {
                                "EP": ep,
                                "ETP": 1,
                                "MBS": mbs,
                                "SHARDING": sharding,
                                "CP_COMM_TYPE": way,
                            }
                            if layout := overrides.admitted(
                                listed, axes | more | ({"VPP": vpp} if pp > 1 else {})
                            ):
                                yield layout


def _listed(e: Experiment) -> Experiment:
    """``e`` as the catalogue has it; where it starts from weights, on their model."""
    listed = load_catalog().find(e.id)
    if not e.weights:
        return listed
    return listed.model_copy(
        update={"model": e.model, "positions": e.positions, "seq_length": e.seq_length}
    )


def _shardings(e: Experiment, replicas: int) -> Iterable[str]:
    if replicas == 1:
        return ["no_shard" if e.fully_sharded else e.sharding]
    return dict.fromkeys(("no_shard", "optim", e.sharding))


def _axes(ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """Tensor, pipeline, context and data parallel sizes whose product is ``ranks``."""
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            for cp in divisors(ranks // tp // pp):
                yield tp, pp, cp, ranks // (tp * pp * cp)


def _recomputed(layout: Experiment, listed: Experiment) -> Iterator[Experiment]:
    """``layout``, then with ever more recomputation; ``listed`` is the experiment as in the
    catalogue."""
    yield layout
    for how in dict.fromkeys((listed.recompute, "full")):
        if how != "none" and (
            recomputed := overrides.admitted(listed, layout.overrides | {"RECOMPUTE": how})
        ):
            yield recomputed
