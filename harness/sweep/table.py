"""The table of a sweep, for the terminal, as Markdown, CSV or JSON, and the best point to paste."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from harness.evidence import markdown, plans
from harness.evidence.columns import milliseconds, number
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.command_line import SAME_WORK
from harness.planning import resolved
from harness.sweep.measured import Measured, best
from harness.sweep.request import SweepRequest
from harness.system import screen

VALUES: Mapping[str, Callable[[Measured], Any]] = {
    "settings": lambda one: one.point.name,
    "make": lambda one: overrides.command_of(one.point.plan.full),
    "status": lambda one: one.status,
    "step_ms": lambda one: one.ms,
    "step_ms_half_iqr": lambda one: one.row.step.half_iqr if one.ms else None,
    "predicted_step_ms": lambda one: one.point.step_ms,
    "band": lambda one: one.point.band,
    "error": lambda one: one.error,
    "memory_gib": lambda one: one.gib,
    "predicted_memory_gib": lambda one: one.point.gib,
    "fits": lambda one: one.point.fits,
    "tokens_per_s": lambda one: one.tokens_per_s,
    "ratio": lambda one: one.ratio,
    "losses_apart": lambda one: one.losses_apart,
    "losses_differ": lambda one: one.losses_differ,
    "shared_node": lambda one: one.shared_node,
    "gpus": lambda one: one.point.plan.experiment.world_size,
    "run": lambda one: one.row and one.row.label,
    "why": lambda one: _why(one),
}
"""Everything about a point as plain values, units in the names: what CSV and JSON hold.
``predicted_step_ms`` and ``predicted_memory_gib`` are at full size, of a miniature too."""

_COLUMNS: Mapping[str, Callable[[Measured], str]] = {
    "settings": lambda one: one.point.name + " (row)" * (one.point.is_row and bool(_shown(one))),
    "ms": lambda one: milliseconds(one.ms) + "*" * one.shared_node,
    "±": lambda one: milliseconds(one.row.step.half_iqr) if one.ms else "",
    "predicted": lambda one: milliseconds(one.predicted_ms),
    "error": lambda one: "" if one.error is None else f"{one.error:+.1%}",
    "GiB": lambda one: number(one.gib, 1),
    "tokens/s": lambda one: number(one.tokens_per_s),
    "ratio": lambda one: number(one.ratio, 2),
    "losses": lambda one: _losses(one),
    "status": lambda one: one.status,
}
LEFT = ("settings", "status")


def render(found: Sequence[Measured], format: str) -> str:
    """The points as text: ``terminal``, ``markdown``, ``csv`` or ``json``."""
    values = [{name: value(one) for name, value in VALUES.items()} for one in found]
    if format == "json":
        return json.dumps(values, indent=1)
    if format == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, VALUES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(values)
        return out.getvalue().rstrip("\n")
    cells = {title: [text(one) for one in found] for title, text in _COLUMNS.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    lines = list(zip(*shown.values(), strict=True))
    if format == "markdown":
        sides = ["l" if title in LEFT else "r" for title in shown]
        table = markdown.table([*shown], lines, sides)
        return "\n".join([table, "", *(f"- {remark}" for remark in _remarks(found))])
    return "\n".join([*screen.grid([[*shown], *lines]), *_remarks(found)])


def advice(found: Sequence[Measured], request: SweepRequest) -> Iterator[str]:
    """How to run the best point again, and its row to paste into the chapter; none without one."""
    fastest = best(found)
    if fastest is None:
        return
    chosen = {"best": fastest}
    if fastest.arithmetic:
        same = best([one for one in found if not one.arithmetic])
        chosen = {f"best, with other arithmetic ({', '.join(fastest.arithmetic)})": fastest}
        chosen |= {"best that computes what the row does": same} if same else {}
    for what, one in chosen.items():
        again = overrides.command_of(one.point.plan.full)
        yield f"{what}: make {again}" + _times(one)
        if one.point.is_row:
            yield "  it is the row as it stands"
        else:
            yield f"  as a row: {row_to_paste(one, request)}"
    if request.device == "cpu":
        yield "  times are of miniatures on a CPU: which is best on GPUs, only GPUs tell"
    else:
        label, id_ = fastest.row.label, request.row.id
        yield f"  make record RUN={label} keeps it; make best-{id_} lists all that are kept"


def row_to_paste(one: Measured, request: SweepRequest) -> str:
    """The row of the catalogue that runs this point, in YAML, with a free number."""
    typed = {
        key: value
        for key, value in one.point.candidate.typed.items()
        if key not in SAME_WORK or key in one.point.candidate.shown
    }
    experiment = resolved.with_settings(request.row, typed, request.outdir)
    changed = "-".join(
        re.sub(r"[^a-z0-9.]+", "", f"{key}{value}".lower())
        for key, value in experiment.overrides.items()
    )
    again = overrides.command_of(experiment)
    shows = f"make {again}" + _times(one) * (request.device == "cuda")
    slug = f"{request.row.slug}-{changed}" if changed else request.row.slug
    return plans.row(experiment, _free_number(request.row.chapter), slug, shows)


def _free_number(chapter: int) -> str:
    taken = {one.id for one in load_catalog().in_chapter(chapter)}
    numbers = (str(chapter + n) for n in range(1, 100))
    return next((number for number in numbers if number not in taken), "999")


def _times(one: Measured) -> str:
    if one.ratio is None or one.point.is_row:
        return ""
    return f" ({one.ratio:.2f} x the tokens/s of the row)"


def _shown(one: Measured) -> Mapping[str, str]:
    return one.point.candidate.shown


def _losses(one: Measured) -> str:
    if one.losses_apart is None:
        return ""
    return f"{'differ ' * one.losses_differ}{one.losses_apart:.0e}"


def _why(one: Measured) -> str:
    """Why a point has no step time."""
    if one.ms:
        return ""
    result = one.row.result if one.row else None
    said = (result and result.detail) or one.why
    if one.status == "ok":
        said = "no step after the first ones, which are not averaged"
    return " ".join((said or "").split())


def _remarks(found: Sequence[Measured]) -> Iterator[str]:
    for one in found:
        if why := _why(one):
            yield f"{one.status}: {one.point.name}: {why}"
    if any(one.shared_node for one in found):
        yield "*: other runs shared the node; PACK=0 FORCE=1 times each alone"
    if any(one.losses_differ for one in found):
        yield (
            "losses: mean relative difference to the row's; differ: by more than runs that compute"
            " the same"
        )
    if found and not any(one.base for one in found):
        yield "no ratio: the row as it stands was not measured"
