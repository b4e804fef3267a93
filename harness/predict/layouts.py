"""Every layout of the same work over GPUs, and the best that fit a card (``make faster-420``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import get_args

from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import divisors
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import GPUS_OF_A_NODE, Card
from harness.predict.calibrations import Machine
from harness.predict.capacity import cannot_fit, surely_fits, verdict
from harness.predict.memory import Memory, predict
from harness.predict.step_time import StepTime, unknown

CP_COMM_TYPES = get_args(Experiment.model_fields["cp_comm_type"].annotation)
MOST_NODES = 16
LEVERS = ({"CROSS_ENTROPY_FUSION": "1"}, {"CUDA_GRAPHS": "1"})
"""What makes the same work faster in the same layout; tried one after the other."""
WORTH = 0.99
"""A layout is faster if its step takes at most this share of the time; a lever is kept if the same
holds for the pessimistic ends of both bands."""


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


def faster(experiment: Experiment, machine: Machine) -> list[Layout]:
    """The layouts that fit ``machine``'s cards and are faster than ``experiment``, surest first.

    Their order is that of the pessimistic ends of their bands, so that an unsure layout does not
    come before a sure one that is nearly as fast. Of layouts that are as fast, the smallest comes
    first; of those that differ only in virtual stages, only the fastest is listed. If
    ``experiment`` may not fit: every layout that fits.
    """
    now_ms = math.inf
    if verdict(predict(experiment), machine.card) == "fits":
        now_ms = WORTH * machine.predict(experiment).total

    def is_faster(layout: Layout) -> bool:
        return layout.step is not None and layout.step.total < now_ms

    ways = _ways(experiment, experiment.world_size, machine.card, machine)
    found = filter(None, (_first_fitting(way, machine.card, is_faster) for way in ways))
    best: dict[str, Layout] = {}
    for layout in sorted(found, key=_preference):
        same = layout.experiment.model_copy(update={"vpp": 1, "overrides": {}})
        best.setdefault(repr(same), layout)
    return list(best.values())


def by_gpus(
    experiment: Experiment, card: Card, machine: Machine | None
) -> Iterator[tuple[int, Layout | None]]:
    """The best layout over 1, 2, 4 and 8 GPUs (a node); None where none fits ``card``.

    The best is the surest to be fast; without constants, the one that splits the model least. If a
    node cannot hold the work, the number of nodes is doubled up to MOST_NODES until it fits.
    """
    ranks, held = 1, False
    while ranks <= GPUS_OF_A_NODE or (not held and ranks <= MOST_NODES * GPUS_OF_A_NODE):
        best = None
        for way in _ways(experiment, ranks, card, machine):

            def is_better(layout: Layout, best=best) -> bool:
                return best is None or _preference(layout) < _preference(best)

            best = _first_fitting(way, card, is_better) or best
        yield ranks, best
        ranks, held = 2 * ranks, held or best is not None


def _preference(layout: Layout) -> tuple[float, ...]:
    """Sorts the best layout first."""
    experiment, gib = layout.experiment, layout.memory.all_tensors
    if layout.step:
        return round(layout.slowest_ms, 1), gib
    split = experiment.tp * experiment.pp * experiment.cp * experiment.ep
    recomputes = experiment.recompute != "none"
    return math.inf, recomputes, split, -experiment.micro_batch_size, gib


def _first_fitting(
    way: Iterable[Layout], card: Card, is_wanted: Callable[[Layout], bool]
) -> Layout | None:
    """The first of ``way`` that fits ``card``; None where it is not wanted, or none fits.

    Later ones are slower: where one is not wanted, they are not either. Memory is asked for last:
    to replay allocations takes longer than to predict a step.
    """
    for layout in way:
        if not is_wanted(layout):
            return None
        if surely_fits(layout.memory, card):
            return layout
    return None


def _ways(
    experiment: Experiment, ranks: int, card: Card, machine: Machine | None
) -> Iterator[Iterator[Layout]]:
    """Every layout over ``ranks`` GPUs, each in several ways, of which the first that fits counts.

    With the LEVERS that make it faster and without; then with the recomputation of its row, then
    with full recomputation.
    """
    listed = _listed(experiment)
    for plain in layouts(experiment, ranks):
        yield _in_turn(plain, listed, card, machine)


def _in_turn(
    plain: Experiment, listed: Experiment, card: Card, machine: Machine | None
) -> Iterator[Layout]:
    for changed in _recomputed(plain, listed):
        memory = predict(changed)
        if cannot_fit(memory, card):
            continue
        if machine is None or unknown(changed):
            yield Layout(changed, memory, None)
            continue
        layout = _timed(changed, memory, machine)
        tuned = _tuned(layout, listed, machine)
        yield tuned
        if tuned is not layout:
            yield layout


def _tuned(layout: Layout, listed: Experiment, machine: Machine) -> Layout:
    """``layout`` with the LEVERS that make it faster."""
    for lever in LEVERS:
        changed = overrides.admitted(listed, layout.experiment.overrides | lever)
        if changed is None or changed == layout.experiment or unknown(changed):
            continue
        tuned = _timed(changed, predict(changed), machine)
        if tuned.slowest_ms <= WORTH * layout.slowest_ms:
            layout = tuned
    return layout


def _timed(experiment: Experiment, memory: Memory, machine: Machine) -> Layout:
    return Layout(experiment, memory, machine.predict(experiment), machine.error(experiment))


def layouts(experiment: Experiment, ranks: int) -> Iterator[Experiment]:
    """``experiment`` over ``ranks`` GPUs in every layout that its sizes admit.

    Varied are tensor, pipeline, context and expert parallel sizes, virtual stages, micro-batch
    size, sharding and context parallelism's exchange. The batch stays; nothing is recomputed;
    sequence parallelism goes with tensor parallelism; experts are not split.
    """
    listed, model = _listed(experiment), experiment.model
    kept = {
        key: value for key, value in experiment.overrides.items() if key not in ("DP", "SP", "VPP")
    }
    if ranks != experiment.world_size:
        kept["NODES"] = str(math.ceil(ranks / GPUS_OF_A_NODE))
    for tp, pp, cp, dp in _axes(ranks):
        if experiment.global_batch_size % dp:
            continue
        axes = kept | {"GPUS": ranks, "TP": tp, "PP": pp, "CP": cp, "ETP": 1, "RECOMPUTE": "none"}
        if tp > 1:
            axes["SP"] = 1
        choices = {
            "EP": divisors(math.gcd(model.num_experts, ranks // pp)) if model.num_experts else [1],
            "MBS": divisors(experiment.global_batch_size // dp),
            "VPP": divisors(model.num_layers // pp) if pp > 1 else [],
            "SHARDING": _shardings(experiment, dp * cp),
            "CP_COMM_TYPE": CP_COMM_TYPES if cp > 1 else [experiment.cp_comm_type],
        }
        if pp == 1:
            del choices["VPP"]
        for values in product(*choices.values()):
            more = dict(zip(choices, values, strict=True))
            if layout := overrides.admitted(listed, axes | more):
                yield layout


def _listed(experiment: Experiment) -> Experiment:
    """The row of ``experiment``; where it starts from weights, with their model."""
    listed = load_catalog().find(experiment.id)
    if not experiment.weights:
        return listed
    of_weights = ("model", "positions", "seq_length")
    return listed.model_copy(update={name: getattr(experiment, name) for name in of_weights})


def _shardings(experiment: Experiment, replicas: int) -> Iterable[str]:
    if replicas == 1:
        return ["no_shard" if experiment.fully_sharded else experiment.sharding]
    return dict.fromkeys(("no_shard", "optim", experiment.sharding))


def _axes(ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """Tensor, pipeline, context and data parallel sizes whose product is ``ranks``."""
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            for cp in divisors(ranks // tp // pp):
                yield tp, pp, cp, ranks // (tp * pp * cp)


def _recomputed(layout: Experiment, listed: Experiment) -> Iterator[Experiment]:
    """``layout`` as it is, with the recomputation of its row ``listed``, and with full."""
    yield layout
    for how in dict.fromkeys((listed.recompute, "full")):
        more = layout.overrides | {"RECOMPUTE": how}
        if how != "none" and (changed := overrides.admitted(listed, more)):
            yield changed
