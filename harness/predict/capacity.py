"""Whether an experiment fits a card, and which settings make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from harness.experiment import extra_arguments, overrides
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, Card
from harness.predict.memory import Memory, predict

Verdict = Literal["fits", "may run out", "does not fit"]
Settings = dict[str, str]

ERROR_SHARE = 0.03
"""Error of what nvidia-smi shows, which nine of ten runs of experiments/runs keep to."""
MOST_CHANGES = 3
"""Changes to an experiment that are combined to make it fit."""


def unseen(experiment: Experiment) -> list[str]:
    """The parts of ``experiment`` whose memory no run has measured."""
    return ["Mamba layers"] if experiment.model.mamba else []


def unmeasured(experiment: Experiment) -> str:
    """The same as a sentence; empty where there are none."""
    parts = " or ".join(unseen(experiment))
    return f"no measured row has {parts}: error unknown" if parts else ""


def error(experiment: Experiment) -> str:
    """How far a prediction may be off, to follow the number; nothing where it is not known."""
    return "" if unmeasured(experiment) else f" +-{ERROR_SHARE:.0%}"


def verdict(memory: Memory, card: Card) -> Verdict:
    """Whether ``memory``, as nvidia-smi shows it, fits ``card`` whatever the prediction's error."""
    usable = usable_gib(card)
    if _least_gib(memory) * (1 - ERROR_SHARE) > usable:  # known without a replay of allocations
        return "does not fit"
    if memory.in_all * (1 + ERROR_SHARE) <= usable:
        return "fits"
    return "may run out" if memory.in_all * (1 - ERROR_SHARE) <= usable else "does not fit"


def cannot_fit(memory: Memory, card: Card) -> bool:
    """Whether the verdict is not "fits", as far as that is known without a replay."""
    return _least_gib(memory) * (1 + ERROR_SHARE) > usable_gib(card)


def surely_fits(memory: Memory, card: Card) -> bool:
    """Whether the verdict is "fits": without a replay where it cannot be."""
    return not cannot_fit(memory, card) and verdict(memory, card) == "fits"


def _least_gib(memory: Memory) -> float:
    """The least that nvidia-smi can show."""
    return memory.all_tensors + memory.context


def usable_gib(card: Card) -> float:
    """What a process can have of ``card``, its CUDA context included."""
    return (card.memory_mib - DRIVER_RESERVED_MIB) / 1024


def summary(experiment: Experiment, card: Card) -> str:
    """One line on the memory that ``experiment`` needs of ``card``, printed before a run."""
    if unknown := extra_arguments.unpredictable(experiment.extra_args):
        return f"memory: no formula covers {', '.join(unknown)} in ARGS"
    memory = predict(experiment)
    most, gib = max(memory.pieces.items(), key=lambda piece: piece[1])
    sure, said = verdict(memory, card), unmeasured(experiment)
    line = (
        f"memory by formula: {memory.total:.1f} GiB allocated, most of it {most} ({gib:.1f});"
        f" {memory.in_all:.1f}{error(experiment)} in nvidia-smi: {sure} on {card.name}"
        f"{'; ' * bool(said)}{said}"
    )
    if sure == "fits":
        return line
    command = f"make memory-{overrides.command_of(experiment)} CARD={card.key}"
    return f"{line}; {command} lists settings that fit"


def levers(experiment: Experiment) -> Iterator[tuple[Settings, Experiment]]:
    """Settings that lower the memory of ``experiment``, each with the experiment it makes.

    The least intrusive come first. Those that a constraint forbids are left out.
    """
    before = predict(experiment).all_tensors
    for settings in _candidates(experiment):
        changed = overrides.admitted(experiment, settings)
        if changed and predict(changed).all_tensors < before:
            yield settings, changed


def ways_to_fit(experiment: Experiment, card: Card) -> list[tuple[Settings, Experiment]]:
    """The settings that make ``experiment`` fit ``card`` with the fewest changes.

    At most MOST_CHANGES are combined. Ways on as many GPUs come first; where the fewest changes
    need more GPUs, further changes are tried that do not.
    """
    ranks = experiment.world_size
    reached: list[tuple[Settings, Experiment]] = [({}, experiment)]
    found: list[tuple[Settings, Experiment]] = []
    seen = {repr(experiment)}
    for _ in range(MOST_CHANGES):
        further = []
        for settings, so_far in reached:
            for more, _ in levers(so_far):
                both = settings | more
                changed = overrides.admitted(experiment, both)
                key = repr(changed and changed.model_copy(update={"overrides": {}}))
                if changed and key not in seen:
                    seen.add(key)
                    further.append((both, changed))
        fitting = [way for way in further if surely_fits(predict(way[1]), card)]
        found += [way for way in fitting if not found or way[1].world_size == ranks]
        if any(changed.world_size == ranks for _, changed in found):
            break
        reached = further
    return sorted(found, key=lambda way: way[1].world_size)


def _candidates(experiment: Experiment) -> Iterator[Settings]:
    """Settings that may lower memory, the least intrusive first."""
    ranks, dp = experiment.world_size, experiment.dp
    as_many, twice_as_many = {"GPUS": str(ranks)}, {"GPUS": str(2 * ranks)}
    for mbs in range(experiment.micro_batch_size - 1, 0, -1):
        if experiment.global_batch_size % (mbs * dp) == 0:
            yield {"MBS": str(mbs)}
            break
    yield {"SP": "1"}
    if dp > 1:
        yield {"SHARDING": "optim"}
    yield {"RECOMPUTE": "full"}
    sharded = {} if experiment.sharding == "optim" else {"SHARDING": "optim"}
    yield {"OPTIMIZER_STATE": "bf16"} | sharded
    if dp > 1 and experiment.sharding == "optim":
        yield {"SHARDING": "fsdp_optim_grads_params"}
    for split in (
        {"EP": str(2 * experiment.ep)},
        {"TP": str(2 * experiment.tp), "SP": "1"},
        {"PP": str(2 * experiment.pp)},
    ):
        yield split | as_many
        yield split | twice_as_many
