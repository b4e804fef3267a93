"""The plot of a sweep: each point's measured step time, and the predicted one with its band."""

from __future__ import annotations

from collections.abc import Sequence

from harness.pages.axes import ticks
from harness.pages.drawing import MARGIN, WIDTH, Drawing
from harness.sweep.measured import Measured

LABELS = 330
"""Pixels for the settings of a point."""
ROW, TOP, BOTTOM = 22, 56, 64
LONGEST = 42
"""Characters of a label."""


def draw(found: Sequence[Measured], title: str) -> str:
    """An SVG with a line for each point, in the order of ``found``."""
    drawn = Drawing(TOP + ROW * len(found) + BOTTOM, title)
    drawn.text(MARGIN, 28, title, size=13)
    most = max((ms for one in found for ms in _extent(one)), default=1.0)
    scale = ticks(0, most)
    left, right, bottom = MARGIN + LABELS, WIDTH - MARGIN, TOP + ROW * len(found)

    def x(ms: float) -> float:
        return left + ms / scale[-1] * (right - left)

    for at in scale:
        drawn.line(x(at), TOP - 8, x(at), bottom, "ink" if at == 0 else "rule")
        drawn.text(x(at), bottom + 16, f"{at:,g}", "quiet", anchor="middle")
    drawn.text((left + right) / 2, bottom + 32, "ms per step", "quiet", anchor="middle")
    predicted = False
    for i, one in enumerate(found):
        y = TOP + ROW * i + ROW / 2
        name = one.point.name
        shown = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        drawn.text(left - 8, y + 4, shown, "" if one.ms else "quiet", anchor="end")
        if one.predicted_ms:
            predicted, band = True, one.point.band or 0.0
            low, high = (x(one.predicted_ms * (1 + side * band)) for side in (-1, 1))
            drawn.path([(low, y), (max(high, low + 2), y)], "c1")
            drawn.rect(x(one.predicted_ms) - 1.5, y - 5, 3, 10, "c1")
        if one.ms:
            drawn.dot(x(one.ms), y, "c0")
        else:
            drawn.text(left + 6, y + 4, one.status, "quiet")
    entries = {"measured": "c0"} | ({"predicted, and its band": "c1"} if predicted else {})
    drawn.legend(bottom + 52, entries)
    return drawn.svg()


def _extent(one: Measured) -> tuple[float, ...]:
    """Every time that is drawn of a point."""
    predicted = one.predicted_ms and one.predicted_ms * (1 + (one.point.band or 0.0))
    return tuple(filter(None, (one.ms, predicted)))
