"""The words of ``GRID="TP=1,2,4 FP8=,tensorwise"``: settings, each with the values it takes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from itertools import product

from harness.errors import UserError
from harness.experiment import command_line, overrides
from harness.experiment.command_line import EXPERIMENT_SETTINGS, LAUNCH_SETTINGS
from harness.experiment.experiment import Experiment
from harness.upstreams.megatron_lm import known_arguments

Grid = Mapping[str, tuple[str, ...]]
"""Setting -> its values; an empty one is that of the row as it stands."""

MOST_POINTS = 5_000
"""Points that are predicted, at about 30 ms each."""
EXAMPLE = 'GRID="TP=1,2,4 MBS=5,15 FP8=,tensorwise"'
_OF_ROWS = {setting.key: setting for setting in EXPERIMENT_SETTINGS}
_OF_LAUNCHING = {setting.key for setting in LAUNCH_SETTINGS}


def read(text: str, row: Experiment, beside: Mapping[str, str]) -> Grid:
    """The grid in ``text``, the value of ``GRID=``.

    Words are separated by spaces and quoted as in a shell. Values are separated by commas, or by
    semicolons where a value has commas itself: ``CUDA_GRAPHS=1;attn,mlp``.

    Args:
        row: whose settings vary.
        beside: settings given beside ``GRID=``.

    Raises:
        UserError: a word is no ``KEY=VALUES``, a setting is unknown or given twice, or no
            experiment can have one of its values.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"GRID={text}: {error}") from None
    grid: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, values = _values(word)
        if key in grid:
            raise UserError(f"GRID: {key} occurs twice; name all its values at once: {key}=1,2")
        if key in beside:
            raise UserError(
                f"{key}={beside[key]} is given, and GRID varies {key}; leave one of them out"
            )
        for value in filter(None, values):
            _check_value(row, key, value)
        grid[key] = values
    if not grid:
        raise UserError(f"GRID is empty; name settings and their values, such as {EXAMPLE}")
    if (points := size(grid)) > MOST_POINTS:
        id_, factors = row.id, " x ".join(str(len(values)) for values in grid.values())
        raise UserError(
            f"GRID has {points:,} points ({factors}); at most {MOST_POINTS:,} are predicted\n"
            f"leave out values: make faster-{id_} says which layouts can be fast"
        )
    return grid


def size(grid: Grid) -> int:
    """How many points it has."""
    return math.prod(len(values) for values in grid.values())


def points(grid: Grid) -> Iterator[dict[str, str]]:
    """The settings of every point, without those that stay as in the row."""
    for values in product(*grid.values()):
        yield typed(dict(zip(grid, values, strict=True)))


def typed(chosen: Mapping[str, str]) -> dict[str, str]:
    """What is typed for a point: its settings, without those that stay as in the row."""
    return {key: value for key, value in chosen.items() if value}


def in_words(grid: Grid) -> str:
    """``grid`` as ``GRID=`` takes it."""
    return " ".join(
        shlex.quote(f"{key}={(';' if _has_commas(values) else ',').join(values)}")
        for key, values in grid.items()
    )


def _values(word: str) -> tuple[str, tuple[str, ...]]:
    key, equals, values = word.partition("=")
    if not equals:
        raise UserError(f"GRID: {word!r} is not of the form KEY=VALUES, such as TP=1,2,4")
    command_line.parse([f"{key}="])  # says what is meant by an unknown one
    if key in _OF_LAUNCHING:
        raise UserError(
            f"GRID: {key} says how a run is launched, not what runs; set it beside GRID:"
            f" {key}={values.split(',')[0]}"
        )
    found = tuple(dict.fromkeys(values.split(";" if ";" in values else ",")))
    return key, found


def _check_value(row: Experiment, key: str, value: str) -> None:
    """Raise UserError where no experiment can have ``key`` set to ``value``."""
    if key == "ARGS":
        known_arguments.check(value)
    if read := _OF_ROWS[key].read:
        read(key, value)
    elif key == "GPUS":  # which numbers divide depends on the point
        command_line.count(key, value)
    else:
        adapters = {"LORA_RANK": "1"} if key.startswith("LORA_") else {}
        overrides.unchecked(row, adapters | {key: value})


def _has_commas(values: tuple[str, ...]) -> bool:
    return any("," in value for value in values)
