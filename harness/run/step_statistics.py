"""Statistics of a run's metrics: its averaging window, medians over it, and their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from harness.predict.flops import mfu, share_of_upstreams
from harness.run.schema import Change, Losses, Result, Spread, StepMetrics

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

BETWEEN_RUNS = 0.005
"""Relative standard deviation of the median step time between runs of the same work, which the
steps of one run do not show: 0.4 % over the pairs 111 with and without CARD, 211 and 231, 221 and
241, as recorded on an H200."""
MEMORY_BETWEEN_RUNS = 0.001
"""The same for NVML's memory and PyTorch's reserved memory: 0.1 %. Allocated memory is equal to the
byte."""


def window(e: Experiment, metrics: Iterable[StepMetrics]) -> list[StepMetrics]:
    """The steps to average over: from ``window_first_step``, without those slowed by a trace."""
    return [m for m in metrics if m.step >= e.window_first_step and m.step not in e.disturbed_steps]


def measure(
    e: Experiment,
    metrics: Sequence[StepMetrics],
    peak_tflops: float | None,
    changed: Iterable[Change] = (),
    counted: Literal["model", "upstream"] = "model",
) -> dict[str, Any]:
    """The fields of a Result that follow from metrics alone, so that records can be checked.

    Steps before the last change of the work are of another experiment: the window begins as many
    steps after it as it otherwise begins after step 0. ``counted``: whose count of FLOPs TFLOP/s
    and MFU follow.
    """
    since = max((change.step for change in changed if change.work), default=0)
    steps = [m for m in window(e, metrics) if m.step >= since + e.window_first_step]
    tflops = _median(_tflops(e, m, counted) for m in steps)
    return {
        "steps_done": metrics[-1].step if metrics else 0,
        "window": (steps[0].step, steps[-1].step) if steps else None,
        "step_ms": spread([m.step_ms for m in steps]),
        "forward_backward_ms": _median(m.forward_backward_ms for m in steps),
        "optimizer_ms": _median(m.optimizer_ms for m in steps),
        "tflops": tflops,
        "counted": counted,
        "tokens_per_s": _median(m.tokens_per_s for m in steps),
        "mfu": mfu(tflops, peak_tflops) if tflops and peak_tflops else None,
        "loss": Losses(first=metrics[0].loss, last=metrics[-1].loss) if metrics else Losses(),
    }


def contradictions(e: Experiment, result: Result, metrics: Sequence[StepMetrics]) -> Iterator[str]:
    """Differences between ``result`` and the run's metrics, as messages."""
    computed = result.model_copy(
        update=measure(e, metrics, result.peak_tflops, result.changed, result.counted)
    )
    if computed.steps_done != result.steps_done:
        yield (
            f"it says {result.steps_done} steps, its metrics end at step {computed.steps_done}:"
            " truncated"
        )
        return
    stated, given = (_flat(r.model_dump(mode="json")) for r in (result, computed))
    for key in stated | given:
        if not _equal(stated.get(key), given.get(key)):
            yield f"{key} is stated as {stated.get(key)}, its metrics give {given.get(key)}"


def model_tflops(e: Experiment, result: Result) -> float | None:
    """Model TFLOP/s per GPU of a run, also where its result follows upstream's count."""
    if result.tflops is None or result.counted == "model":
        return result.tflops
    return result.tflops * share_of_upstreams(e)


def _tflops(e: Experiment, m: StepMetrics, counted: str) -> float | None:
    if counted == "upstream":
        return m.tflops if m.upstream_tflops is None else m.upstream_tflops
    return (
        m.tflops
        if m.tflops is None or m.upstream_tflops is not None
        else m.tflops * share_of_upstreams(e)
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Statistics of ``values`` (sample standard deviation); None without values."""
    if not values:
        return None
    q1, median, q3 = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
    )
    stdev = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(
        median=median,
        q1=q1,
        q3=q3,
        mean=statistics.fmean(values),
        stdev=stdev,
        min=min(values),
        max=max(values),
        n=len(values),
    )


def step_noise_ms(steps_ms: Sequence[float]) -> float:
    """Standard uncertainty of a run's median step time, in ms.

    The uncertainties within the run and between runs are added in quadrature.

    Within: the standard error of a median, sqrt(pi/2) s / sqrt(n), where s = 1.4826 x the median
    absolute deviation is the standard deviation that one slow step among fifteen does not move
    (Rousseeuw and Croux 1993, section 1; 111 has a step of 736 ms among steps of 376, and so a
    standard deviation of 93). Between: BETWEEN_RUNS of the median.
    """
    median = statistics.median(steps_ms)
    s = 1.4826 * statistics.median(abs(value - median) for value in steps_ms)
    return math.hypot(math.sqrt(math.pi / 2) * s / math.sqrt(len(steps_ms)), BETWEEN_RUNS * median)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= (
            _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
        )
    return flat


def _equal(a: Any, b: Any) -> bool:
    return (
        math.isclose(a, b, rel_tol=1e-9)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
    )


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
