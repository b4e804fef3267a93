"""``make memory-620``: predicted memory of an experiment, and settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from harness import RECORDS
from harness.evidence.predictions import is_json, prediction, print_json
from harness.evidence.records import same_work
from harness.evidence.references import load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import DRIVER_RESERVED_MIB, Card, find_card
from harness.planning import resolved
from harness.predict.capacity import (
    MOST_CHANGES,
    error,
    unmeasured,
    usable_gib,
    verdict,
    ways_to_fit,
)
from harness.predict.memory import Memory, predict
from harness.predict.step_time import without_effect
from harness.system.screen import say

CARDS = ("h100-80gb", "h200-141gb")
"""Cards to judge by where this machine has no GPU and CARD= names none."""
SHOWN = 4
"""Number of ways to fit that are printed."""


def print_memory(id_: str, settings: Mapping[str, str]) -> int:
    """Print the predicted memory of experiment ``id_``, and whether it fits each card in question.

    Raises UserError where the experiment or a setting is invalid.
    """
    experiment = resolved.of_catalogue(id_, settings)
    memory = predict(experiment)
    if is_json(settings):
        cards = cards_of(experiment)
        return print_json(prediction(experiment, card, memory) for card in cards)
    say(heading(experiment))
    print("\nPredicted memory of the fullest GPU, GiB")
    parts = _parts(experiment, memory)
    largest = max(gib for _, gib, _ in parts)
    for name, gib, meaning in parts:
        remark = "; ".join(filter(None, ["largest" if gib == largest else "", meaning]))
        say(f"  {name:12}{gib:7.1f}  {remark}".rstrip(), hang=23)
    rows = _of_same_work(experiment)
    _say_sum("allocated", memory.total, [(row, row.memory_gib.allocated) for row in rows])
    holes = "holes in PyTorch's cache" + (" and CUDA graphs' pool" * bool(experiment.cuda_graphs))
    say(f"  {'reserve':12}{memory.reserve:7.1f}  {holes}", hang=23)
    say(f"  {'CUDA, NCCL':12}{memory.context:7.1f}  context, kernels and communicators", hang=23)
    _say_sum("nvidia-smi", memory.in_all, [(row, _of_process_gib(row)) for row in rows])
    for line in without_effect(experiment):
        say(f"  {line}")
    if said := unmeasured(experiment):
        print(f"\n{said}")
    for card in cards_of(experiment):
        judged = verdict(memory, card)
        print()
        say(
            f"{card.name}: needs {memory.in_all:.1f} GiB{error(experiment)}; the card has"
            f" {usable_gib(card):.1f} without the driver's: {judged}"
        )
        if judged != "fits":
            print(*_advice(experiment, card), sep="\n")
    return 0


def heading(experiment: Experiment) -> str:
    """The experiment that is asked about: label, model, layout, GPUs."""
    several = f", {_gpus(experiment)}" if experiment.world_size > 1 else ""
    return f"{experiment.label}: {experiment.model.name}, {experiment.layout}{several}"


def cards_of(experiment: Experiment) -> list[Card]:
    """The cards to judge by: ``CARD=``, else this machine's GPUs, else CARDS."""
    from harness.machine.gpus import list_gpus

    names = [experiment.card] if experiment.card else sorted({gpu.name for gpu in list_gpus()})
    known = [card for name in names if (card := find_card(name))]
    return known or [card for name in CARDS if (card := find_card(name))]


def _parts(experiment: Experiment, memory: Memory) -> list[tuple[str, float, str]]:
    """Name, GiB and meaning of each part of the memory that is worth a line."""
    moe, full = experiment.model.num_experts, experiment.recompute == "full"
    kept = "inputs of recomputed layers" if full else "kept for the backward pass, all layers"
    routed = "if routers balance the tokens; otherwise the fullest GPU has more"
    parts = [
        (
            "weights",
            memory.weights,
            f"and {experiment.precision} copies" if experiment.quantised else "",
        ),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        ("Mamba, attn." if experiment.model.mamba else "attention", memory.attention, kept),
        ("experts" if moe else "MLPs", memory.mlp, routed if moe else ""),
        ("passing", memory.passing, "logits and loss, or one layer in its backward pass"),
        ("rounding", memory.rounding, "ends of blocks: the allocator splits off 1 MiB or more"),
    ]
    return [part for part in parts if part[1] >= 0.05]


def _of_same_work(experiment: Experiment) -> list[Row]:
    """Records of runs that ended well and did what ``experiment`` does."""
    rows = collect_records(RECORDS, load_references()).rows
    return [row for row in rows if row.state == "ok" and same_work(row.experiment, experiment)]


def _of_process_gib(row: Row) -> float | None:
    """What nvidia-smi showed, without the driver's part, which some versions include."""
    shown = row.memory_gib.nvml
    return shown and shown - row.counts_driver * DRIVER_RESERVED_MIB / 1024


def _say_sum(name: str, gib: float, measured: Iterable[tuple[Row, float | None]]) -> None:
    compared = "; ".join(
        f"measured {found:.1f} on {row.gpu_name}: prediction {gib / found - 1:+.1%}"
        for row, found in measured
        if found
    )
    say(f"  {name:12}{gib:7.1f}  {compared}".rstrip(), hang=23)


def _advice(experiment: Experiment, card: Card) -> Iterator[str]:
    ways = ways_to_fit(experiment, card)[:SHOWN]
    if not ways:
        yield f"  no {MOST_CHANGES} settings make it fit: lower SEQ=, or use more GPUs"
        return
    yield "fits with"
    spelled = [
        " ".join(f"{key}={value}" for key, value in settings.items()) for settings, _ in ways
    ]
    width = max(map(len, spelled))
    for text, (_, changed) in zip(spelled, ways, strict=True):
        yield f"  {text:{width}} {predict(changed).in_all:6.1f} GiB on {_gpus(changed)}"


def _gpus(experiment: Experiment) -> str:
    return f"{experiment.world_size} GPU{'s' if experiment.world_size > 1 else ''}"
