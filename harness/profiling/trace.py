"""A PyTorch profiler trace (Kineto, in Chrome's format) as steps and the activities in them.

On a GPU an activity is a kernel, copy or memset on any stream. On a CPU it is a stretch of the main
thread within one innermost operator, or a collective on one of gloo's threads. An autograd function
around operators does not count: it computes nothing itself and may wait for gloo. Times are in us
on the trace's clock.
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
"""Prefix of our own ranges (harness/entry/profiler.py); the phase or the step follows."""
STEP = RANGE + "step "
REST = "rest"
"""The phase outside of forward, backward and optimizer."""

COPIES = ("gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


class Range(NamedTuple):
    """A named stretch of the CPU's main thread."""

    start: float
    end: float
    name: str


class Activity(NamedTuple):
    """Something that keeps a GPU or CPU busy."""

    start: float
    end: float
    name: str
    category: Category
    phase: str = REST
    launched: float | None = None
    """When the call that launched it on the GPU returned."""


@dataclass(frozen=True)
class Trace:
    """The traced steps of one rank."""

    device: str
    steps: tuple[Range, ...]
    phases: tuple[Range, ...]
    """Forward and backward passes of micro-batches, and optimizer steps."""
    activities: tuple[Activity, ...]
    """By start."""


def read(path: Path, device: str) -> Trace:
    """The trace in ``path``, gzipped JSON.

    Args:
        device: ``cpu`` or ``cuda``, what the run ran on.

    Raises:
        UserError: the file is missing or incomplete, or holds no step or no activity.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            events = json.load(file)["traceEvents"]
    except FileNotFoundError:
        raise UserError(
            f"no trace {path}\nthe run ended before its traced steps did, or logs.txt says why"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a complete trace: {error}\nrun it again") from None
    return parse(events, device, str(path))


def parse(events: Iterable[dict[str, Any]], device: str, name: str = "the trace") -> Trace:
    """The trace of ``events``, Chrome's trace events. Raises UserError as ``read``."""
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
            " none: check that nvidia-cuda-cupti is installed in torch's version and no other"
            " profiler is attached; lines with CUPTI in logs.txt may give the reason"
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
    for event in events:
        if event.get("cat") not in ("kernel", *COPIES):
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        phase = _phase_at(launch["ts"], phases) if launch else REST
        category = Category.MEMORY if event["cat"] in COPIES else _category(event["name"], phase)
        launched = launch["ts"] + launch["dur"] if launch else None
        found.append(Activity(*_span(event), category, phase, launched))
    return found


def _on_cpu(
    events: list[dict[str, Any]], phases: tuple[Range, ...], main_thread: Any
) -> list[Activity]:
    operators = [_span(e) for e in events if e.get("cat") == "cpu_op" and e["tid"] == main_thread]
    collectives = [_span(e) for e in events if e["name"].startswith("gloo:")]
    computed = [stretch for stretch in _innermost(operators) if not _only_wraps(stretch.name)]
    found = []
    for stretch in (*computed, *collectives):
        phase = _phase_at(stretch.start, phases)
        found.append(Activity(*stretch, _category(stretch.name, phase), phase))
    return found


def _span(event: dict[str, Any]) -> Range:
    return Range(event["ts"], event["ts"] + event["dur"], event["name"])


def _category(name: str, phase: str) -> Category:
    """The category of a kernel; the optimizer's phase has its elementwise and unknown ones."""
    category = category_of(name)
    if phase == "optimizer" and category in (Category.ELEMENTWISE, Category.OTHER):
        return Category.OPTIMIZER
    return category


def _only_wraps(name: str) -> bool:
    """Whether it is an autograd function (``_AllToAll``), not an operator (``aten::mm``)."""
    return "::" not in name or "autograd::" in name


def _innermost(operators: list[Range]) -> Iterator[Range]:
    """Nested operators as stretches, each with the name of its innermost operator."""
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
