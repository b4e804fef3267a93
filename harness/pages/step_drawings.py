"""Two diagrams of what steps take: where the time goes by formula, and how far off it is for rows
it had not seen."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING

from harness.pages.diagrams import (
    ACTIVATIONS,
    CONTEXT,
    GRADIENTS,
    INK,
    OPTIMIZER,
    OTHER,
    QUIET,
    RANKS,
    RULE,
    SENT,
    WEIGHTS,
    Drawing,
)
from harness.predict.calibrations import fitted, machine_measured_by

if TYPE_CHECKING:
    from harness.evidence.facts import Facts

COLOURS = {
    "products": WEIGHTS,
    "attention": "#76b7b2",
    "passes": ACTIVATIONS,
    "exchange": SENT,
    "launches": OTHER,
    "bubble": "#d8dde3",
    "gradients": GRADIENTS,
    "optimizer": OPTIMIZER,
}
WORDS = {
    name: {"products": "matrix products", "passes": "memory passes"}.get(name, name)
    for name in COLOURS
}
SHOWN = ("101", "111", "248", "282", "302", "308", "408", "438", "502", "511")
RANGE = (0.7, 1.35)


def shares(facts: Facts) -> Drawing:
    """Published rows, one of each kind: the shares of a step by formula."""
    machine = machine_measured_by(facts.references.published.name)
    d = Drawing(860, 62 + 30 * len(SHOWN) + 46, "Where the time of a step goes, by formula")
    d.head(
        24,
        28,
        f"Shares of a step on {machine.card.name}, by formula; on the right ms, by formula and as"
        " published",
    )
    x0, width = 200, 500
    for i, id_ in enumerate(SHOWN):
        e, y = facts.catalog.find(id_), 46 + 30 * i
        step, x = machine.predict(e), x0
        d.text(24, y + 15, id_, bold=True)
        d.text(64, y + 15, e.layout, size=11, colour=QUIET)
        for name, ms in step.pieces.items():
            share = width * ms / step.total
            d.rect(x, y, share, 22, COLOURS[name])
            x += share
        d.text(
            x0 + width + 14,
            y + 15,
            f"{step.total:,.0f} / {machine.row_of(e).measured_ms:,.0f}",
            size=11,
        )
    bottom = 46 + 30 * len(SHOWN)
    d.legend(24, bottom + 18, [(COLOURS[name], WORDS[name]) for name in list(COLOURS)[:4]])
    d.legend(24, bottom + 36, [(COLOURS[name], WORDS[name]) for name in list(COLOURS)[4:]])
    return d


def unseen(facts: Facts) -> Drawing:
    """Every row: measured ms to the right, upwards what constants fitted without it predict over
    what was measured."""
    d = Drawing(860, 372, "Predicted over measured, by constants that had not seen the row")
    d.head(24, 28, "Predicted over measured step time; each row by constants fitted without it")
    left, right, top, bottom = 70, 836, 46, 302
    low, high = math.log(120), math.log(3200)

    def place(ms: float, ratio: float) -> tuple[float, float]:
        at = (min(max(ratio, RANGE[0]), RANGE[1]) - RANGE[0]) / (RANGE[1] - RANGE[0])
        return left + (math.log(ms) - low) / (high - low) * (right - left), bottom - at * (
            bottom - top
        )

    for ratio in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        _, y = place(200, ratio)
        d.line(left, y, right, y, INK if ratio == 1 else RULE)
        d.text(left - 8, y + 4, f"{ratio:.1f}", size=11, colour=QUIET, anchor="end")
    for ms in (150, 200, 300, 500, 1000, 2000, 3000):
        x, _ = place(ms, 1)
        d.text(x, bottom + 18, f"{ms:,}", size=11, colour=QUIET, anchor="middle")
    d.text(
        (left + right) / 2,
        bottom + 36,
        "measured, ms a step",
        size=11,
        colour=QUIET,
        anchor="middle",
    )
    entries = []
    for colour, machine in zip(cycle(RANKS), fitted().values()):
        for name, row in machine.rows.items():
            ratio = row.left_out_ms / row.measured_ms
            x, y = place(row.measured_ms, ratio)
            d.dot(x, y, colour)
            if abs(ratio - 1) > 0.12:
                d.text(x + 7, y + 4, name, size=10, colour=CONTEXT)
        entries.append((colour, f"{machine.card.name}: {len(machine.rows)} rows"))
    d.legend(left, 358, entries)
    return d


DRAWINGS = {"step-shares": shares, "step-unseen": unseen}
