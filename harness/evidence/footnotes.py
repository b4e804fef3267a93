"""Sentences below a table: the averaging window, unit, peak and source of each column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.data.data_sets import MOCK
from harness.evidence.results import ended
from harness.evidence.rows import Row, launch_rate_remark
from harness.experiment.hardware import DRIVER_RESERVED_MIB
from harness.predict.flops import MODEL_FLOPS


def footnotes(rows: Sequence[Row]) -> Iterator[str]:
    """The sentences below a table of ``rows``, all on the same hardware."""
    yield from _columns(rows)
    yield from _rates(rows)
    yield from _published(rows)
    if (found := ended(rows)).experiments:
        oom = f", {found.out_of_memory} of them out of memory" if found.out_of_memory else ""
        yield (
            f"Ended as published: {found.as_published} of the {found.experiments} with a published"
            f" row{oom}."
        )


def _columns(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.step for row in rows):
        yield (
            "ms/step: median over the steps named in column steps; ±: half their interquartile"
            " range."
        )
    if any((row.runs_on_node or 1) > 1 for row in rows):
        yield (
            "shared: runs on the node at the same time, this one included; they can slow each other"
            " down."
        )
    if any(row.memory_gib.nvml for row in rows):
        yield (
            "GiB: used memory of the fullest GPU as nvidia-smi shows it, CUDA context and NCCL"
            " included."
        )
    if any(row.counts_driver for row in rows):
        yield (
            "Runs whose result.json has no memory_gib.driver count in GiB what the driver keeps"
            f" for itself, too, {DRIVER_RESERVED_MIB / 1024:.1f} GiB of an H200; nvidia-smi leaves"
            " that out."
        )
    if any(row.step and row.predicted_step_ms for row in rows):
        yield (
            "formula: ms/step predicted from sizes, by constants fitted without its chapter (make"
            " speed-101)."
        )


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    for gpu, precision in dict.fromkeys(
        (row.gpu, row.experiment.precision) for row in rows if row.mfu
    ):
        yield (
            f"MFU = TFLOP/s / {getattr(gpu, f'{precision}_tflops'):g}, the dense {precision} peak"
            f" of {gpu.name} ({gpu.source}). TFLOP/s: per GPU, {MODEL_FLOPS}."
        )
    if any(row.tflops and not row.mfu for row in rows if row.device == "cuda"):
        yield (
            f"No MFU: harness/experiment/hardware.py has no peak of {rows[0].hardware} at the"
            " precision of these runs."
        )
    timed = [row for row in rows if row.launch and row.step]
    timed.sort(key=lambda row: row.launch.operation_us)
    if timed and (remark := launch_rate_remark(timed[-1], timed[0])):
        yield remark


def _published(rows: Sequence[Row]) -> Iterator[str]:
    compared = [row for row in rows if row.reference]
    if not compared:
        return
    group = compared[0].against
    in_doubt = any(row.reference.in_doubt for row in compared)
    yield f"Here: {rows[0].hardware}, {rows[0].software}."
    yield f"publ.: {group.hardware}, {group.software}; {group.method}. Source: {group.source}."
    doubt = " A number with ? is in doubt and gets no ratio." if in_doubt else ""
    yield f"ratio: here / publ.{doubt}"
    experiments = [row.experiment for row in compared]
    replaced = dict.fromkeys(
        experiment.published_data
        for experiment in experiments
        if experiment.data == MOCK and experiment.published_data is not None
    )
    if replaced:
        yield (
            f"data mock: synthetic tokens in place of {', '.join(replaced)}: "
            "time and memory compare, losses do not."
        )
