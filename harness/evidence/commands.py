"""Commands about records: tables, claims, comparisons, predictions and their calibration.

Each imports its own module: ``make memory-101`` needs none of the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness import RECORDS
from harness.run import finding


def table(settings: Mapping[str, str]) -> int:
    """Print every run with its published numbers."""
    from harness.evidence import tables

    return tables.print_table(finding.outdir(settings), RECORDS, settings)


def compare(settings: Mapping[str, str]) -> int:
    """Print two runs side by side."""
    from harness.evidence import compare

    return compare.print_compare(finding.outdir(settings), RECORDS, settings)


def claims(settings: Mapping[str, str]) -> int:
    """Print whether the numbers show what the tutorials claim."""
    from harness.evidence import verdicts

    return verdicts.print_claims(RECORDS, settings)


def record(settings: Mapping[str, str]) -> int:
    """Keep a run in experiments/records."""
    from harness.evidence import records
    from harness.run.directory import RunDir

    outdir = finding.outdir(settings)
    label = finding.label_of(settings["RUN"], outdir, lambda run: run.device == "cuda")
    print(records.record(RunDir(outdir / label), RECORDS, force=settings.get("FORCE") == "1"))
    return 0


def memory(id_: str, settings: Mapping[str, str]) -> int:
    """Predict the memory of an experiment, and whether it fits the card."""
    from harness.evidence import memory

    return memory.print_memory(id_, settings, RECORDS)


def speed(id_: str, settings: Mapping[str, str]) -> int:
    """Predict the step time of an experiment, part by part."""
    from harness.evidence import speed

    return speed.print_speed(id_, settings, RECORDS)


def faster(id_: str, settings: Mapping[str, str]) -> int:
    """Print layouts that are predicted to do the same work in less time."""
    from harness.evidence import speed

    return speed.print_faster(id_, settings)


def gpus(id_: str, settings: Mapping[str, str]) -> int:
    """Print how many GPUs the same work needs, and what more of them bring."""
    from harness.evidence import scaling

    return scaling.print_gpus(id_, settings)


def calibrate() -> int:
    """Fit the constants of the step-time formula to the records."""
    from harness.evidence import calibrate

    for name, machine in calibrate.calibrate(RECORDS).items():
        print(f"{name}: {len(machine.rows)} rows; {machine.how_sure()}")
    return 0
