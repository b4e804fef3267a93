"""``make best-632``: the fastest set-up that was measured, and what each setting brought."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness import RECORDS
from harness.errors import UserError
from harness.evidence import results
from harness.evidence.predictions import is_json, print_json
from harness.evidence.references import load_references
from harness.evidence.rows import Row
from harness.experiment import identity
from harness.experiment.experiment import Experiment
from harness.experiment.overrides import command_of
from harness.planning import resolved
from harness.predict.rates import SAME_LAUNCH_RATE
from harness.system.screen import say

ARITHMETIC = ("FP8", "FP4", "DROPOUT", "GRADIENTS", "OPTIMIZER_STATE", "MOE_CAPACITY", "MTP")
"""Settings that compute something else: set-ups that differ in one of them are not compared."""
SAME_STEP = {
    *("id", "model", "extra_args", "overrides", "card", "dp", "precision", "attention_backend"),
    *identity.AROUND_STEPS,
}
"""Fields in which set-ups of the same work may differ, or which follow from others."""
STEP_SETTINGS = {
    *identity.OF_MODEL.values(),
    *(
        setting
        for field, setting in (identity.NEUTRAL | identity.CURVE).items()
        if field not in SAME_STEP
    ),
}
"""Settings that make a step another one."""
FOLLOWS = {"RECOMPUTE_MODULES": "RECOMPUTE", "SP": "TP", "VPP": "PP"}
"""Settings that another brings with it."""
HEAD = ("ms", "ratio", "MFU", "tokens/s", "GiB", "launch")


@dataclass(frozen=True)
class Recipe:
    """The records of one piece of work that compute the same, on one kind of card.

    Attributes:
        base: the row as it stands, or with nothing but these settings of ARITHMETIC; None where it
            was not measured.
        rows: all of them, the fastest first.
        arithmetic: settings of ARITHMETIC in which they differ from the row.
    """

    card: str
    arithmetic: tuple[str, ...]
    base: Row | None
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row:
        return self.rows[0]

    @property
    def ratio(self) -> float | None:
        """That of the fastest."""
        return self.ratio_of(self.best)

    def ratio_of(self, row: Row) -> float | None:
        """How many times as many tokens a second as the base; None without one."""
        return self.base and self.base.step.median / row.step.median


def print_best(id_: str, settings: Mapping[str, str]) -> int:
    """Print the measured set-ups of experiment ``id_``'s work, the fastest of each kind first.

    The work: its model, batch, sequence and number of GPUs.

    Raises:
        UserError: the experiment or a setting is invalid, or nothing of this work is measured.
    """
    row = resolved.of_catalogue(id_, settings)
    found = recipes(row, results.collect_records(RECORDS, load_references()).rows)
    if not found:
        raise UserError(
            f"no record has the work of {id_}: {work_in_words(row)}\n"
            f"make faster-{id_} predicts; make {id_} STEPS=20 and make record RUN={id_} measure"
        )
    if is_json(settings):
        return print_json(_object(one, recipe) for recipe in found for one in recipe.rows)
    say(f"{row.name}: {work_in_words(row)}; measured")
    for recipe in found:
        _print(recipe, id_)
    return 0


def work_in_words(row: Experiment) -> str:
    """What every record of it has in common."""
    size = row.global_batch_size
    return (
        f"{row.model.name}, {size:,} sequence{'s' * (size > 1)} of {row.seq_length:,} tokens a"
        f" step on {row.world_size} GPU{'s' * (row.world_size > 1)}"
    )


def recipes(row: Experiment, measured: Iterable[Row]) -> list[Recipe]:
    """The measured set-ups of ``row``'s work, by card and arithmetic, those of the row first."""
    same = [one for one in measured if one.step and _same_work(row, one.experiment)]
    kinds: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for one in sorted(same, key=lambda one: one.step.median):
        changed = _differences(row, one.experiment)
        arithmetic = tuple(sorted(f"{one.setting}={one.now}" for one in _computed(changed)))
        kinds.setdefault((one.hardware, arithmetic), []).append(one)
    return [
        Recipe(card, arithmetic, _base(row, arithmetic, rows), tuple(rows))
        for (card, arithmetic), rows in sorted(
            kinds.items(), key=lambda kind: (kind[0][0], len(kind[0][1]), kind[0][1])
        )
    ]


def _same_work(row: Experiment, other: Experiment) -> bool:
    """Whether both train the same model on as many tokens a step, on as many GPUs."""

    def work(e: Experiment) -> tuple[object, ...]:
        plain = e.model.model_copy(update={"name": "any", "dropout": 0.0, "mtp_num_layers": None})
        sizes = (e.global_batch_size, e.seq_length, e.world_size, e.optimizer, e.lora)
        return (plain, *sizes, bool(e.weights), e.miniature, e.extra_args)

    return work(row) == work(other)


def _differences(row: Experiment, other: Experiment) -> list[identity.Difference]:
    """What makes ``other``'s step another than ``row``'s."""
    return [one for one in identity.differences(row, other) if one.setting in STEP_SETTINGS]


def _computed(changed: Iterable[identity.Difference]) -> list[identity.Difference]:
    """Those that compute something else."""
    return [one for one in changed if one.setting in ARITHMETIC]


def _base(row: Experiment, arithmetic: Sequence[str], rows: Sequence[Row]) -> Row | None:
    """The record that differs from ``row`` in ``arithmetic`` only, if there is one.

    Of several, the one measured beside the fastest, else the latest.
    """
    plain = [one for one in rows if len(_differences(row, one.experiment)) == len(arithmetic)]
    return max(plain, key=lambda one: (same_batch(one, rows[0]), one.result.started), default=None)


def same_batch(one: Row, other: Row) -> bool:
    """Whether both ran in one batch, as ``records.Sitting.is_with`` says."""
    return one.sitting.is_with(other.sitting)


def _print(recipe: Recipe, id_: str) -> None:
    print(f"\n{recipe.card}{', ' * bool(recipe.arithmetic)}{', '.join(recipe.arithmetic)}")
    print("  {:>9} {:>6} {:>5} {:>9} {:>6} {:>7}".format(*HEAD))
    for one in recipe.rows:
        star = " " if recipe.base is None or same_batch(one, recipe.base) else "*"
        ratio = f"{recipe.ratio_of(one):.2f}" if recipe.base else ""
        share = f"{one.mfu:.1%}" if one.mfu else ""
        gib = one.memory_gib.allocated
        launch = f"{one.launch.operation_us:.0f} µs" if one.launch else ""
        say(
            f"{star} {one.step.median:9,.0f} {ratio:>6} {share:>5}"
            f" {one.result.tokens_per_s or 0:9,.0f} {gib or 0:6.1f} {launch:>7}"
            f"  make {command_of(one.experiment)}",
            hang=4,
        )
    if recipe.base is None:
        with_ = f" with {', '.join(recipe.arithmetic)}" if recipe.arithmetic else ""
        say(f"  {id_} as it stands{with_} is not measured: no ratio")
    elif any(not same_batch(one, recipe.base) for one in recipe.rows):
        say(
            "  *: measured hours apart from the row, or on a host that launches faster or slower"
            f" by a factor of {SAME_LAUNCH_RATE:g} or more: part of the ratio may be the host's"
        )
    for line in ablation(recipe.rows):
        say(f"  {line}", hang=4)


def ablation(rows: Sequence[Row]) -> Iterator[str]:
    """What one setting brought, for each two records of a batch that differ in no other."""
    for faster, slower in itertools.combinations(rows, 2):
        changed = _differences(slower.experiment, faster.experiment)
        settings = {one.setting for one in changed}
        changed = [one for one in changed if FOLLOWS.get(one.setting) not in settings]
        if len(changed) == 1 and same_batch(faster, slower):
            before, after = slower.step.median, faster.step.median
            losses = faster.result.loss, slower.result.loss
            said = ""
            if all(losses) and faster.result.steps_done == slower.result.steps_done:
                apart = abs(losses[0].last / losses[1].last - 1)
                said = f"; losses {apart:.0e} apart after {faster.result.steps_done} steps"
            yield (f"{changed[0]}: {before:,.0f} -> {after:,.0f} ms, {before / after:.2f} x{said}")


def _object(row: Row, recipe: Recipe) -> dict[str, Any]:
    base = recipe.base
    return {
        "make": command_of(row.experiment),
        "card": row.gpu and row.gpu.key,
        "arithmetic": list(recipe.arithmetic),
        "step_ms": round(row.step.median, 2),
        "ratio": base and round(recipe.ratio_of(row), 3),
        "same_batch": base and same_batch(row, base),
        "mfu": row.mfu and round(row.mfu, 4),
        "tokens_per_s": row.result.tokens_per_s,
        "allocated_gib": row.memory_gib.allocated,
        "operation_us": row.launch and row.launch.operation_us,
        "record": row.label,
    }
