"""Where the time of a traced step goes: each moment counts once, so that the parts add up to it.

A moment belongs to the compute kernel that runs then, else to communication, which is then exposed,
else to a copy; else the GPU is idle. Communication while a compute kernel runs is hidden and has
no time of its own. A GPU is idle and *launch-bound* until the call that launches the next kernel
returns: it waits for the CPU. Other idle moments lie between the launch of a kernel and its start:
launch latency, or a wait for another stream. An idle moment belongs to the phase of the kernel
that ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel

from harness.profiling.kernels import COMPUTE, Category
from harness.profiling.trace import REST, Activity, Range, Trace

PRIORITY = {category: number for number, category in enumerate(Category)}
PHASES = ("forward", "backward", "optimizer", REST)
LONGEST_NAME = 160
LEAST_SHARE = 0.0005
"""``RankProfile.kernels`` lists kernels with this share of a step or more, and unknown ones."""


class Kernel(BaseModel, frozen=True, extra="ignore"):
    """All calls of one kernel or operator: time in ms and number, both per step.

    They may overlap others.
    """

    name: str
    category: Category
    ms: float
    calls: float


class Pass(BaseModel, frozen=True, extra="ignore"):
    """One forward or backward pass of a micro-batch through a rank's layers.

    ``ms`` is its busy time, the mean of ``calls`` passes.
    """

    ms: float
    calls: float


class RankProfile(BaseModel, frozen=True, extra="ignore"):
    """The traced steps of one rank; every time is in ms per step.

    ``categories`` add up to ``step_ms``, and so do ``phases``. ``communication_ms`` is the time
    with any communication, ``hidden_ms`` the part of it with a compute kernel at the same time.
    """

    rank: int
    coordinates: dict[str, int] = {}
    device: str
    steps: int
    step_ms: float
    categories: dict[Category, float]
    phases: dict[str, float]
    communication_ms: float
    hidden_ms: float
    forward_pass: Pass | None = None
    backward_pass: Pass | None = None
    kernels: tuple[Kernel, ...]

    @property
    def unknown(self) -> tuple[Kernel, ...]:
        """The kernels that no pattern of kernels.yaml matches, the longest first."""
        return tuple(kernel for kernel in self.kernels if kernel.category == Category.OTHER)


class Slice(NamedTuple):
    """A stretch of a step in which the same activities run; times in us."""

    start: float
    end: float
    owner: Activity | None
    """The activity that it counts for; None: idle."""
    next: Activity | None
    """The activity that ends it if it is idle."""
    communicates: bool


def summarise(trace: Trace, rank: int, coordinates: dict[str, int] | None = None) -> RankProfile:
    """The profile of ``rank``: means over the steps of ``trace``."""
    categories, phases, busy = Counter(), Counter(), Counter()
    communication = hidden = 0.0
    for step in trace.steps:
        for piece in cut(trace.activities, step):
            length, phase = piece.end - piece.start, (piece.owner or piece.next or _NOTHING).phase
            phases[phase] += length
            if piece.owner:
                categories[piece.owner.category] += length
                busy[phase] += length
            else:
                waits = _launch_bound(piece, trace.device)
                categories[Category.LAUNCH_BOUND] += waits
                categories[Category.IDLE] += length - waits
            if piece.communicates:
                communication += length
                hidden += length if piece.owner.category in COMPUTE else 0.0
    per_step_ms = 1e-3 / len(trace.steps)
    step_ms = sum(step.end - step.start for step in trace.steps) * per_step_ms
    return RankProfile(
        rank=rank,
        coordinates=coordinates or {},
        device=trace.device,
        steps=len(trace.steps),
        step_ms=step_ms,
        categories={category: categories[category] * per_step_ms for category in Category},
        phases={phase: phases[phase] * per_step_ms for phase in PHASES},
        communication_ms=communication * per_step_ms,
        hidden_ms=hidden * per_step_ms,
        forward_pass=_pass("forward", busy, trace),
        backward_pass=_pass("backward", busy, trace),
        kernels=_kernels(trace, step_ms),
    )


def cut(activities: tuple[Activity, ...], step: Range) -> Iterator[Slice]:
    """``step`` cut where an activity begins or ends; the slices cover it without gap or overlap."""
    clipped = [(max(a.start, step.start), min(a.end, step.end), a) for a in activities]
    inside = [(start, end, a) for start, end, a in clipped if start < end]
    moments = [(start, True, a) for start, _, a in inside] + [
        (end, False, a) for _, end, a in inside
    ]
    running: list[Activity] = []
    at = step.start
    for moment, begins, activity in sorted(moments, key=lambda m: m[:2]):
        if moment > at:
            yield _slice(at, moment, running, activity if begins else None)
            at = moment
        running.append(activity) if begins else running.remove(activity)
    if step.end > at:
        yield _slice(at, step.end, running, None)


_NOTHING = Activity(0, 0, "", Category.IDLE)


def _slice(start: float, end: float, running: list[Activity], following: Activity | None) -> Slice:
    owner = min(running, key=lambda a: (PRIORITY[a.category], a.start), default=None)
    return Slice(
        start, end, owner, following, any(a.category == Category.COMMUNICATION for a in running)
    )


def _launch_bound(idle: Slice, device: str) -> float:
    """The part of an idle slice before the next kernel is launched; if none follows, all of it."""
    if device == "cpu":
        return 0.0
    if idle.next is None:
        return idle.end - idle.start
    launched = idle.start if idle.next.launched is None else idle.next.launched
    return min(max(launched - idle.start, 0.0), idle.end - idle.start)


def _pass(phase: str, busy: Counter[str], trace: Trace) -> Pass | None:
    calls = sum(
        phase == found.name and any(s.start <= found.start < s.end for s in trace.steps)
        for found in trace.phases
    )
    return Pass(ms=busy[phase] / calls * 1e-3, calls=calls / len(trace.steps)) if calls else None


def _kernels(trace: Trace, step_ms: float) -> tuple[Kernel, ...]:
    us, calls = Counter(), Counter()
    for activity in trace.activities:
        if any(step.start <= activity.start < step.end for step in trace.steps):
            key = activity.name[:LONGEST_NAME], activity.category
            us[key] += activity.end - activity.start
            calls[key] += 1
    steps = len(trace.steps)
    found = [
        Kernel(
            name=name,
            category=category,
            ms=took * 1e-3 / steps,
            calls=calls[name, category] / steps,
        )
        for (name, category), took in us.most_common()
    ]
    return tuple(k for k in found if k.category == Category.OTHER or k.ms >= LEAST_SHARE * step_ms)
