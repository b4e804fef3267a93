"""What the points of a sweep measured, compared with the row as it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from harness.evidence import loss_noise
from harness.evidence.best import ARITHMETIC
from harness.evidence.references import load_references
from harness.evidence.results import collect_runs
from harness.evidence.rows import Row, losses
from harness.experiment import identity
from harness.launching.chapter import HAS_RESULT, ExperimentOutcome
from harness.machine import gpus
from harness.sweep.points import Point
from harness.sweep.request import SweepRequest

NOT_RUN = "not run"


@dataclass(frozen=True)
class Measured:
    """A point with its run.

    Attributes:
        row: the run; None: there is none.
        why: what kept it from running.
        base: that of the row as it stands, where it was measured.
    """

    point: Point
    row: Row | None
    why: str = ""
    base: Measured | None = None

    @property
    def status(self) -> str:
        return self.row.state if self.row else NOT_RUN

    @property
    def ms(self) -> float | None:
        """Median step time; None where the run did not end ok."""
        return (
            self.row.step.median if self.row and self.row.state == "ok" and self.row.step else None
        )

    @property
    def tokens_per_s(self) -> float | None:
        return self.point.tokens / self.ms * 1e3 if self.ms else None

    @property
    def ratio(self) -> float | None:
        """Tokens a second over those of the row as it stands."""
        if not self.base or not self.base.tokens_per_s or not self.tokens_per_s:
            return None
        return self.tokens_per_s / self.base.tokens_per_s

    @property
    def predicted_ms(self) -> float | None:
        """None on a CPU too, whose miniature is not what was predicted."""
        return self.point.step_ms if self.point.plan.device == "cuda" else None

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to what was measured."""
        return self.predicted_ms / self.ms - 1 if self.predicted_ms and self.ms else None

    @property
    def gib(self) -> float | None:
        """Peak of the fullest GPU as nvidia-smi shows it; of a miniature, of its largest rank."""
        if not self.row:
            return None
        memory = self.row.memory_gib
        return memory.nvml or memory.reserved or memory.rss

    @property
    def shared_node(self) -> bool:
        """Whether other runs shared the node: their launches and memory traffic can slow it."""
        return bool(self.row and self.row.result and self.row.result.packed_with)

    @cached_property
    def losses(self) -> dict[int, float]:
        return losses(self.row) if self.row else {}

    @cached_property
    def losses_apart(self) -> float | None:
        """Mean relative difference of its losses to the base's; None where one has none."""
        if not self.base or self.point.is_row or not self.ms:
            return None
        return loss_noise.apart(self.losses, self.base.losses)

    @property
    def losses_differ(self) -> bool:
        """Whether they differ by more than runs that compute the same."""
        apart = self.losses_apart
        if apart is None:
            return False
        here, there = self.point.plan.experiment, self.base.point.plan.experiment
        return apart > loss_noise.most(here, there)

    @property
    def arithmetic(self) -> tuple[str, ...]:
        """Settings that make it compute something else than the row, such as ``FP8``."""
        if not self.base:
            return ()
        here, there = self.point.plan.experiment, self.base.point.plan.experiment
        return tuple(
            one.setting for one in identity.differences(there, here) if one.setting in ARITHMETIC
        )


def measured(
    request: SweepRequest,
    points: Sequence[Point],
    outcomes: Mapping[str, ExperimentOutcome] | None = None,
) -> list[Measured]:
    """The points with their runs in OUTDIR: the fastest first, then those that did not end ok.

    A point may have run for another command: the newest run of the same experiment on this kind of
    device counts, with a result before without one.

    Args:
        outcomes: of the batch, by name of a point: why some did not run.
    """
    rows = _rows_by_key(request)
    found = []
    for point in points:
        outcome = (outcomes or {}).get(point.name)
        row = max(rows.get(point.key, ()), key=_preference, default=None)
        found.append(Measured(point, row, outcome.note if outcome and not row else ""))
    if base := next((one for one in found if one.point.is_row and one.ms), None):
        found = [replace(one, base=base) for one in found]
    return sorted(found, key=lambda one: (one.ms or math.inf, one.status, one.point.speed_rank))


def best(found: Sequence[Measured]) -> Measured | None:
    """The one with most tokens a second; None where none was measured."""
    return max((one for one in found if one.ms), key=lambda one: one.tokens_per_s, default=None)


def _rows_by_key(request: SweepRequest) -> dict[str, list[Row]]:
    here = next((gpu.name for gpu in gpus.list_gpus()), None)
    found: dict[str, list[Row]] = {}
    for row in collect_runs(request.outdir, load_references()).rows:
        if row.id != request.row.id or row.device != request.device or row.state == "running":
            continue
        if row.result and (row.result.mixed or (here and row.result.gpu not in (here, None))):
            continue
        key = identity.frozen(row.experiment).model_dump_json()
        found.setdefault(key, []).append(row)
    return found


def _preference(row: Row) -> tuple[bool, float]:
    return row.state in HAS_RESULT, row.result.started if row.result else 0.0
