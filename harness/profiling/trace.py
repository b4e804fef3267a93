"""A Kineto trace (Chrome's trace format) as what happened when: steps, and what kept the GPU, or
the CPU, busy in them.

On a GPU an activity is a kernel, copy or memset on any stream. On a CPU it is a stretch of the main
thread within one innermost operator, or a collective on one of gloo's threads; an autograd function
around operators computes nothing itself, and may wait for gloo. Times are in µs on the trace's
clock.
"""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from harness.profiling.kernels import Category, category_of

RANGE = "harness: "
"""What the names of our own ranges begin with (harness/entry/profiler.py); the rest is the phase or
the step."""
STEP = RANGE + "step "
REST = "rest"
"""The phase of what is in neither forward, backward nor optimizer."""

COPIES = ("gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


class Range(NamedTuple):
    """A named stretch of the CPU's main thread."""

    start: float
    end: float
    name: str


class Activity(NamedTuple):
    """Something that keeps a GPU or CPU busy. ``launched``: when the call that launched it on the
    GPU returned."""

    start: float
    end: float
    name: str
    category: Category
    phase: str = REST
    launched: float | None = None


@dataclass(frozen=True)
class Trace:
    """The steps of one rank, the passes (a forward or backward of a micro-batch) in them, and every
    activity by start."""

    device: str
    steps: tuple[Range, ...]
    phases: tuple[Range, ...]
    activities: tuple[Activity, ...]


def read(path: Path, device: str) -> Trace:
    """The trace in ``path``, gzipped JSON.

    Args:
        device: ``cpu`` or ``cuda``, what the run ran on.

    Raises:
        UserError: the file is missing or torn, holds no step, or holds no kernel although it ran on
        a GPU.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            events = json.load(file)["traceEvents"]
    except FileNotFoundError:
        raise UserError(
            f"no trace {path}\nthe run ended before its traced steps did, or logs.txt says why"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole trace: {error}\nrun it again") from None
    return parse(events, device, str(path))


def parse(events: Iterable[dict[str, Any]], device: str, name: str = "the trace") -> Trace:
    """The trace made of ``events``, Chrome's trace events. Raises as ``read`` does."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ours = [
        event
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"].startswith(RANGE)
    ]
    steps = _ranges(event for event in ours if event["name"].startswith(STEP))
    if not steps:
        raise UserError(f"{name} holds no training step\nrun it again with PROFILE=1")
    phases = _ranges(event for event in ours if not event["name"].startswith(STEP))
    main_thread = next(event["tid"] for event in ours)
    activities = (
        _on_gpu(complete, phases) if device == "cuda" else _on_cpu(complete, phases, main_thread)
    )
    if not activities:
        raise UserError(
            f"{name} holds no {'GPU kernel' if device == 'cuda' else 'operator'}\nCUPTI delivered"
            " none: is nvidia-cuda-cupti installed in torch's version, and no other profiler"
            " attached? Lines with CUPTI in logs.txt say more"
        )
    return Trace(device, steps, phases, tuple(sorted(activities, key=lambda a: a.start)))


def _ranges(events: Iterable[dict[str, Any]]) -> tuple[Range, ...]:
    return tuple(
        sorted(Range(e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(RANGE)) for e in events)
    )


def _on_gpu(events: list[dict[str, Any]], phases: tuple[Range, ...]) -> list[Activity]:
    calls = [e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})]
    launches = {call["args"]["correlation"]: call for call in calls}
    found = []
    for e in events:
        if e.get("cat") not in ("kernel", *COPIES):
            continue
        launch = launches.get(e.get("args", {}).get("correlation"))
        phase = _phase_at(launch["ts"], phases) if launch else REST
        category = Category.MEMORY if e["cat"] in COPIES else category_of(e["name"])
        if phase == "optimizer" and category in (Category.ELEMENTWISE, Category.OTHER):
            category = Category.OPTIMIZER
        returned = launch["ts"] + launch["dur"] if launch else None
        found.append(Activity(e["ts"], e["ts"] + e["dur"], e["name"], category, phase, returned))
    return found


def _on_cpu(
    events: list[dict[str, Any]], phases: tuple[Range, ...], main_thread: Any
) -> list[Activity]:
    operators = [
        Range(e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "cpu_op" and e["tid"] == main_thread
    ]
    collectives = [
        Range(e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e["name"].startswith("gloo:")
    ]
    found = []
    computed = (stretch for stretch in _innermost(operators) if not _only_wraps(stretch.name))
    for start, end, name in [*computed, *collectives]:
        phase, category = _phase_at(start, phases), category_of(name)
        if phase == "optimizer" and category in (Category.ELEMENTWISE, Category.OTHER):
            category = Category.OPTIMIZER
        found.append(Activity(start, end, name, category, phase))
    return found


def _only_wraps(name: str) -> bool:
    """Whether it is an autograd function (``_AllToAll``) or the engine, and no operator
    (``aten::mm``)."""
    return "::" not in name or "autograd::" in name


def _innermost(operators: list[Range]) -> Iterator[Range]:
    """Nested operators cut into stretches, each named by the innermost operator there."""
    stack: list[Range] = []
    at = 0.0
    for operator in sorted(operators, key=lambda o: (o.start, -o.end)):
        while stack and stack[-1].end <= operator.start:
            ended = stack.pop()
            yield Range(at, ended.end, ended.name)
            at = ended.end
        if stack:
            yield Range(at, operator.start, stack[-1].name)
        stack.append(operator)
        at = operator.start
    while stack:
        ended = stack.pop()
        yield Range(at, ended.end, ended.name)
        at = max(at, ended.end)


def _phase_at(moment: float, phases: tuple[Range, ...]) -> str:
    index = bisect_right(phases, moment, key=lambda phase: phase.start) - 1
    return phases[index].name if index >= 0 and moment < phases[index].end else REST
