"""How far models scale, from benchmarks/scale.json: a table, and MFU by number of GPUs drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.evidence import markdown
from harness.evidence.predictions import MOST_PUBLISHED_GPUS
from harness.experiment.hardware import required_card
from harness.pages.drawing import MARGIN, Drawing

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.json"
LEFT, RIGHT, TOP, BOTTOM = 60, 836, 46, 282
MOST_MFU = 0.6
COLOURS = ("c0", "c1", "c2", "c3", "c4")


@cache
def results() -> Mapping[str, Any]:
    """What benchmarks/scale.py wrote."""
    return json.loads(FILE.read_text())


def number(key: str) -> str:
    """A number of the file, such as ``batch``."""
    return f"{results()[key]:,}"


def table() -> str:
    """Markdown: for each model and number of GPUs, the fastest layout and how efficient it is."""
    lines = []
    for model, points in results()["models"].items():
        for i, point in enumerate(points):
            lines.append(
                [
                    f"`{model}`" if i == 0 else "",
                    f"{point['gpus']:,}",
                    f"{point['step_ms']:,.0f}",
                    f"{point['mfu']:.0%}",
                    f"{point['tokens_per_s_gpu'] / points[0]['tokens_per_s_gpu']:.2f}",
                    f"{point['allocated_gib']:.0f}",
                    _bound(point["pieces"]),
                    point["layout"],
                ]
            )
    head = ["model", "GPUs", "ms a step", "MFU", "efficiency", "GiB", "largest pieces", "layout"]
    return markdown.table(head, lines, "lrrrrrll")


def _bound(pieces: Mapping[str, float]) -> str:
    total = sum(pieces.values())
    largest = sorted(pieces, key=pieces.__getitem__, reverse=True)[:2]
    return ", ".join(f"{name} {pieces[name] / total:.0%}" for name in largest)


def drawing() -> Drawing:
    """MFU against the number of GPUs, a line a model."""
    card = required_card(results()["card"], FILE.name)
    drawn = Drawing(352, "MFU of the fastest predicted layout, by number of GPUs")
    heading = f"MFU of the fastest predicted layout on {card.name}, by number of GPUs"
    drawn.text(MARGIN, 28, heading, size=13)
    counts = sorted({p["gpus"] for points in results()["models"].values() for p in points})
    first, last = math.log(counts[0]), math.log(counts[-1])

    def place(gpus: float, mfu: float) -> tuple[float, float]:
        x = LEFT + (math.log(gpus) - first) / (last - first) * (RIGHT - LEFT)
        return x, BOTTOM - mfu / MOST_MFU * (BOTTOM - TOP)

    for tenth in range(int(10 * MOST_MFU) + 1):
        _, y = place(counts[0], tenth / 10)
        drawn.line(LEFT, y, RIGHT, y, "ink" if tenth == 0 else "rule")
        drawn.text(LEFT - 8, y + 4, f"{tenth / 10:.0%}", "quiet", anchor="end")
    for gpus in counts:
        x, _ = place(gpus, 0)
        drawn.text(x, BOTTOM + 18, f"{gpus:,}", "quiet", anchor="middle")
    limit, _ = place(MOST_PUBLISHED_GPUS, 0)
    drawn.line(limit, TOP, limit, BOTTOM, "ink")
    drawn.text(limit - 6, TOP + 10, "published up to here", "quiet", anchor="end")
    entries = {}
    for (model, points), name in zip(results()["models"].items(), COLOURS, strict=False):
        placed = [place(point["gpus"], point["mfu"]) for point in points]
        drawn.path(placed, name)
        for x, y in placed:
            drawn.dot(x, y, name)
        entries[model] = name
    drawn.legend(332, entries)
    return drawn
