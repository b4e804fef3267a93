"""``ARGS=``: upstream's arguments, and which of them mean the same as a setting or a model's field.

``ARGS="--num-layers 96"`` changes the model and ``ARGS="--tensor-model-parallel-size 2"`` is
``TP=2``, so that checks, labels, the miniature and every prediction see the experiment that runs.
The rest goes to upstream unchanged. Of the rest, predictions admit what does not change a step
(``NEUTRAL``) and refuse everything else. Spelling: megatron/training/arguments.py of core_v0.19.0.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from harness.errors import UserError

_SETTINGS = {
    "--train-iters": "STEPS",
    "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP",
    "--num-virtual-stages-per-pipeline-rank": "VPP",
    "--decoder-first-pipeline-num-layers": "FIRST_STAGE_LAYERS",
    "--decoder-last-pipeline-num-layers": "LAST_STAGE_LAYERS",
    "--pipeline-model-parallel-layout": "PP_LAYOUT",
    "--num-distributed-optimizer-instances": "OPTIM_INSTANCES",
    "--context-parallel-size": "CP",
    "--cp-comm-type": "CP_COMM_TYPE",
    "--expert-model-parallel-size": "EP",
    "--expert-tensor-parallel-size": "ETP",
    "--moe-token-dispatcher-type": "MOE_DISPATCHER",
    "--moe-expert-capacity-factor": "MOE_CAPACITY",
    "--mtp-num-layers": "MTP",
    "--micro-batch-size": "MBS",
    "--global-batch-size": "GBS",
    "--seq-length": "SEQ",
    "--eval-interval": "EVAL_EVERY",
    "--eval-iters": "EVAL_STEPS",
    "--split": "SPLIT",
}
"""Arguments with one value -> the setting with the same meaning."""
_SWITCHES = {
    "--sequence-parallel": ("SP", "1"),
    "--account-for-embedding-in-pipeline-split": ("EMBEDDING_AS_LAYER", "1"),
    "--account-for-loss-in-pipeline-split": ("LOSS_AS_LAYER", "1"),
    "--tp-comm-overlap": ("TP_OVERLAP", "1"),
    "--overlap-moe-expert-parallel-comm": ("EP_OVERLAP", "1"),
    "--delay-wgrad-compute": ("DELAY_WGRAD", "1"),
    "--moe-router-fusion": ("ROUTER_FUSION", "1"),
    "--moe-shared-expert-overlap": ("SHARED_EXPERT_OVERLAP", "1"),
    "--deterministic-mode": ("DETERMINISTIC", "1"),
    "--recompute-activations": ("RECOMPUTE", "selective"),
    "--cross-entropy-loss-fusion": ("CROSS_ENTROPY_FUSION", "1"),
    "--fp8-param-gather": ("FP8_PARAMS", "1"),
    "--no-create-attention-mask-in-dataloader": ("ATTENTION_MASK", "0"),
    "--no-gradient-accumulation-fusion": ("GRAD_FUSION", "0"),
}
_CHOICES = {
    "--optimizer": ("OPTIMIZER", ("adam", "muon")),
    "--moe-flex-dispatcher-backend": ("MOE_BACKEND", ("deepep", "hybridep")),
    "--cross-entropy-fusion-impl": ("CROSS_ENTROPY_IMPL", ("native", "te")),
}
_MODEL_NUMBERS = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--kv-channels": "kv_channels",
    "--rotary-base": "rotary_base",
    "--vocab-size": "vocab_size",
    "--moe-router-topk": "moe_router_topk",
    "--moe-ffn-hidden-size": "moe_ffn_hidden_size",
    "--num-experts": "num_experts",
}
_MODEL_FRACTIONS = {"--norm-epsilon": "norm_epsilon"}
_MODEL_SWITCHES: dict[str, tuple[str, Any]] = {
    "--disable-bias-linear": ("add_bias_linear", False),
    "--swiglu": ("activation", "swiglu"),
    "--untie-embeddings-and-output-weights": ("untie_embeddings", True),
    "--qk-layernorm": ("qk_norm", "head"),
    "--attention-output-gate": ("attention_output_gate", True),
    "--moe-router-pre-softmax": ("moe_router_pre_softmax", True),
}
_MODEL_CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "--normalization": ("normalization", {"LayerNorm": "LayerNorm", "RMSNorm": "RMSNorm"}),
    "--position-embedding-type": (
        "position_embedding",
        {"learned_absolute": "learned_absolute", "rope": "rope"},
    ),
    "--softmax-type": ("attention_sinks", {"vanilla": False, "learnable": True}),
}
_OF_EXPERTS = (
    "--num-experts",
    "--moe-router-topk",
    "--moe-ffn-hidden-size",
    "--moe-router-pre-softmax",
)
"""Only for rows with experts: these alone do not turn a dense model into a mixture."""

NEUTRAL = frozenset(
    {
        "--lr",
        "--min-lr",
        "--lr-decay-style",
        "--lr-decay-iters",
        "--lr-warmup-fraction",
        "--lr-warmup-iters",
        "--lr-warmup-init",
        "--lr-wsd-decay-style",
        "--lr-wsd-decay-iters",
        "--weight-decay",
        "--start-weight-decay",
        "--end-weight-decay",
        "--weight-decay-incr-style",
        "--adam-beta1",
        "--adam-beta2",
        "--adam-eps",
        "--clip-grad",
        "--muon-momentum",
        "--muon-extra-scale-factor",
        "--seed",
        "--init-method-std",
        "--override-opt_param-scheduler",
        "--override-opt-param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
        "--verify-integrity",
        "--ckpt-format",
        "--exit-interval",
        "--exit-duration-in-mins",
        "--log-timers-to-tensorboard",
    }
)
"""Arguments that change neither the memory nor the time of a step."""

_OWNED = {
    "--hierarchical-context-parallel-sizes": "CP_COMM_TYPE=a2a+p2p CP_A2A=",
    "--save": "SAVE=1, or SAVE=folder",
    "--load": "LOAD=label, or a folder",
    **dict.fromkeys(("--save-interval", "--persistent-save-interval"), "SAVE_EVERY=50"),
    **dict.fromkeys(
        (
            "--data-path",
            "--train-data-path",
            "--valid-data-path",
            "--test-data-path",
            "--data-args-path",
            "--data-cache-path",
            "--per-split-data-args-path",
        ),
        "make data-prepare, then DATA=name",
    ),
    "--mock-data": "DATA=mock",
    "--sft": "DATA= of conversations (make data-chat)",
    "--ckpt-step": "LOAD=folder, which takes the newest",
    "--pretrained-checkpoint": "WEIGHTS=name",
    "--use-checkpoint-args": "WEIGHTS=name, which brings its model",
    **dict.fromkeys(
        ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy"),
        "SAVE=1, which saves asynchronously where upstream can",
    ),
    "--train-samples": "STEPS=",
    "--tensorboard-dir": "the run directory, which contains it",
    "--wandb-project": "WANDB_PROJECT=",
    "--wandb-exp-name": "WANDB_NAME=",
    "--wandb-entity": "WANDB_ENTITY=",
    "--wandb-save-dir": "WANDB=, into the run directory",
    "--distributed-backend": "DEVICE=",
    "--yaml-cfg": "a row in experiments/",
    "--lora-rank": "LORA_RANK=",
    "--lora-alpha": "LORA_ALPHA=",
    "--lora-dropout": "LORA_DROPOUT=",
    "--lora-targets": "LORA_TARGETS=",
}
"""Arguments that the harness passes itself and reads back later -> what to use instead."""
_HINTS = {
    "--use-distributed-optimizer": "SHARDING=optim",
    "--use-megatron-fsdp": "SHARDING=fsdp_optim_grads_params",
    "--data-parallel-sharding-strategy": "SHARDING=",
    "--use-torch-fsdp2": "SHARDING=torch_fsdp2",
    "--fp8-format": "FP8=",
    "--fp8-recipe": "FP8=",
    "--fp4-format": "FP4=",
    "--fp4-recipe": "FP4=",
    "--cuda-graph-impl": "CUDA_GRAPHS=1",
    "--exp-avg-dtype": "OPTIMIZER_STATE=bf16",
    "--use-precision-aware-optimizer": "OPTIMIZER_STATE=bf16",
    "--optimizer-cpu-offload": "OFFLOAD=1",
    "--optimizer-offload-fraction": "OFFLOAD=",
    "--attention-dropout": "DROPOUT=",
    "--hidden-dropout": "DROPOUT=",
    "--recompute-granularity": "RECOMPUTE=",
}
"""Arguments -> the setting on the same subject, whose values are spelled otherwise."""


@dataclass(frozen=True)
class Argument:
    """One argument and its values, as they stand in ``ARGS=``."""

    option: str
    values: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (self.option, *self.values)

    def __str__(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Translation:
    """``ARGS=`` as settings, fields of the model, fields of the experiment, and a rest."""

    settings: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    """For upstream alone."""
    kept: tuple[str, ...] = ()
    """Everything but the settings, as it was given."""


def split(text: str) -> list[str]:
    """``ARGS=text`` split as a shell does. Raises UserError if a quotation does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"ARGS={text}: {error}") from None


def arguments(words: Iterable[str]) -> list[Argument]:
    """``words`` grouped by argument; those before the first ``--`` form one without a name."""
    found: list[Argument] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            found.append(Argument(option, (value,) if equals else ()))
        else:
            last = found.pop() if found else Argument("", ())
            found.append(Argument(last.option, (*last.values, word)))
    return found


def by_option(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Option -> its values. If an option occurs twice the last one counts, as in argparse."""
    return {argument.option: argument.values for argument in arguments(words)}


@lru_cache(64)
def translate(text: str, *, experts: bool = True) -> Translation:
    """Translate ``ARGS=text`` for a row with or without ``experts``.

    Raises:
        UserError: an argument is given twice, is not a number where one is expected, or belongs to
        a setting.
    """
    given = arguments(split(text))
    named = {argument.option: argument for argument in given}
    if len(named) < len(given):
        twice = next(a.option for a in given if sum(b.option == a.option for b in given) > 1)
        raise UserError(f"ARGS={text}: {twice} is given twice; leave one out")
    for argument in given:
        if argument.option in _OWNED:
            raise UserError(
                f"ARGS: the harness sets {argument.option} itself; use {_OWNED[argument.option]}"
            )
    settings: dict[str, str] = {}
    model: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    # options that are settings, then options that are fields
    taken = _recompute(named, settings) | _dropout(named, settings)
    of_fields = _groups(named, model) | _rope_scaling(named, model)
    for argument in given:
        option = argument.option
        if option in taken or option in of_fields:
            continue
        if setting := _setting(argument):
            settings |= setting
            taken.add(option)
        elif (option not in _OF_EXPERTS or experts) and (changed := _of_model(argument)):
            model |= changed
            of_fields.add(option)
        elif more := _field(argument):
            fields |= more
            of_fields.add(option)
    rest = tuple(
        word for a in given if a.option not in taken | of_fields for word in a.words if word
    )
    kept = tuple(word for a in given if a.option not in taken for word in a.words if word)
    return Translation(settings, model, fields, rest, kept)


def unpredictable(extra_args: Iterable[str]) -> list[str]:
    """The options among ``extra_args`` whose effect on memory and time no formula knows."""
    return [argument.option for argument in arguments(extra_args) if argument.option not in NEUTRAL]


def refusal(id_: str, extra_args: Iterable[str]) -> str | None:
    """Why nothing can be predicted with these arguments, and the way out; None where it can."""
    if not (unknown := unpredictable(extra_args)):
        return None
    hints = [f"{hint} replaces {name}" for name in unknown if (hint := _HINTS.get(name))]
    leave = (
        f"leave {'it' if len(unknown) == 1 else 'them'} out, or measure: make {id_} STEPS=20 ARGS=…"
    )
    way_out = "; ".join(hints) or leave
    return f"{id_}: no formula covers {', '.join(unknown)} in ARGS\n{way_out}"


def _setting(argument: Argument) -> dict[str, str]:
    """The setting with the meaning of ``argument``; empty if there is none."""
    option, values = argument.option, argument.values
    if option in _SWITCHES and not values:
        return dict([_SWITCHES[option]])
    if len(values) != 1:
        return {}
    if option in _SETTINGS:
        return {_SETTINGS[option]: values[0]}
    key, known = _CHOICES.get(option, ("", ()))
    return {key: values[0]} if values[0] in known else {}


def _of_model(argument: Argument) -> dict[str, Any]:
    """The model's field with the meaning of ``argument``; empty if there is none."""
    option, values = argument.option, argument.values
    if option in _MODEL_SWITCHES and not values:
        return dict([_MODEL_SWITCHES[option]])
    if len(values) != 1:
        return {}
    if option in _MODEL_NUMBERS:
        return {_MODEL_NUMBERS[option]: _number(argument, int)}
    if option in _MODEL_FRACTIONS:
        return {_MODEL_FRACTIONS[option]: _number(argument, float)}
    name, known = _MODEL_CHOICES.get(option, ("", {}))
    return {name: known[values[0]]} if values[0] in known else {}


def _field(argument: Argument) -> dict[str, Any]:
    """The experiment's field, one without a setting, with the meaning of ``argument``."""
    if argument.option == "--max-position-embeddings" and len(argument.values) == 1:
        return {"positions": _number(argument, int)}
    backends = (("auto",), ("flash",), ("fused",), ("unfused",))
    if argument.option == "--attention-backend" and argument.values in backends:
        return {"attention_backend": argument.values[0]}
    if argument.option == "--recompute-modules" and argument.values:
        return {"recompute_modules": argument.values}
    return {}


def _recompute(given: Mapping[str, Argument], settings: dict[str, str]) -> set[str]:
    """RECOMPUTE=full is upstream's ``uniform`` with one layer; no setting has other methods."""
    how = {"--recompute-method": ("uniform",), "--recompute-num-layers": ("1",)}
    said = {name: given[name].values for name in how if name in given}
    granularity = given.get("--recompute-granularity", Argument("", ())).values
    if granularity == ("full",) and all(how[name] == values for name, values in said.items()):
        settings["RECOMPUTE"] = "full"
    elif granularity == ("selective",) and not said:
        settings["RECOMPUTE"] = "selective"
    else:
        return set()
    return {"--recompute-granularity", *said}


def _dropout(given: Mapping[str, Argument], settings: dict[str, str]) -> set[str]:
    both = ("--attention-dropout", "--hidden-dropout")
    values = {given[name].values for name in both if name in given}
    if not all(name in given for name in both) or len(values) != 1 or len(*values) != 1:
        return set()
    settings["DROPOUT"] = next(iter(values))[0]
    return set(both)


def _groups(given: Mapping[str, Argument], model: dict[str, Any]) -> set[str]:
    names = {"--group-query-attention", "--num-query-groups"} & given.keys()
    if names:
        groups = given.get("--num-query-groups", Argument("--num-query-groups", ("1",)))
        model["num_query_groups"] = _number(groups, int)
    return names


def _rope_scaling(given: Mapping[str, Argument], model: dict[str, Any]) -> set[str]:
    """The factor alone is for rows that scale already; 8 is upstream's default."""
    names = {"--use-rope-scaling", "--rope-scaling-factor"} & given.keys()
    if names:
        factor = given.get("--rope-scaling-factor", Argument("--rope-scaling-factor", ("8.0",)))
        model["rope_scaling_factor"] = _number(factor, float)
    return names


def _number(argument: Argument, kind: type[int] | type[float]) -> int | float:
    try:
        (value,) = argument.values
        return kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"ARGS: {argument}: expected {expected}") from None
