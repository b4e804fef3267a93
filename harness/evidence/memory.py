"""What an experiment takes, by formula and beside its record, and whether it fits: ``make
memory-620``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.evidence.records import same_work
from harness.evidence.references import load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import Row
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, find_card
from harness.planning import resolved
from harness.predict.capacity import DEEPEST, available_gib, verdict, ways_to_fit
from harness.predict.memory import Memory, predict
from harness.system.screen import say

CARDS = ("h100-80gb", "h200-141gb")
"""Where there is no GPU and none is named."""
SHOWN = 4
"""Ways to fit that are printed."""


def print_memory(id_: str, settings: Mapping[str, str], records: Path) -> int:
    """Print what experiment ``id_`` with ``settings`` takes, and how it stands to ``CARD`` or the
    GPUs at hand.

    Raises UserError where the experiment or a setting makes no sense.
    """
    e = resolved.of_catalogue(id_, settings)
    memory, cards = predict(e), cards_of(e)
    say(heading(e))
    print("\nGiB of the fullest GPU, by formula")
    pieces = _pieces(e, memory)
    widest = max(gib for _, gib, _ in pieces)
    for name, gib, meaning in pieces:
        said = "; ".join(filter(None, ["the most" if gib == widest else "", meaning]))
        say(f"  {name:12}{gib:7.1f}  {said}".rstrip(), hang=23)
    rows = collect_records(records, load_references()).rows
    say(f"  {'allocated':12}{memory.total:7.1f}  {_measured(e, memory, rows)}".rstrip(), hang=23)
    for card in cards:
        judged = verdict(memory, card)
        print(f"\n{card.name}, {available_gib(card):.1f} GiB beside CUDA and NCCL: {judged}")
        if judged != "fits":
            print(*_advice(e, card), sep="\n")
    return 0


def heading(e: Experiment) -> str:
    """What is asked about: label, model, layout, GPUs."""
    return f"{e.label}: {e.model.name}, {e.layout}" + (f", {_gpus(e)}" if e.world_size > 1 else "")


def _pieces(e: Experiment, memory: Memory) -> list[tuple[str, float, str]]:
    recomputed = "inputs of recomputed layers" if e.recompute == "full" else ""
    experts = (
        "of tokens that routers deal out evenly; else the fullest GPU has more"
        if e.model.num_experts
        else ""
    )
    pieces = [
        ("weights", memory.weights, "with their fp8 copies" if e.precision == "fp8" else ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        (
            "attention",
            memory.attention,
            recomputed or "what it keeps for the backward pass, of all layers",
        ),
        ("experts" if e.model.num_experts else "MLPs", memory.mlp, experts),
        ("passing", memory.passing, "logits and loss, or a layer on its way back"),
    ]
    return [piece for piece in pieces if piece[1] >= 0.05]


def _measured(e: Experiment, memory: Memory, rows: Sequence[Row]) -> str:
    kept = [
        row
        for row in rows
        if same_work(row.experiment, e) and row.memory_gib and row.memory_gib.allocated
    ]
    return "; ".join(
        f"measured {row.memory_gib.allocated:.1f} on {row.gpu_name}, off by "
        f"{memory.total / row.memory_gib.allocated - 1:+.1%}"
        for row in kept
        if row.state == "ok"
    )


def _advice(e: Experiment, card: Card) -> Iterator[str]:
    ways = ways_to_fit(e, card)
    if not ways:
        yield f"  no {DEEPEST} settings make it fit: a smaller SEQ=, or more GPUs"
        return
    yield "what fits"
    lines = [
        (" ".join(f"{key}={value}" for key, value in settings.items()), changed)
        for settings, changed in ways[:SHOWN]
    ]
    width = max(len(words) for words, _ in lines)
    for words, changed in lines:
        yield f"  {words:{width}} {predict(changed).total:6.1f} GiB on {_gpus(changed)}"


def cards_of(e: Experiment) -> list[Card]:
    """What ``e`` is judged by: ``CARD``, or the GPUs here, or else those of CARDS."""
    from harness.machine.gpus import list_gpus

    names = [e.card] if e.card else sorted({gpu.name for gpu in list_gpus()}) or CARDS
    return [gpu for name in names if (gpu := find_card(name))] or [
        gpu for name in CARDS if (gpu := find_card(name))
    ]


def _gpus(e: Experiment) -> str:
    return f"{e.world_size} GPU{'s' if e.world_size > 1 else ''}"
