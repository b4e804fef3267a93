"""``make recipes``: for each workload the fastest set-up that was measured, and the row itself."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RECORDS
from harness.errors import UserError
from harness.evidence import best, markdown, results
from harness.evidence.best import Recipe
from harness.evidence.predictions import is_json, print_json
from harness.evidence.quantities import NotMeasured
from harness.evidence.references import load_references
from harness.evidence.rows import Row
from harness.experiment import overrides
from harness.experiment.catalog import EXPERIMENTS, load_catalog
from harness.experiment.experiment import Experiment
from harness.experiment.overrides import command_of
from harness.system import yaml_files
from harness.system.screen import say

WORKLOADS = EXPERIMENTS / "recipes.yaml"
APART = "measured more than two hours apart, or on hosts with different launch rates"


@dataclass(frozen=True)
class Workload:
    """A row of the catalogue on the GPUs that were at hand, and the records that compute the same.

    Attributes:
        command: what ``make`` took for the row as it stands.
        recipe: without a ratio where the row itself was not measured.
    """

    command: str
    experiment: Experiment
    recipe: Recipe

    @property
    def is_of_one_batch(self) -> bool:
        """Whether the row and the fastest set-up were measured in one batch."""
        return self.recipe.base is not None and best.same_batch(self.recipe.best, self.recipe.base)


def listed(path: Path = WORKLOADS) -> dict[str, Experiment]:
    """The workloads of experiments/recipes.yaml, by what ``make`` takes.

    Raises:
        UserError: the file is no list of that.
    """
    read = yaml_files.read(path)
    commands = read.get("workloads")
    if {*read} != {"workloads"} or not (
        isinstance(commands, list) and all(isinstance(one, str) for one in commands)
    ):
        raise UserError(f"{path.name}: expected workloads: and texts such as 502 GPUS=2 EP=2")
    catalog = load_catalog()
    found = {}
    for command in commands:
        try:
            found[command] = overrides.experiment_of(command, catalog)
        except UserError as error:
            raise UserError(f"{path.name}: {command!r}: {error}") from None
    return found


def load(measured: Iterable[Row]) -> list[Workload]:
    """The workloads that ``measured`` has, on each kind of card. Raises UserError as ``listed``."""
    measured, found = list(measured), []
    for command, experiment in listed().items():
        for recipe in best.recipes(experiment, measured):
            if not recipe.arithmetic:
                found.append(Workload(command, experiment, recipe))
    return found


def mean_ratio(workloads: Sequence[Workload]) -> float:
    """Geometric mean of how much faster the fastest set-ups are than the rows.

    Raises:
        NotMeasured: no workload has a ratio.
    """
    ratios = [one.recipe.ratio for one in workloads if one.recipe.ratio is not None]
    if not ratios:
        raise NotMeasured("no workload of experiments/recipes.yaml")
    return statistics.geometric_mean(ratios)


def ratio_of(command: str, measured: Iterable[Row]) -> float:
    """How much faster the fastest set-up of a listed workload is than its row.

    Raises:
        NotMeasured: no record has it.
    """
    for one in load(measured):
        if one.command == command and one.recipe.ratio:
            return one.recipe.ratio
    raise NotMeasured(command)


def print_recipes(settings: Mapping[str, str]) -> int:
    """Print each workload, its row's time and the fastest measured set-up."""
    workloads = load(results.collect_records(RECORDS, load_references()).rows)
    if is_json(settings):
        return print_json(map(_object, workloads))
    for card in dict.fromkeys(one.recipe.card for one in workloads):
        of_card = [one for one in workloads if one.recipe.card == card]
        say(f"{card}: fastest measured set-ups that compute the same")
        width = max(len(one.command) for one in of_card)
        print(
            f"  {'workload':{width}} {'GPUs':>4} {'ms':>7} {'fastest':>8} {'ratio':>5} {'MFU':>6}"
        )
        for one in of_card:
            gpus, row_ms, fastest_ms, ratio, mfu, make = _cells(one)
            star = " " if one.is_of_one_batch else "*"
            say(
                f"{star} {one.command:{width}} {gpus:>4} {row_ms:>7} {fastest_ms:>8} {ratio:>5}"
                f" {mfu:>6}  {make}",
                hang=4,
            )
        if not all(one.is_of_one_batch for one in of_card):
            say(f"  *: {APART}: part of the ratio may be the host's")
        say(f"  geometric mean of {len(of_card)}: {mean_ratio(of_card):.2f}")
    return 0


def table(measured: Iterable[Row]) -> str:
    """Markdown of the same."""
    lines = []
    for one in load(measured):
        gpus, row_ms, fastest_ms, ratio, mfu, make = _cells(one)
        fastest_ms += " *" * (not one.is_of_one_batch)
        first = (f"`{one.command}`", one.experiment.model.name)
        lines.append([*first, gpus, row_ms, fastest_ms, ratio, mfu, f"`{make}`"])
    head = ["row as it stands", "model", "GPUs", "ms", "fastest", "ratio", "MFU", "command"]
    return markdown.table(head, lines, "llrrrrrl") + f"\n\n<sub>*: {APART}</sub>"


def ablations(measured: Iterable[Row]) -> str:
    """Markdown of what one setting brought, where two records of a batch differ in no other."""
    paragraphs = []
    for one in load(measured):
        if lines := [*best.ablation(one.recipe.rows)]:
            items = "\n".join(f"* {line}" for line in lines)
            paragraphs.append(f"`{one.command}`:\n\n{items}")
    return "\n\n".join(paragraphs)


def _cells(one: Workload) -> tuple[str, ...]:
    """GPUs, ms of the row and of the fastest set-up, their ratio, MFU, and what runs the latter."""
    row, fastest, ratio = one.recipe.base, one.recipe.best, one.recipe.ratio
    return (
        str(one.experiment.world_size),
        f"{row.step.median:,.0f}" if row else "",
        f"{fastest.step.median:,.0f}",
        f"{ratio:.2f}" if ratio else "",
        f"{fastest.mfu:.1%}" if fastest.mfu else "",
        f"make {command_of(fastest.experiment)}",
    )


def _object(one: Workload) -> dict[str, Any]:
    base, row = one.recipe.base, one.recipe.best
    return {
        "workload": one.command,
        "card": row.gpu and row.gpu.key,
        "gpus": one.experiment.world_size,
        "row_ms": base and round(base.step.median, 2),
        "fastest_ms": round(row.step.median, 2),
        "ratio": one.recipe.ratio and round(one.recipe.ratio, 3),
        "one_batch": one.is_of_one_batch,
        "make": command_of(row.experiment),
        "records": [base and base.label, row.label],
    }
