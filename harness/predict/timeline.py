"""Pipeline schedules: which stage computes which micro-batch when, simulated from pass times.

1F1B and interleaved 1F1B, in the order of upstream's megatron/core/pipeline_parallel/schedules.py
(core_v0.19.0). Sending costs no time here, so that idle time is the bubble of Narayanan et al.
2021 (arXiv:2104.04473), section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from harness.errors import UserError, indivisible

Direction = Literal["forward", "backward"]
Shares = tuple[tuple[float, ...], ...]
"""Parts of a whole that sum to 1, for each stage: [stage][chunk]."""
FILLING = 4
"""Groups of micro-batches that are simulated first."""


class ChunkPass(NamedTuple):
    """One micro-batch through one chunk (virtual stage) of a pipeline stage; counted from 0."""

    micro_batch: int
    chunk: int
    kind: Direction


class Span(NamedTuple):
    """``work`` on ``stage`` from ``start`` to ``end``, in the unit of the simulated times."""

    stage: int
    work: ChunkPass
    start: float
    end: float


@dataclass(frozen=True)
class Times:
    """Times of one micro-batch through all layers of each stage: a number a stage, in any unit."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    shares: Shares | None = None
    """What of its stage's times each chunk takes; None: all chunks the same."""

    @classmethod
    def alike(cls, stages: int, forward: float = 1.0, backward: float = 2.0) -> Times:
        """Equal stages. A backward pass has twice the matrix products of a forward one."""
        return cls((forward,) * stages, (backward,) * stages)


@dataclass(frozen=True)
class Timeline:
    """A simulated step: every span, stage by stage in the order of execution."""

    stages: int
    chunks: int
    micro_batches: int
    spans: tuple[Span, ...]

    @cached_property
    def end(self) -> float:
        """When the last stage is done."""
        return max(span.end for span in self.spans)

    @cached_property
    def bubble_fraction(self) -> float:
        """Idle time over ideal time, (end - busy) / busy of the busiest stage.

        With equal stages it is (p-1)/m, or (p-1)/(v m) with v chunks a stage.
        Source: Narayanan et al. 2021, section 2.2, "t_pb / t_id".
        """
        busy = [0.0] * self.stages
        for span in self.spans:
            busy[span.stage] += span.end - span.start
        return self.end / max(busy) - 1

    def of_stage(self, stage: int) -> tuple[Span, ...]:
        """The spans of one stage, in time."""
        return tuple(span for span in self.spans if span.stage == stage)


def bubble_fraction(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle over ideal time by formula: (p-1)/(v m). Source: Narayanan et al. 2021, section 2.2."""
    return (stages - 1) / (chunks * micro_batches)


def order(stage: int, stages: int, micro_batches: int, chunks: int = 1) -> tuple[ChunkPass, ...]:
    """What ``stage`` runs, in order: forwards to warm up, then one forward one backward, the rest.

    Source: get_pp_rank_microbatches and get_schedule_table, with micro-batches in groups of
    ``stages``, upstream's default.

    Raises:
        UserError: upstream has no interleaved schedule for these sizes.
    """
    _check(stages, micro_batches, chunks)
    table = _table(stages, micro_batches, chunks)
    forward = [ChunkPass(b, c, "forward") for b, c in table]
    backward = [ChunkPass(b, chunks - 1 - c, "backward") for b, c in table]
    warm_up = min(warm_up_passes(stage, stages, chunks), len(forward))
    steady = [work for pair in zip(forward[warm_up:], backward, strict=False) for work in pair]
    return (*forward[:warm_up], *steady, *backward[len(forward) - warm_up :])


def warm_up_passes(stage: int, stages: int, chunks: int = 1) -> int:
    """Forward passes that ``stage`` runs before its first backward pass, given enough of them.

    Source: get_pp_rank_microbatches.
    """
    after = stages - 1 - stage
    return after if chunks == 1 else 2 * after + (chunks - 1) * stages


@lru_cache(maxsize=4096)
def most_in_flight(
    stage: int, stages: int, micro_batches: int, sizes: tuple[float, ...]
) -> tuple[int, ...]:
    """The chunks of ``stage``, one a forward pass, whose activations it keeps when they are most.

    A pass's activations are kept from its forward to its backward pass (Narayanan et al. 2021,
    section 2.2).

    Args:
        sizes: how much one micro-batch leaves in each chunk of the stage.
    """
    # a group of ``stages`` micro-batches warms up, then each repeats what the one before did
    enough = min(micro_batches, 3 * stages)
    kept: list[int] = []
    held = most = 0.0
    fullest: tuple[int, ...] = ()
    for _, chunk, kind in order(stage, stages, enough, len(sizes)):
        if kind == "backward":
            kept.remove(chunk)
            held -= sizes[chunk]
            continue
        kept.append(chunk)
        held += sizes[chunk]
        if held > most or not fullest:
            most, fullest = held, tuple(kept)
    return fullest


def simulate(micro_batches: int, times: Times, chunks: int = 1) -> Timeline:
    """Run the schedule: every pass starts as soon as its stage is free and its input is there.

    Raises:
        UserError: upstream has no interleaved schedule for these sizes.
    """
    stages = len(times.forward)
    plan, durations = _plan(stages, micro_batches, chunks), _durations(times, chunks)
    spans = []
    for planned, end in zip(plan, _ends(plan, durations), strict=True):
        kind, micro_batch = divmod(planned.work, micro_batches)
        back, chunk = divmod(kind, chunks)
        work = ChunkPass(micro_batch, chunk, "backward" if back else "forward")
        spans.append(Span(planned.stage, work, end - durations[planned.kind], end))
    spans.sort(key=lambda span: (span.stage, span.start))
    return Timeline(stages, chunks, micro_batches, tuple(spans))


def duration(micro_batches: int, times: Times, chunks: int = 1) -> float:
    """``simulate(…).end``, without the spans. Raises UserError as ``simulate``.

    A group is as many micro-batches as there are stages. Once all passes are as much later as those
    a group before, for as long as a pass may wait for another, so are those of every further group:
    these are not simulated.
    """
    stages, groups, durations = len(times.forward), FILLING, _durations(times, chunks)
    _check(stages, micro_batches, chunks)
    while 2 * (few := micro_batches % stages + groups * stages) < micro_batches:
        plan = _plan(stages, few, chunks)
        ends = _ends(plan, durations)
        if group := _of_group(plan, ends, stages, chunks):
            return max(ends) + (micro_batches - few) / stages * group
        groups *= 2
    return max(_ends(_plan(stages, micro_batches, chunks), durations))


def _of_group(
    plan: Sequence[_Planned], ends: Sequence[float], stages: int, chunks: int
) -> float | None:
    """How much later passes are than those a group before; None where not all are as much."""
    of_stage: list[list[float]] = [[] for _ in range(stages)]
    for planned, end in zip(plan, ends, strict=True):
        of_stage[planned.stage].append(end)
    group, compared, later = 2 * stages * chunks, 2 * warm_up_passes(0, stages, chunks) + 2, []
    for stage, own in enumerate(of_stage):
        warm_up = warm_up_passes(stage, stages, chunks)
        steady = own[warm_up : len(own) - warm_up]
        if len(steady) < group + compared:
            return None
        last = zip(steady[-compared - group :], steady[-compared:], strict=False)
        later += [end - before for before, end in last]
    return max(later) if max(later) - min(later) < 1e-9 * max(ends) else None


class _Planned(NamedTuple):
    """A pass in the plan, with the places of the passes that it waits for, counted from 1."""

    stage: int
    kind: int
    """Place of its duration: the stage's chunks forward, then backward, then the next stage's."""
    work: int
    """Which pass of the stage: chunks forward, then backward, each with all micro-batches."""
    before: int
    """The same stage's last pass; 0: none."""
    source: int
    """The pass whose result is its input; 0: none."""


@lru_cache(maxsize=64)
def _plan(stages: int, micro_batches: int, chunks: int) -> tuple[_Planned, ...]:
    """All passes, each behind those it waits for; the order does not depend on times."""
    all_forward, last_stage = chunks * micro_batches, stages - 1
    queues = [
        [
            (work.chunk + chunks * (work.kind == "backward")) * micro_batches + work.micro_batch
            for work in reversed(order(stage, stages, micro_batches, chunks))
        ]
        for stage in range(stages)
    ]
    plan: list[_Planned] = []
    last = [0] * stages
    places = [[0] * (2 * all_forward + 1) for _ in range(stages)]  # the last: of no pass

    def source_of(stage: int, work: int) -> tuple[int, int]:
        """The stage and pass whose result is the input."""
        if work < all_forward:
            if stage:
                return stage - 1, work
            return (last_stage, work - micro_batches) if work >= micro_batches else (0, -1)
        if stage < last_stage:
            return stage + 1, work
        if work < 2 * all_forward - micro_batches:
            return 0, work + micro_batches
        return stage, work - all_forward

    while any(queues):
        before = len(plan)
        for stage, queue in enumerate(queues):
            place = places[stage]
            while queue:
                work = queue[-1]
                other, input_ = source_of(stage, work)
                source = places[other][input_]
                if not source and input_ >= 0:
                    break
                queue.pop()
                kind = 2 * chunks * stage + work // micro_batches
                plan.append(_Planned(stage, kind, work, last[stage], source))
                last[stage] = place[work] = len(plan)
        assert len(plan) > before, "the schedule waits for itself"
    return tuple(plan)


def _ends(plan: Sequence[_Planned], durations: Sequence[float]) -> list[float]:
    """When each pass of the plan ends."""
    ends = [0.0]
    for _, kind, _, before, source in plan:
        free, there = ends[before], ends[source]
        ends.append((free if free > there else there) + durations[kind])
    return ends[1:]


def _durations(times: Times, chunks: int) -> list[float]:
    """Time of one micro-batch through each chunk, as ``_Planned.kind`` counts them."""
    shares = times.shares or ((1 / chunks,) * chunks,) * len(times.forward)
    stages = zip(times.forward, times.backward, shares, strict=True)
    return [
        whole * share
        for forward, backward, of_stage in stages
        for whole in (forward, backward)
        for share in of_stage
    ]


def _table(stages: int, micro_batches: int, chunks: int) -> Sequence[tuple[int, int]]:
    """(micro-batch, chunk) of the forward passes: groups of ``stages`` through all chunks."""
    return [
        (b, c)
        for first in range(0, micro_batches, stages)
        for c in range(chunks)
        for b in range(first, min(first + stages, micro_batches))
    ]


def _check(stages: int, micro_batches: int, chunks: int) -> None:
    if chunks == 1:
        return
    if stages == 1:
        raise UserError(f"VPP={chunks} interleaves pipeline stages, but PP=1; set PP > 1 or VPP=1")
    if broken := indivisible("micro-batches", micro_batches, "PP", stages):
        raise UserError(
            f"{broken} when VPP > 1; try {-(-micro_batches // stages) * stages} micro-batches, or"
            " VPP=1"
        )
