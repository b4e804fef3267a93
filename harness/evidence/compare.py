"""Two runs side by side: settings that differ, numbers with their ratio, and how losses agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from harness.evidence import markdown
from harness.evidence.columns import VALUES
from harness.evidence.rows import Row, launch_rate_remark, losses
from harness.evidence.tables import MOST_TEXT, collect_warned, wrap
from harness.experiment import command_line
from harness.system import screen

FORMATS = ("terminal", "markdown", "json")
SAME_LOSS = 2e-6
"""Relative difference up to which two fp32 losses count as equal."""
NUMBERS = (
    "step_ms",
    "step_ms_half_iqr",
    "memory_gib",
    "reserved_gib",
    "allocated_gib",
    "tflops",
    "mfu",
    "tokens_per_s",
    "steps_done",
    "loss_first",
    "loss_last",
    "validation_loss",
    "perplexity",
    "launch_add_us",
    "launch_operation_us",
)


def render_compare(a: Row, b: Row, format: str = "terminal") -> str:
    """The comparison of two runs as text.

    Raises:
        UserError: the format is unknown, or cannot show this (CSV).
    """
    command_line.choice("FORMAT", format, FORMATS)
    ours, theirs = _settings(a), _settings(b)
    pairs = {key: (ours.get(key), theirs.get(key)) for key in ours | theirs}
    settings = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    numbers = {name: (VALUES[name](a), VALUES[name](b)) for name in NUMBERS}
    numbers = {name: pair for name, pair in numbers.items() if pair != (None, None)}
    difference, sentence = _agreement(losses(a), losses(b))
    if format == "json":
        return json.dumps(
            {
                "a": a.label,
                "b": b.label,
                "settings": {key: {"a": x, "b": y} for key, (x, y) in settings.items()},
                "numbers": {
                    key: {"a": x, "b": y, "ratio": _ratio(x, y)} for key, (x, y) in numbers.items()
                },
                "loss_largest_relative_difference": difference,
            },
            indent=1,
        )
    head = ("", f"A  {a.label}", f"B  {b.label}", "B/A")
    lines = [(key, _plain(x), _plain(y), "") for key, (x, y) in settings.items()]
    for key, (x, y) in numbers.items():
        ratio = _ratio(x, y)
        lines.append((key, _plain(x), _plain(y), "" if ratio is None else f"{ratio:,.3f}"))
    remarks = [*([] if settings else ["settings: the same"]), sentence, *_remarks(a, b)]
    if format == "markdown":
        return "\n".join([markdown.table(head, lines, "lrrr"), "", *remarks])
    width = min(screen.width(piped=MOST_TEXT), MOST_TEXT)
    wrapped = (text for remark in remarks for text in wrap(remark, width))
    return "\n".join([*screen.grid([head, *lines]), "", *wrapped])


def _remarks(a: Row, b: Row) -> Iterator[str]:
    for what, one, other in (
        ("hardware", a.hardware, b.hardware),
        ("upstream", a.software, b.software),
    ):
        if one != other:
            yield f"Different {what} ({one}, {other}): times and memory do not compare."
    if remark := launch_rate_remark(b, a):
        yield remark


def _settings(row: Row) -> dict[str, Any]:
    """The experiment's settings, the model's and what they ran on, in one dict."""
    settings = row.experiment.model_dump(
        mode="json", exclude={"id", "slug", "chapter", "shows", "overrides"}
    )
    model, extra = settings.pop("model"), settings.pop("extra_args")
    upstream = row.result.upstream if row.result else None
    return {
        "experiment": row.experiment.name,
        **{f"model.{key}": value for key, value in model.items()},
        **settings,
        "extra_args": " ".join(extra),
        "hardware": row.hardware,
        "upstream": upstream and f"{upstream.version} ({upstream.source})",
        "status": row.state,
    }


def _agreement(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float | None, str]:
    """The largest relative difference of two loss curves over common steps, and a sentence."""
    common = sorted(a.keys() & b.keys())
    if not common:
        return None, "losses: no step in common"
    differences = {step: abs(a[step] - b[step]) / (abs(a[step]) or 1.0) for step in common}
    worst = max(common, key=differences.__getitem__)
    largest = differences[worst]
    first = next((step for step in common if differences[step] > SAME_LOSS), None)
    steps = f"steps {common[0]} to {common[-1]}"
    if first is None:
        return largest, f"losses: equal over {steps} (largest relative difference {largest:.1e})"
    return largest, (
        f"losses: differ from step {first} on; over {steps} the largest relative difference is"
        f" {largest:.1e}, at step {worst} (equal means {SAME_LOSS:.0e} or less)"
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.5g}"
    return "-" if value in (None, "") else str(value)


def print_compare(settings: Mapping[str, str]) -> int:
    """``make compare A=… B=…``. Raises UserError where one of them does not exist."""
    results = collect_warned(settings)
    a, b = (results.find(settings[key]) for key in "AB")
    print(render_compare(a, b, settings.get("FORMAT", "terminal")))
    return 0
