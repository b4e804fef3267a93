"""The diagrams of docs/ that show computed or measured numbers, as SVG in light and dark.

Diagrams without such numbers are files in docs/images/, edited by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise

from harness.evidence.facts import Facts
from harness.experiment.constraints import with_changes
from harness.experiment.hardware import find_card
from harness.pages import scale
from harness.pages.drawing import MARGIN, Drawing
from harness.predict.calibrations import fitted, machine_measured_by
from harness.predict.formulas import OF_EXPERIMENT, activations_per_sbh

ROW = 30
BAR_LEFT, BAR_WIDTH = 200, 500

MEMORY = {
    "weights": "c0",
    "gradients": "c1",
    "optimizer state": "c3",
    "activations": "c2",
    "other tensors": "grey",
    "reserved by PyTorch's allocator, unused": "light",
    "CUDA context, kernels, NCCL": "dark",
}
MEMORY_SHOWN = ("101", "111", "115", "244", "304")
STEP = {
    "matrix products": "c0",
    "attention": "c4",
    "memory passes": "c2",
    "exchange": "ink",
    "launches": "grey",
    "bubble": "empty",
    "gradients": "c1",
    "stragglers": "light",
    "optimizer": "c3",
}
"""The pieces of a step, in the order in which predictions give them."""
STEP_SHOWN = ("101", "111", "248", "282", "302", "308", "408", "438", "502", "511")
RATIOS = (0.4, 1.4)
NAMED_FROM = 0.25
"""Relative error from which a dot shows its id."""


@dataclass(frozen=True)
class Bar:
    """One bar: its id and description to the left, its pieces with their classes, its sum to the
    right."""

    id: str
    description: str
    pieces: Sequence[tuple[float, str]]
    total: str


def drawings(facts: Facts) -> dict[str, str]:
    """Every diagram by file name."""
    return {f"diagram-{name}.svg": draw(facts).svg() for name, draw in DRAWINGS.items()}


def memory(facts: Facts) -> Drawing:
    """Predicted pieces of memory, then what was measured beyond them, up to an 80 GB card."""
    card_gib = find_card("h100-80gb").memory_mib / 1024
    bars = []
    for experiment in map(facts.catalog.find, MEMORY_SHOWN):
        row, total = facts.row(experiment.id), ""
        kinds = ("weights_gib", "gradients_gib", "optimizer_gib", "activations_gib")
        gib = [OF_EXPERIMENT[kind](experiment) for kind in kinds]
        if row and row.memory_gib.nvml:
            found, total = row.memory_gib, f"{row.memory_gib.nvml:.1f} GiB in use"
            levels = (sum(gib), found.allocated, found.reserved, found.nvml)
            gib += [max(upper - lower, 0) for lower, upper in pairwise(levels)]
        description = f"{experiment.layout}, MBS {experiment.micro_batch_size}"
        pieces = list(zip(gib, MEMORY.values(), strict=False))  # without a record, the first four
        bars.append(Bar(experiment.id, description, pieces, total))
    heading = "Memory of one GPU, GiB: pieces predicted, totals measured"
    drawing = _bars("Where the memory of a GPU goes", heading, bars, card_gib)
    right, bottom = BAR_LEFT + BAR_WIDTH, 46 + ROW * len(bars)
    drawing.line(right, 40, right, bottom, "ink")
    drawing.text(right - 4, 36, f"80 GB card: {card_gib:.1f}", anchor="end")
    drawing.legend(bottom + 18, MEMORY)
    return drawing


def activations(facts: Facts) -> Drawing:
    """Bytes of activations of a layer of the 22B model under each parallelism and recomputation."""
    tp8, tp8_sp, recomputed = map(facts.catalog.find, ("281", "282", "283"))
    rows = (
        ("one GPU: 34", with_changes(tp8, tp=1), "grey"),
        (f"TP {tp8.tp}: 10 + 24/t", tp8, "grey"),
        (f"TP {tp8.tp} + SP: 34/t", tp8_sp, "c2"),
        (f"TP {tp8.tp}, recomputed: 2", recomputed, "c2"),
    )
    bars = []
    for description, experiment, name in rows:
        units = activations_per_sbh(experiment)
        total = f"{units:g}: {OF_EXPERIMENT['activations_gib'](experiment):.0f} GiB"
        id_ = experiment.id if experiment.tp > 1 else ""
        bars.append(Bar(id_, description, [(units, name)], total))
    drawing = _bars(
        "Bytes of activations a layer keeps, by parallelism and recomputation",
        "Activations of a layer in units of s·b·h bytes, and of the whole 22B model at MBS 4",
        bars,
        activations_per_sbh(rows[0][1]),
    )
    drawing.text(
        MARGIN,
        46 + ROW * len(bars) + 18,
        "Korthikanti et al. 2022, table 2; scores not stored (flash attention). GiB: with logits,"
        " and one whole layer during recomputation.",
        "quiet",
    )
    return drawing


def step_shares(facts: Facts) -> Drawing:
    """Predicted shares of a step, for one published row of each kind."""
    machine = machine_measured_by(facts.references.published.name)
    bars = []
    for experiment in map(facts.catalog.find, STEP_SHOWN):
        step = machine.predict(experiment)
        shares = [ms / step.total for ms in step.pieces.values()]
        total = f"{step.total:,.0f} / {machine.row_of(experiment).measured_ms:,.0f}"
        pieces = list(zip(shares, STEP.values(), strict=True))
        bars.append(Bar(experiment.id, experiment.layout, pieces, total))
    heading = f"Predicted shares of a step on {machine.card.name}; ms predicted / published"
    drawing = _bars("Where the time of a step goes, predicted", heading, bars, 1)
    drawing.legend(46 + ROW * len(bars) + 18, STEP)
    return drawing


def step_unseen(_: Facts) -> Drawing:
    """Predicted over measured step time against measured ms, each row by constants fitted without
    its chapter."""
    drawing = Drawing(
        372, "Predicted over measured step time, by constants fitted without its chapter"
    )
    heading = "Predicted over measured step time; each row by constants fitted without its chapter"
    drawing.text(MARGIN, 28, heading, size=13)
    left, right, top, bottom = 70, 836, 46, 302
    first, last = math.log(75), math.log(4800)
    low, high = RATIOS

    def place(ms: float, ratio: float) -> tuple[float, float]:
        inside = min(max(ratio, low), high)
        x = left + (math.log(ms) - first) / (last - first) * (right - left)
        return x, bottom - (inside - low) / (high - low) * (bottom - top)

    for ratio in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4):
        _, y = place(200, ratio)
        drawing.line(left, y, right, y, "ink" if ratio == 1 else "rule")
        drawing.text(left - 8, y + 4, f"{ratio:.1f}", "quiet", anchor="end")
    for ms in (100, 200, 300, 500, 1000, 2000, 4000):
        x, _ = place(ms, 1)
        drawing.text(x, bottom + 18, f"{ms:,}", "quiet", anchor="middle")
    middle = (left + right) / 2
    drawing.text(middle, bottom + 36, "measured, ms a step", "quiet", anchor="middle")
    entries = {}
    for name, machine in zip(cycle(("c0", "c1", "c2", "c3")), fitted().values()):
        for id_, row in machine.rows.items():
            ratio = row.left_out_ms / row.measured_ms
            x, y = place(row.measured_ms, ratio)
            drawing.dot(x, y, name)
            if abs(ratio - 1) > NAMED_FROM:
                # names with settings are long: those on the right half stand to the left
                where = (x + 7, "start") if x < middle else (x - 7, "end")
                drawing.text(where[0], y + 4, id_, size=10, anchor=where[1])
        entries[f"{machine.card.name}: {len(machine.rows)} rows"] = name
    drawing.legend(358, entries)
    return drawing


DRAWINGS: dict[str, Callable[[Facts], Drawing]] = {
    "memory": memory,
    "tp-activations": activations,
    "step-shares": step_shares,
    "step-unseen": step_unseen,
    "scale": lambda _: scale.drawing(),
}


def _bars(title: str, heading: str, bars: Sequence[Bar], whole: float) -> Drawing:
    """Stacked bars, of which one of size ``whole`` is BAR_WIDTH long, with room for two lines
    below."""
    drawing = Drawing(46 + ROW * len(bars) + 46, title)
    drawing.text(MARGIN, 28, heading, size=13)
    for i, bar in enumerate(bars):
        x, y = BAR_LEFT, 46 + ROW * i
        drawing.text(MARGIN, y + 15, bar.id, size=12)
        drawing.text(MARGIN + 40, y + 15, bar.description, "quiet")
        for size, name in bar.pieces:
            width = size / whole * BAR_WIDTH
            drawing.rect(x, y, width, 22, name)
            x += width
        drawing.text(BAR_LEFT + BAR_WIDTH + 14, y + 15, bar.total)
    return drawing
