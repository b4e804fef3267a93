"""One run or record with the published result of the same work: a row of every table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from harness.evidence import records
from harness.evidence.references import Published, Reference, ReferenceGroup
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, find_card, peak_tflops
from harness.experiment.overrides import command_of, is_same_work
from harness.predict import rates
from harness.predict.calibrations import Machine, machine_of
from harness.predict.flops import mfu
from harness.predict.step_time import unknown
from harness.run import directory, schema, step_statistics
from harness.run.schema import (
    LaunchRate,
    MemoryGib,
    Result,
    Spread,
    State,
    StepMetrics,
    Upstream,
    Validation,
)
from harness.system.files import text_lines


@dataclass(frozen=True)
class Row:
    """A run or a record, with the published result of the same work."""

    label: str
    experiment: Experiment
    state: State
    device: str
    origin: Path
    """The run directory, or the record's file."""
    kind: Literal["run", "record"]
    gpu_name: str | None = None
    result: Result | None = None
    steps_done: int = 0
    published: Published | None = None
    against: ReferenceGroup | None = None
    upstream: Upstream | None = None
    """The Megatron-LM it runs; None where that is not known yet."""
    launch: LaunchRate | None = None
    """How fast its slowest rank launched; None for runs older than this measurement."""
    gpu_uuids: frozenset[str] = frozenset()
    """Those that it ran on; none where older runs did not say."""

    @property
    def id(self) -> str:
        return self.experiment.id

    @property
    def hardware(self) -> str:
        """Rows of different hardware never share a table."""
        if self.experiment.miniature:
            return "CPU miniature"
        return "CPU" if self.device == "cpu" else self.gpu_name or "GPU of unknown model"

    @property
    def software(self) -> str:
        """The name of its Megatron-LM. Rows of different ones never share a table."""
        return upstream_name(self.upstream) if self.upstream else "Megatron-LM of unknown version"

    @cached_property
    def gpu(self) -> Card | None:
        return find_card(self.gpu_name) if self.gpu_name else None

    @property
    def reference(self) -> Reference | None:
        return self.published.reference if self.published else None

    @property
    def certain_reference(self) -> Reference | None:
        """The reference, unless it is in doubt what it measured."""
        return None if self.reference is None or self.reference.in_doubt else self.reference

    @property
    def step(self) -> Spread | None:
        """Step time in ms over the averaging window."""
        return self.result.step_ms if self.result else None

    @property
    def validation(self) -> Validation | None:
        """The last evaluation on held-out data."""
        return self.result.validation if self.result else None

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last step of the averaging window."""
        return self.result.window if self.result else None

    @property
    def memory_gib(self) -> MemoryGib:
        """Peak memory of the fullest rank."""
        return self.result.memory_gib if self.result else MemoryGib()

    @property
    def counts_driver(self) -> bool:
        """Whether its used memory includes the driver's own, which nvidia-smi leaves out."""
        return self.memory_gib.nvml is not None and self.memory_gib.driver is None

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s per GPU, also for older runs, whose results state upstream's count."""
        return step_statistics.model_tflops(self.experiment, self.result) if self.result else None

    @property
    def peak_tflops(self) -> float | None:
        """Dense peak of one GPU at the run's precision."""
        if self.experiment.miniature or not self.gpu_name:
            return None
        return peak_tflops(self.gpu_name, self.experiment.precision)

    @property
    def mfu(self) -> float | None:
        return mfu(self.tflops, self.peak_tflops) if self.tflops and self.peak_tflops else None

    @property
    def memory_ratio(self) -> float | None:
        """Memory over the published memory."""
        reference = self.certain_reference
        return self._ratio(self.memory_gib.nvml, reference and reference.memory_gib)

    @property
    def step_ratio(self) -> float | None:
        """Step time over the published step time."""
        reference = self.certain_reference
        return self._ratio(self.step and self.step.median, reference and reference.step_ms)

    @cached_property
    def predicted_step_ms(self) -> float | None:
        """Step time by formula on its GPU and host (``predicted_step_ms``)."""
        machine = machine_of(self.gpu) if self.gpu else None
        if machine and self.kind == "record":
            row = machine.rows.get(self.origin.stem)
            if row and (row.make or self.origin.stem) == command_of(self.experiment):
                return row.left_out_ms
        return predicted_step_ms(self.experiment, machine, self.operation_us)

    @property
    def runs_on_node(self) -> int | None:
        """Number of runs on the node, this one included; None where that is not known."""
        return len(self.result.packed_with) + 1 if self.result else None

    @property
    def comparable(self) -> bool:
        """Whether it may share a line with others.

        It must have finished or run out of memory, at full size on GPUs, with its work unchanged.
        """
        whole = (
            self.device == "cuda"
            and not self.experiment.miniature
            and is_same_work(self.experiment)
        )
        return whole and self.state in ("ok", "oom") and not (self.result and self.result.mixed)

    @property
    def as_published(self) -> bool | None:
        """Whether it ended as the published run did: complete, or out of memory.

        None where that cannot be said: there is no certain reference; the run has not ended or was
        stopped from outside; or the card's memory differs from the published card's and decided.
        """
        reference = self.certain_reference
        if not reference or self.state in ("running", "killed"):
            return None
        if self.state not in ("ok", "oom"):
            return False
        if (self.state == "oom") == reference.oom:
            return True
        here, there = self.memory_mib, find_card(self.against.gpu).memory_mib
        by_memory = here is not None and (here < there if self.state == "oom" else here > there)
        return None if by_memory else False

    @property
    def other_memory_decided(self) -> bool:
        """Whether it ended unlike the published run because its card has less, or more, memory."""
        certain = self.certain_reference and self.state in ("ok", "oom")
        return bool(certain) and self.as_published is None

    @property
    def memory_mib(self) -> int | None:
        """Memory of the card: the emulated one where there is one."""
        card = find_card(self.experiment.card) if self.experiment.card else self.gpu
        return card.memory_mib if card else None

    @property
    def preference(self) -> tuple[bool, bool, bool, bool, float, float]:
        """Key by which the best of several rows of one experiment is the largest.

        Full size before a miniature, unchanged work, success, the whole card, the host that
        launched faster, then the latest.
        """
        experiment, started = self.experiment, self.result.started if self.result else 0.0
        return (
            not experiment.miniature,
            is_same_work(experiment),
            self.state == "ok",
            not experiment.card,
            -self._launch_class,
            started,
        )

    @property
    def _launch_class(self) -> int:
        """Larger for a slower host; the same for hosts that are alike."""
        if self.operation_us is None:
            return 0
        return round(math.log(self.operation_us, rates.SAME_LAUNCH_RATE))

    @cached_property
    def operation_us(self) -> float | None:
        """Host time of an operation in µs: as the run measured it, or as ``make calibrate`` fitted
        it to the runs of its day."""
        if self.launch:
            return self.launch.operation_us
        machine = machine_of(self.gpu) if self.gpu else None
        if machine is None or self.result is None:
            return None
        return machine.launch_us.get(records.day_of(self.result.started))

    @property
    def sitting(self) -> records.Sitting:
        """When and where it ran; only of rows with a result."""
        operation_us = self.launch and self.launch.operation_us
        return records.Sitting(self.result.started, operation_us, self.gpu_uuids)

    def _ratio(self, ours: float | None, published: float | None) -> float | None:
        return ours / published if ours and published and self.state == "ok" else None


def upstream_name(upstream: Upstream) -> str:
    """The name of a Megatron-LM: ``Megatron-LM core 0.19.1``.

    Its commit is in the record; a tree that travelled without Git does not know it.
    """
    if upstream.version:
        return f"Megatron-LM core {upstream.version}"
    return f"Megatron-LM of commit {(upstream.commit or '?')[:7]}"


def metrics(row: Row) -> tuple[StepMetrics, ...]:
    """Every complete line of the run's metrics.jsonl, or of the record's NAME.metrics.jsonl."""
    if row.kind == "run":
        return directory.RunDir(row.origin).read_metrics()
    lines = text_lines(records.metrics_of(row.origin))
    return tuple(filter(None, map(schema.parse_metrics, lines)))


def losses(row: Row) -> dict[int, float]:
    """Training loss by step."""
    return {step.step: step.loss for step in metrics(row) if step.loss is not None}


def predicted_step_ms(
    experiment: Experiment, machine: Machine | None, operation_us: float | None = None
) -> float | None:
    """Step time by formula (step_time.py); None where no formula covers the experiment.

    Where the experiment calibrated the machine, the constants are those fitted without it, unless
    the host, which takes ``operation_us`` an operation, is another one.
    """
    if machine is None or experiment.miniature or unknown(experiment):
        return None
    if operation_us is None and (row := machine.row_of(experiment)):
        return row.left_out_ms
    return machine.predict(experiment, operation_us).total


def launch_rate_remark(here: Row, there: Row) -> str | None:
    """How much slower or faster one run's host launched; None where rates are alike or unknown."""
    if not here.launch or not there.launch:
        return None
    if rates.launch_alike(here.launch.operation_us, there.launch.operation_us):
        return None
    ratio = here.launch.operation_us / there.launch.operation_us
    pace = f"{ratio:.1f} x slower" if ratio > 1 else f"{1 / ratio:.1f} x faster"
    return (
        f"The host of {here.label} launched operations {pace} than that of {there.label} "
        f"({here.launch.operation_us:.1f} and {there.launch.operation_us:.1f} µs each): "
        "a launch-bound step differs by as much; CUDA_GRAPHS=1 hides it."
    )
