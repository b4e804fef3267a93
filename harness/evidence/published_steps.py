"""Predicted step times beside those that others published (``make published``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from harness.errors import UserError, nearest
from harness.evidence import markdown, published
from harness.evidence.published import Group, Result
from harness.experiment import overrides
from harness.experiment.hardware import required_card
from harness.predict.calibrations import machine_of
from harness.system import screen


@dataclass(frozen=True)
class Comparison:
    """One published step and the prediction of it."""

    result: Result
    predicted_ms: Sequence[float]
    """Of every choice of what the source leaves out, in order."""

    @property
    def usual_ms(self) -> float:
        """The median over what the source leaves out."""
        return statistics.median(self.predicted_ms)

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.usual_ms / self.result.step_ms - 1


def compare(group: Group) -> list[Comparison]:
    """The steps of ``group``, predicted. Raises UserError where a row is wrong."""
    card = required_card(group.card, f"{group.name}: card")
    machine = machine_of(card)
    machine = machine.model_copy(update={"scatters_messages": group.scatters_messages})
    return [
        Comparison(result, sorted(machine.predict(one).total for one in result.possible))
        for result in group.results
        if result.step_ms
    ]


def print_published(settings: Mapping[str, str]) -> int:
    """Print every published step with its prediction, and the errors of each source.

    Raises UserError if ``GROUP=`` is unknown.
    """
    groups = published.load()
    if (wanted := settings.get("GROUP")) and wanted not in groups:
        raise UserError(f"GROUP={wanted}; {nearest(wanted, groups)}")
    for group in groups.values():
        if wanted in (None, group.name):
            compared = compare(group)
            screen.say(f"{group.name}: {group.source}. {group.software}")
            lines = [("", *HEAD), *(("", *_cells(one)) for one in compared)]
            for line in screen.grid(lines):
                print(line)
            mean, largest, bias = _errors(compared)
            print(f"  {len(compared)} rows: mean error {mean}, largest {largest}, bias {bias}\n")
    return 0


HEAD = ("model", "GPUs", "settings", "ms published", "ms predicted", "error")


def rows_table(name: str) -> str:
    """Markdown: every row of a group."""
    lines = [
        [f"`{model}`", gpus, f"`{typed}`", *numbers]
        for model, gpus, typed, *numbers in map(_cells, _compared(name))
    ]
    return markdown.table(HEAD, lines, "lrlrrr")


def summary_table() -> str:
    """Markdown: how far predictions of each group are off, experts apart."""
    lines = []
    for group in published.load().values():
        found = _compared(group.name)
        dense = [one for one in found if not one.result.model.num_experts]
        experts = [one for one in found if one.result.model.num_experts]
        for kind, some in (("dense", dense), ("experts", experts)):
            if some:
                gpus = [one.result.possible[0].world_size for one in some]
                lines.append(
                    [
                        f"`{group.name}`",
                        kind,
                        f"{min(gpus):,} to {max(gpus):,}"
                        if min(gpus) < max(gpus)
                        else str(gpus[0]),
                        str(len(some)),
                        *_errors(some),
                    ]
                )
    head = ["source", "models", "GPUs", "rows", "mean error", "largest", "bias"]
    return markdown.table(head, lines, "lllrrrr")


@cache
def _compared(name: str) -> list[Comparison]:
    return compare(published.load()[name])


def _cells(one: Comparison) -> tuple[str, ...]:
    own = one.result.own - {"GPUS"}
    settings = {key: value for key, value in one.result.settings.items() if key in own}
    typed = overrides.typed(settings)
    if one.result.container:
        typed += f", container {one.result.container}"
    predicted = f"{one.usual_ms:,.0f}"
    if len(one.predicted_ms) > 1:
        predicted += f" ({one.predicted_ms[0]:,.0f} to {one.predicted_ms[-1]:,.0f})"
    gpus = f"{one.result.possible[0].world_size:,}"
    return (
        one.result.model.name,
        gpus,
        typed,
        f"{one.result.step_ms:,.0f}",
        predicted,
        f"{one.error:+.1%}",
    )


def _errors(compared: Sequence[Comparison]) -> tuple[str, str, str]:
    """Of predictions: the mean and the largest without sign, and the mean with it."""
    off = [one.error for one in compared]
    without_sign = [abs(error) for error in off]
    return (
        f"{statistics.mean(without_sign):.1%}",
        f"{max(without_sign):.1%}",
        f"{statistics.mean(off):+.1%}",
    )
