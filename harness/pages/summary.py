"""What all records show together, for the README."""

from __future__ import annotations

from statistics import median
from typing import Any

from harness.evidence import verdicts
from harness.evidence.facts import HARDWARE, Facts
from harness.evidence.results import ended
from harness.experiment.hardware import find_card
from harness.pages.result_tables import driver_remark
from harness.predict.calibrations import machine_measured_by
from harness.predict.memory import predict

CLOSE = 0.015
"""Relative difference up to which measured memory counts as equal to the published."""


def summary(facts: Facts) -> dict[str, Any] | None:
    """What the records on one kind of GPU show together, ready to print; None without
    records.

    An experiment counts once. Ratios are medians of measured over published numbers.
    ``memory_error_…`` is of predicted over allocated memory, ``step_error_…`` and
    ``published_error_…`` of step times predicted by constants fitted without its chapter.
    """
    ids = sorted({row.id for row in facts.of_hardware})
    gpus = sorted({row.experiment.world_size for row in facts.of_hardware})
    rows = [row for row in map(facts.row, ids) if row]
    memory = [row.memory_ratio for row in rows if row.memory_ratio]
    steps = [row.step_ratio for row in rows if row.step_ratio]
    if not memory or not steps:
        return None
    judged = ended(facts.of_hardware)
    machine = machine_measured_by(facts.references.published.name)
    published_median, published_90th, _ = machine.misses()
    memory_errors = [
        abs(predict(row.experiment).total / row.memory_gib.allocated - 1)
        for row in rows
        if row.state == "ok" and row.memory_gib.allocated
    ]
    step_errors = [
        abs(row.predicted_step_ms / row.step.median - 1)
        for row in rows
        if row.step and row.predicted_step_ms
    ]
    return {
        "experiments": len(ids),
        "gpus": f"{', '.join(map(str, gpus[:-1]))} and {gpus[-1]}",
        "gpu": find_card(HARDWARE).name,
        "compared": judged.experiments,
        "as_published": judged.as_published,
        "memory_ratio": f"{median(memory):.2f}",
        "memory_compared": len(memory),
        "memory_close": sum(abs(ratio - 1) <= CLOSE for ratio in memory),
        "driver": driver_remark(rows),
        "step_ratio": f"{median(steps):.2f}",
        "memory_error_median": f"{median(memory_errors):.1%}",
        "memory_error_largest": f"{max(memory_errors):.1%}",
        "step_error_median": f"{median(step_errors):.1%}",
        "published_rows": len(machine.rows),
        "published_error_median": f"{published_median:.1%}",
        "published_error_90th_percentile": f"{published_90th:.0%}",
        "claims": len(facts.claims),
        "verdicts": verdicts.counted(evaluated.sides[0] for evaluated in facts.claims),
    }
