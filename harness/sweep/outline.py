"""What a sweep will run, in which order, how long that takes, and what it leaves out and why."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

from harness.experiment import overrides
from harness.machine import gpus
from harness.predict.capacity import ERROR_SHARE, usable_gib
from harness.sweep.points import Point, Selection, in_words
from harness.sweep.request import SweepRequest
from harness.system import screen

START_UP_S = 25
"""Time of a run outside of its steps: imports, the model, compilation. Median over the records in
experiments/records, which 9 of 10 keep to 42 s."""
LONG_S = 2 * 3600
"""A sweep that takes longer is better searched."""
SHOWN = 40
"""Points that are listed."""
NAMED = 4
"""Points that are named of those left out for one reason."""


def outline(
    request: SweepRequest, found: Selection, done: Mapping[str, float], pack: bool = True
) -> Iterator[str]:
    """The plan in lines.

    Args:
        done: measured step times in ms, by name of a point.
        pack: see ``Batch``.
    """
    base = overrides.typed(request.changed)
    yield f"{request.row.name}{' ' * bool(base)}{base}: {request.command}"
    yield f"predicted at full size on {request.card.name}, {usable_gib(request.card):.1f} GiB"
    yield from _points(request, found.points, done)
    for point in found.points:
        if point.also:
            yield f"  the same run as {point.name}: {in_words(point.also)}"
    yield from _left_out(request, found)
    yield from _search(request, found)
    left = [point for point in found.points if point.name not in done]
    yield from _time(request, left, pack)
    if request.machine and (known := [p.plan.full for p in found.points if p.step_ms is not None]):
        yield f"  {request.machine.how_sure(*known)}"
        yield f"  {request.source}"


def total_s(points: Collection[Point], cards: int) -> float:
    """Predicted time of ``points``, started in their order whenever enough of ``cards`` GPUs are
    free, as a batch starts them; those without a prediction count their start only."""
    free, now, running = cards, 0.0, []
    for point in points:
        needed = min(point.plan.experiment.ranks_per_node, cards)
        while free < needed:
            now, freed = heapq.heappop(running)
            free += freed
        free -= needed
        heapq.heappush(running, (now + run_s(point), needed))
    return max((end for end, _ in running), default=now)


def run_s(point: Point) -> float:
    """Predicted time of a run."""
    return START_UP_S + point.plan.experiment.steps * (point.step_ms or 0.0) / 1e3


def _points(
    request: SweepRequest, points: Sequence[Point], done: Mapping[str, float]
) -> Iterator[str]:
    head = ["settings", "ms", "±", "GiB", "fits", "GPUs", *["measured ms"] * bool(done)]
    lines = [
        [
            point.name,
            "?" if point.step_ms is None else f"{point.step_ms:,.0f}",
            "" if point.band is None else f"{point.band:.0%}",
            "?" if point.gib is None else f"{point.gib:.1f}",
            point.fits or "",
            str(point.plan.experiment.world_size),
            *([f"{done[point.name]:,.0f}" if point.name in done else ""] * bool(done)),
        ]
        for point in points[:SHOWN]
    ]
    yield ""
    yield from (f"  {line}" for line in screen.grid([head, *lines]))
    if len(points) > SHOWN:
        yield f"  … and {len(points) - SHOWN:,} more; FORMAT=csv lists all"
    yield ""


def _left_out(request: SweepRequest, found: Selection) -> Iterator[str]:
    if found.too_large:
        names = [f"{point.name} ({point.gib:.1f} GiB)" for point in found.too_large]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield (
            f"  left out, does not fit whatever the error ({ERROR_SHARE:.0%}) of the prediction:"
            f" {', '.join(names[:NAMED])}{more}"
        )
    if any(point.is_at_the_border for point in found.points):
        yield "  points that may run out of memory are run: that is then their result"
    for reason, refused in found.refused.items():
        yield f"  refused: {reason}: {in_words(refused)}"


def _search(request: SweepRequest, found: Selection) -> Iterator[str]:
    if request.search is None or request.grid is None:
        return
    if len(found.points) > request.search.trials:
        yield (
            f"  Optuna chooses {request.search.trials} of these {len(found.points):,} points, first"
            f" the predictor's best; seed {request.search.seed}"
        )
    else:
        yield f"  all {len(found.points)} points are run: TRIALS={request.search.trials} has room"


def _time(request: SweepRequest, left: Sequence[Point], pack: bool) -> Iterator[str]:
    if request.search and len(left) > request.search.trials:
        left = left[: request.search.trials]
    if not left:
        yield "  every point has its result"
        return
    runs = f"{len(left)} run{'s' * (len(left) > 1)}"
    if request.device == "cpu":
        yield f"  {runs} of miniatures on the CPU, one after another; their time is not predicted"
        return
    most = max(point.plan.experiment.ranks_per_node for point in left)
    cards = max(len(gpus.list_gpus()), most) if pack else most
    seconds = total_s(left, cards)
    unknown = sum(point.step_ms is None for point in left)
    more = f"; {unknown} without a prediction count their start only" if unknown else ""
    yield f"  {runs}, predicted to take {_clock(seconds)} on {cards} GPU{'s' * (cards > 1)}{more}"
    if request.grid and not request.search and seconds > LONG_S:
        yield "  METHOD=optuna TRIALS=20 searches the grid instead"


def _clock(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
