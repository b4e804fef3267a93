"""Whether two experiments are the same: what differs, in the words of the command line, and whether
it changes the losses.

A label is a name and loses information; the frozen experiment is what a run is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.experiment import understood
from harness.experiment.experiment import Experiment, Target
from harness.experiment.model import Model

NAMES = frozenset({"slug", "chapter", "shows", "published_data", "window_first_step", "overrides"})
"""Fields that say what an experiment is called and how it is judged; ``overrides`` say how it came
to be what it is."""

KEEPING = frozenset({"save_every", "keep"})
"""Fields of which checkpoints are kept: the run's Saving decides, and no step changes."""

NEUTRAL = {
    "tp": "TP",
    "pp": "PP",
    "vpp": "VPP",
    "cp": "CP",
    "ep": "EP",
    "etp": "ETP",
    "dp": "DP",
    "nodes": "NODES",
    "sequence_parallel": "SP",
    "cp_comm_type": "CP_COMM_TYPE",
    "micro_batch_size": "MBS",
    "sharding": "SHARDING",
    "recompute": "RECOMPUTE",
    "recompute_modules": "recompute_modules",
    "cross_entropy_fusion": "CROSS_ENTROPY_FUSION",
    "cuda_graphs": "CUDA_GRAPHS",
    "attention_backend": "attention_backend",
    "steps": "STEPS",
    "eval_interval": "EVAL_EVERY",
    "eval_steps": "EVAL_STEPS",
    "until": "UNTIL",
    "card": "CARD",
    "profile": "PROFILE",
}
"""Field -> setting of layout, speed, length and evaluation: losses stay the same but for rounding
and dropout's draws."""

CURVE = {
    "global_batch_size": "GBS",
    "seq_length": "SEQ",
    "precision": "precision",
    "fp8_recipe": "FP8",
    "optimizer": "OPTIMIZER",
    "optimizer_state": "OPTIMIZER_STATE",
    "gradients": "gradients",
    "lr": "LR",
    "min_lr": "MIN_LR",
    "lr_decay": "LR_DECAY",
    "lr_warmup_steps": "LR_WARMUP",
    "weights": "WEIGHTS",
    "positions": "positions",
    "lora": "LORA_RANK",
    "load": "LOAD",
    "data": "DATA",
    "split": "SPLIT",
}
"""Field -> setting of what a step computes and on what: another value is another curve."""

LENGTH = frozenset({"STEPS", "UNTIL", "EVAL_EVERY", "EVAL_STEPS", "PROFILE"})
"""Settings of NEUTRAL that leave the work of a step, and how a checkpoint is loaded, as they were.
"""

COMPARED_ELSEWHERE = frozenset({"id", "miniature", "model", "extra_args"})
"""Compared in other ways: rows and miniatures are other experiments; models and ARGS are compared
word by word."""

_BESIDE_THE_CURVE = re.compile(
    r"--(no-)?(log-|timing-log|tensorboard-|wandb-|one-logger|num-workers$|exit-|manual-gc|distributed-timeout|verify-integrity"
    r"|overlap-|tp-comm-overlap|nccl-|async-|use-persistent-ckpt|ckpt-(?!step)|dist-ckpt-|save-interval$|eval-(interval|iters)$)"
)
"""Upstream's arguments of logs, workers, overlap and how checkpoints are written."""


@dataclass(frozen=True)
class Difference:
    """A setting in which two experiments differ. ``curve``: the losses of later steps depend on
    it."""

    setting: str
    before: str
    now: str
    curve: bool

    @property
    def work(self) -> bool:
        """Whether a step does other work, or the same in another way: step times before and after
        do not compare."""
        return self.setting not in LENGTH

    def __str__(self) -> str:
        return f"{self.setting} {self.before} -> {self.now}"


def same(before: Experiment, now: Experiment) -> bool:
    """Whether the two are one experiment, whatever they are called and whoever keeps their
    checkpoints."""
    return frozen(before) == frozen(now)


def frozen(experiment: Experiment) -> Experiment:
    """``experiment`` without its names, and with ARGS in one order: two that are equal are one
    experiment."""
    words = tuple(
        word
        for flag, values in sorted(arguments(experiment.extra_args).items())
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
    """In which settings ``now`` differs from ``before``, those that change the losses first."""
    return tuple(sorted(_all(before, now), key=lambda found: not found.curve))


def arguments(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Upstream's arguments of ARGS: option -> its values. The last of an option counts, as in
    argparse."""
    return {argument.option: argument.values for argument in understood.arguments(words)}


def rates(experiment: Experiment) -> tuple[float, float]:
    """Its highest and lowest learning rate, those in ARGS included."""
    given = arguments(experiment.extra_args)
    return _number(given.get("--lr"), experiment.highest_lr), _number(
        given.get("--min-lr"), experiment.lowest_lr
    )


def _all(before: Experiment, now: Experiment) -> Iterator[Difference]:
    for field in ("id", "miniature"):
        yield from _difference(field, getattr(before, field), getattr(now, field), True)
    for name in Model.model_fields:
        if name != "name":
            setting = "DROPOUT" if name == "dropout" else f"model's {name}"
            yield from _difference(
                setting, getattr(before.model, name), getattr(now.model, name), True
            )
    for field, setting in CURVE.items():
        if field == "lr":
            yield from _schedules(before, now)
        elif field != "min_lr":
            yield from _difference(setting, getattr(before, field), getattr(now, field), True)
    for field, setting in NEUTRAL.items():
        # by micro-batch
        averaged = field == "micro_batch_size" and now.model.moe_aux_loss_coeff is not None
        yield from _difference(setting, getattr(before, field), getattr(now, field), averaged)
    yield from _arguments(before, now)


def _schedules(before: Experiment, now: Experiment) -> Iterator[Difference]:
    """Differences of the learning rate over the steps: of its ends, and of the steps until the
    lower one."""
    for setting, there, here in zip(("LR", "MIN_LR"), rates(before), rates(now), strict=True):
        yield from _difference(setting, f"{there:g}", f"{here:g}", True)
    # a warm-up by default is a share of those steps
    if now.lr_decay != "constant" or now.lr_warmup_steps is None:
        yield from _difference(
            "steps of the learning rate's decay", before.lr_decay_steps, now.lr_decay_steps, True
        )


def _arguments(before: Experiment, now: Experiment) -> Iterator[Difference]:
    there, here = arguments(before.extra_args), arguments(now.extra_args)
    for flag in dict.fromkeys([*there, *here]):
        if flag not in ("--lr", "--min-lr"):
            setting = f"ARGS {flag}" if flag else "ARGS"
            yield from _difference(
                setting, _given(there, flag), _given(here, flag), not _BESIDE_THE_CURVE.match(flag)
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
