"""Whether two experiments are the same, which settings differ, and whether the losses change.

A label is a name and loses information; the frozen experiment identifies a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.experiment.command_line import EXPERIMENT_SETTINGS
from harness.experiment.experiment import Experiment, Target
from harness.experiment.extra_arguments import by_option
from harness.experiment.model import Model

NAMES = frozenset({"slug", "chapter", "shows", "published_data", "window_first_step", "overrides"})
"""Fields that name an experiment, say how it is judged, or how it was derived from a row."""

KEEPING = frozenset({"save_every", "keep"})
"""Fields of which checkpoints are kept; they change no step."""

AROUND_STEPS = (
    *("steps", "window_first_step", "eval_interval", "eval_steps", "save_every", "keep", "until"),
    *("lr", "min_lr", "lr_decay", "lr_warmup_steps", "load", "weights", "positions"),
    *("data", "split", "published_data", "profile", "miniature"),
)
"""Fields that do not decide what a step does."""

OF_MODEL = {"dropout": "DROPOUT", "mtp_num_layers": "MTP"}
"""Fields of a model that have a setting, and which."""

_FIELDS = {setting.field: setting for setting in EXPERIMENT_SETTINGS if setting.changes}
CURVE = {field: one.key for field, one in _FIELDS.items() if one.changes == "losses"} | {
    field: field for field in ("precision", "positions")
}
"""Field -> setting (or its own name) of what a step computes and on what data: another value gives
another loss curve."""
NEUTRAL = {field: one.key for field, one in _FIELDS.items() if one.changes != "losses"} | {
    field: field for field in ("attention_backend",)
}
"""Field -> setting of layout, speed, length and evaluation: losses stay the same but for rounding
and dropout's draws."""
LENGTH = frozenset(one.key for one in _FIELDS.values() if one.changes == "length")
"""Settings of NEUTRAL that change neither the work of a step nor how a checkpoint is loaded."""

COMPARED_ELSEWHERE = frozenset({"id", "miniature", "model", "extra_args"})
"""Rows and miniatures are other experiments; models are compared by field, ARGS by option."""

_NOT_OF_THE_LOSSES = re.compile(
    r"--(no-)?(log-|timing-log|tensorboard-|wandb-|one-logger|num-workers$|exit-|manual-gc|distributed-timeout|verify-integrity"
    r"|overlap-|tp-comm-overlap|nccl-|async-|use-persistent-ckpt|ckpt-(?!step)|dist-ckpt-|save-interval$|eval-(interval|iters)$)"
)
"""Upstream's arguments of logs, workers, overlap and how checkpoints are written."""


@dataclass(frozen=True)
class Difference:
    """A setting in which two experiments differ."""

    setting: str
    before: str
    now: str
    curve: bool
    """Whether the losses of later steps depend on it."""

    @property
    def work(self) -> bool:
        """Whether it changes a step's work, so that step times before and after do not compare."""
        return self.setting not in LENGTH

    def __str__(self) -> str:
        return f"{self.setting} {self.before} -> {self.now}"


def same(before: Experiment, now: Experiment) -> bool:
    """Whether the two are one experiment, whatever their names and kept checkpoints."""
    return frozen(before) == frozen(now)


def frozen(experiment: Experiment) -> Experiment:
    """``experiment`` without its names and with ARGS sorted: equal values are one experiment."""
    words = tuple(
        word
        for flag, values in sorted(by_option(experiment.extra_args).items())
        for word in (flag, *values)
    )
    neutral = {
        "slug": "any",
        "chapter": 1,
        "shows": "any",
        "published_data": None,
        "window_first_step": 1,
        "overrides": {},
        "save_every": None,
        "keep": None,
        "extra_args": words,
        "min_lr": experiment.lowest_lr,
        "model": experiment.model.model_copy(update={"name": "any"}),
    }
    return experiment.model_copy(update=neutral)


def differences(before: Experiment, now: Experiment) -> tuple[Difference, ...]:
    """The settings in which ``now`` differs from ``before``.

    First those that change the losses, then those that change a step's work, then the rest.
    """
    return tuple(sorted(_all(before, now), key=lambda found: (not found.curve, not found.work)))


def rates(experiment: Experiment) -> tuple[float, float]:
    """Its highest and lowest learning rate, including those in ARGS."""
    given = by_option(experiment.extra_args)
    highest = _number(given.get("--lr"), experiment.highest_lr)
    return highest, _number(given.get("--min-lr"), experiment.lowest_lr)


def _all(before: Experiment, now: Experiment) -> Iterator[Difference]:
    for field in ("id", "miniature"):
        yield from _difference(field, getattr(before, field), getattr(now, field), True)
    for name in Model.model_fields:
        if name != "name":
            setting = OF_MODEL.get(name, f"model's {name}")
            yield from _difference(
                setting, getattr(before.model, name), getattr(now.model, name), True
            )
    for field, setting in CURVE.items():
        if field == "lr":
            yield from _schedules(before, now)
        elif field != "min_lr":
            yield from _difference(setting, getattr(before, field), getattr(now, field), True)
    for field, setting in NEUTRAL.items():
        # the routers' balancing loss is computed by micro-batch
        averaged = field == "micro_batch_size" and now.model.moe_aux_loss_coeff is not None
        yield from _difference(setting, getattr(before, field), getattr(now, field), averaged)
    yield from _arguments(before, now)


def _schedules(before: Experiment, now: Experiment) -> Iterator[Difference]:
    """Differences of the learning rate's ends, and of the steps between them."""
    for setting, there, here in zip(("LR", "MIN_LR"), rates(before), rates(now), strict=True):
        yield from _difference(setting, f"{there:g}", f"{here:g}", True)
    # the default warm-up is a share of those steps, so that they matter at a constant rate, too
    if now.lr_decay != "constant" or now.lr_warmup_steps is None:
        yield from _difference(
            "steps of the learning rate's decay", before.lr_decay_steps, now.lr_decay_steps, True
        )


def _arguments(before: Experiment, now: Experiment) -> Iterator[Difference]:
    there, here = by_option(before.extra_args), by_option(now.extra_args)
    for flag in dict.fromkeys([*there, *here]):
        if flag not in ("--lr", "--min-lr"):
            setting = f"ARGS {flag}" if flag else "ARGS"
            yield from _difference(
                setting, _given(there, flag), _given(here, flag), not _NOT_OF_THE_LOSSES.match(flag)
            )


def _given(words: Mapping[str, tuple[str, ...]], flag: str) -> str:
    return "not given" if flag not in words else " ".join(words[flag]) or "given"


def _difference(setting: str, before: Any, now: Any, curve: bool) -> Iterator[Difference]:
    if before != now:
        yield Difference(setting, _plain(before), _plain(now), curve)


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, Target):
        return f"{value.validation_loss:g}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _number(words: tuple[str, ...] | None, otherwise: float) -> float:
    try:
        return float(words[0]) if words else otherwise
    except ValueError:
        return otherwise
