"""Does an experiment fit a card, and what to set where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from harness.experiment import extra_arguments, overrides
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import NON_ALLOCATOR_MIB, Card
from harness.predict.memory import Memory, predict

Verdict = Literal["fits", "may run out", "does not fit"]
Settings = dict[str, str]

SURE_SHARE = 0.91
"""Of what PyTorch may have, tensors may take so much; the rest may be fragments. 111 ran at 0.89,
121 failed at 0.92."""
DEEPEST = 3
"""Levers that are pulled at once."""


def verdict(memory: Memory, card: Card) -> Verdict:
    """Whether ``memory`` fits ``card`` beside CUDA and NCCL."""
    share = memory.total / available_gib(card)
    return "fits" if share <= SURE_SHARE else "may run out" if share <= 1 else "does not fit"


def available_gib(card: Card) -> float:
    """What PyTorch's allocator can have of ``card``."""
    return (card.memory_mib - NON_ALLOCATOR_MIB) / 1024


def in_a_line(e: Experiment, card: Card) -> str:
    """What ``e`` will take of ``card``, as a run says it before it begins."""
    if unknown := extra_arguments.unpredictable(e.extra_args):
        return f"memory: no formula knows {', '.join(unknown)} in ARGS"
    memory = predict(e)
    most, gib = max(memory.pieces.items(), key=lambda piece: piece[1])
    sure = verdict(memory, card)
    way_out = (
        ""
        if sure == "fits"
        else f"; make memory-{overrides.command_of(e)} CARD={card.key} says what would"
    )
    return (
        f"memory by formula: {memory.total:.1f} GiB, most of it {most} ({gib:.1f}): {sure} on"
        f" {card.name}{way_out}"
    )


def levers(e: Experiment) -> Iterator[tuple[Settings, Experiment]]:
    """Settings that lower the memory of ``e``, the least intrusive first, each with the experiment
    it makes.

    Only those that the experiment admits, and that by ``predict`` need less.
    """
    before = predict(e).total
    for settings in _candidates(e):
        if (changed := overrides.admitted(e, settings)) and predict(changed).total < before:
            yield settings, changed


def ways_to_fit(e: Experiment, card: Card) -> list[tuple[Settings, Experiment]]:
    """What makes ``e`` fit ``card`` with the fewest levers, at most DEEPEST: on more GPUs, and on
    as many as it has.

    First what keeps the number of GPUs.
    """
    reached: list[tuple[Settings, Experiment]] = [({}, e)]
    found: list[tuple[Settings, Experiment]] = []
    seen = {repr(e)}
    for _ in range(DEEPEST):
        further = []
        for settings, experiment in reached:
            for more, _ in levers(experiment):
                both = settings | more
                changed = overrides.admitted(e, both)
                if (
                    changed
                    and (key := repr(changed.model_copy(update={"overrides": {}}))) not in seen
                ):
                    seen.add(key)
                    further.append((both, changed))
        fitting = [way for way in further if verdict(predict(way[1]), card) == "fits"]
        found += (
            fitting if not found else [way for way in fitting if way[1].world_size == e.world_size]
        )
        if any(changed.world_size == e.world_size for _, changed in found):
            break
        reached = further
    return sorted(found, key=lambda way: way[1].world_size)


def _candidates(e: Experiment) -> Iterator[Settings]:
    """What may lower memory; ``levers`` leaves out what does not, or is not admitted."""
    same, more = {"GPUS": str(e.world_size)}, {"GPUS": str(2 * e.world_size)}
    if smaller := next(
        (m for m in range(e.micro_batch_size - 1, 0, -1) if e.global_batch_size % (m * e.dp) == 0),
        None,
    ):
        yield {"MBS": str(smaller)}
    yield {"SP": "1"}
    if e.dp > 1:
        yield {"SHARDING": "optim"}
    yield {"RECOMPUTE": "full"}
    yield {"OPTIMIZER_STATE": "bf16"} | ({} if e.sharding == "optim" else {"SHARDING": "optim"})
    if e.dp > 1 and e.sharding == "optim":
        yield {"SHARDING": "fsdp_optim_grads_params"}
    yield from ({"EP": str(2 * e.ep)} | gpus for gpus in (same, more))
    yield from ({"TP": str(2 * e.tp), "SP": "1"} | gpus for gpus in (same, more))
    yield from ({"PP": str(2 * e.pp)} | gpus for gpus in (same, more))
