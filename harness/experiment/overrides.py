"""What a user may change on the command line: ``make 408 STEPS=20 VPP=3``."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import get_args

from harness.errors import UserError, nearest, similar
from harness.experiment import understood
from harness.experiment.catalog import Catalog
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import SHARDING, Experiment, Target
from harness.experiment.hardware import required_card
from harness.experiment.model import LinearLayer, Lora, Model
from harness.system import yaml_files

MINIATURE_STEPS = 20
"""Steps of a run on the CPU, unless STEPS= says else."""


@dataclass(frozen=True)
class Setting:
    """One word of the command line and what it does, as ``make help`` prints it."""

    key: str
    example: str
    does: str


EXPERIMENT_SETTINGS = (
    Setting("STEPS", "20", f"training steps (published: 100; CPU default: {MINIATURE_STEPS})"),
    Setting("GPUS", "4", "GPUs in all; data parallelism follows: dp = GPUS / (tp x pp x cp)"),
    Setting("DP", "2", "data-parallel size; GPUs follow"),
    Setting("TP", "2", "tensor-parallel size"),
    Setting("SP", "1", "sequence parallelism, 0 or 1"),
    Setting("PP", "4", "pipeline-parallel size"),
    Setting("VPP", "3", "virtual stages on each pipeline rank"),
    Setting("CP", "2", "context-parallel size"),
    Setting(
        "CP_COMM_TYPE",
        "a2a",
        "what context parallelism exchanges: p2p (a ring), all_gather, or a2a (heads)",
    ),
    Setting("EP", "4", "expert-parallel size"),
    Setting("ETP", "2", "expert tensor-parallel size"),
    Setting("MBS", "2", "micro-batch size, in sequences"),
    Setting("GBS", "16", "global batch size, in sequences"),
    Setting("SEQ", "2048", "sequence length, in tokens"),
    Setting("RECOMPUTE", "full", "activation recomputation: none, selective or full"),
    Setting("DROPOUT", "0", "share of hidden states and of attention weights that training drops"),
    Setting("CROSS_ENTROPY_FUSION", "1", "the loss in fewer kernels, 0 or 1"),
    Setting(
        "CUDA_GRAPHS",
        "1",
        "launch a layer's kernels together, 0 or 1: for GPUs that wait for the CPU",
    ),
    Setting(
        "FP8",
        "tensorwise",
        "linear layers in fp8, scaled: delayed, tensorwise or blockwise; 0: bf16",
    ),
    Setting("OPTIMIZER", "muon", "adam or muon"),
    Setting(
        "OPTIMIZER_STATE", "bf16", "precision of Adam's moments, fp32 or bf16 (with SHARDING=optim)"
    ),
    Setting("SHARDING", "optim", "what data parallelism shards: " + ", ".join(SHARDING)),
    Setting("NODES", "2", "nodes; each runs GPUS / NODES ranks"),
    Setting(
        "DATA", "mock", 'mock, a prepared data set (make data-list), or a blend: DATA="a:0.7 b:0.3"'
    ),
    Setting("SPLIT", "949,50,1", "shares of the data for training, validation and test"),
    Setting(
        "WEIGHTS",
        "llama3-8b",
        "start from these: a name in weights/ (make import-hf), a run, or a folder",
    ),
    Setting(
        "LORA_RANK", "16", "train adapters of this rank beside frozen weights; 0: train the weights"
    ),
    Setting(
        "LORA_ALPHA", "32", "what adapters add is scaled by alpha / rank (default: twice the rank)"
    ),
    Setting("LORA_DROPOUT", "0.05", "dropout of the adapters' input"),
    Setting(
        "LORA_TARGETS",
        "linear_qkv,linear_proj",
        "layers that get an adapter (default: linear_fc1, linear_fc2 too)",
    ),
    Setting(
        "LR", "3e-4", "highest learning rate, decaying over STEPS (published: 6e-5, over 430000)"
    ),
    Setting("MIN_LR", "3e-5", "lowest learning rate (default: a tenth of LR)"),
    Setting("LR_DECAY", "linear", "how it falls: cosine, linear, constant or inverse-square-root"),
    Setting("LR_WARMUP", "100", "steps in which it rises from 0 (default: 5% of STEPS)"),
    Setting("EVAL_EVERY", "50", "steps between evaluations on held-out data"),
    Setting("EVAL_STEPS", "10", "batches of one evaluation; 0: none"),
    Setting("UNTIL", "3.2", "stop at this loss on held-out data; STEPS at most"),
    Setting(
        "LOAD",
        "label",
        "go on from the newest checkpoint of a run, or of a folder; another layout will do",
    ),
    Setting("CARD", "h100-80gb", "behave as a smaller card: cap the memory as on that GPU"),
    Setting(
        "PROFILE",
        "1",
        "trace steps 8-9, or PROFILE=8-10: where does the time of a step go? (make profile)",
    ),
    Setting("ARGS", '"--lr 1e-4"', "more of upstream's own arguments (make arguments)"),
)
"""Settings that change the experiment itself, and therefore its label."""

LAUNCH_SETTINGS = (
    Setting("DEVICE", "cpu", "cpu (a miniature) or cuda; found by itself"),
    Setting("DRY_RUN", "1", "print the command, run nothing"),
    Setting("GPUS_IDS", "0,1", "the GPUs to use, by index"),
    Setting("OUTDIR", "outdir", "where run directories go"),
    Setting("NODE_RANK", "0", "which of NODES this machine is"),
    Setting("RENDEZVOUS", "host:29500", "where the nodes meet"),
    Setting("SLURM", "1", "render an sbatch script; submit it where sbatch exists"),
    Setting("PARTITION", "gpu", "Slurm partition (with SLURM=1)"),
    Setting("ACCOUNT", "team", "Slurm account (with SLURM=1)"),
    Setting("TIME", "00:30:00", "Slurm time limit (with SLURM=1)"),
    Setting("SAVE", "1", "keep checkpoints: 1 in the run directory, or a folder; 0: none"),
    Setting("SAVE_EVERY", "50", "steps between checkpoints (default: one, at the end)"),
    Setting("KEEP", "2", "checkpoints to keep, the newest (default: all)"),
    Setting(
        "RESUME",
        "1",
        "continue the run of these settings, or RESUME=label, from its newest whole checkpoint",
    ),
    Setting("WANDB", "offline", "log to Weights & Biases: offline (wandb sync later) or online"),
    Setting("WANDB_PROJECT", "megatron", "its project (with WANDB=)"),
    Setting("WANDB_ENTITY", "team", "its user or team (with WANDB=)"),
    Setting("WANDB_NAME", "first", "name of the run there (default: the label)"),
    Setting("HANG", "300", "seconds without a step before a run counts as hung"),
    Setting("PACK", "0", "make chapter-N: 0 runs one experiment at a time, for timing"),
    Setting(
        "FORCE",
        "1",
        "make chapter-N: run again what has a result; RESUME=: take settings that change the"
        " losses",
    ),
)
"""Settings of how and where it is launched; the experiment stays the same."""

SETTINGS = EXPERIMENT_SETTINGS + LAUNCH_SETTINGS
SWITCHES = ("DRY_RUN", "SLURM", "PACK", "FORCE", "ALL", "CHECK", "YES", "VERIFY")
"""What is 0 or 1 and nothing else, whichever command it belongs to: DRY_RUN=yes is no dry run."""

SAME_WORK = frozenset({"STEPS", "DATA", "CARD", "EVAL_EVERY", "EVAL_STEPS"})
"""Settings that leave a step's work as it was; with any other, a run is no longer what was
published."""

_COUNTS = {
    "STEPS": "steps",
    "DP": "dp",
    "TP": "tp",
    "PP": "pp",
    "VPP": "vpp",
    "CP": "cp",
    "EP": "ep",
    "ETP": "etp",
    "MBS": "micro_batch_size",
    "GBS": "global_batch_size",
    "SEQ": "seq_length",
    "NODES": "nodes",
    "EVAL_EVERY": "eval_interval",
}
_COUNTS_FROM_0 = {"EVAL_STEPS": "eval_steps", "LR_WARMUP": "lr_warmup_steps"}
_RATES = {"LR": "lr", "MIN_LR": "min_lr"}
PROFILED_STEPS = (8, 9)
"""What PROFILE=1 traces: compilation, tuning and the allocator's growth are over by then."""
_CHOICES = {
    "RECOMPUTE": "recompute",
    "SHARDING": "sharding",
    "OPTIMIZER": "optimizer",
    "OPTIMIZER_STATE": "optimizer_state",
    "LR_DECAY": "lr_decay",
    "CP_COMM_TYPE": "cp_comm_type",
}
_SWITCHES = {
    "SP": "sequence_parallel",
    "CROSS_ENTROPY_FUSION": "cross_entropy_fusion",
    "CUDA_GRAPHS": "cuda_graphs",
}
_TEXTS = {"DATA": "data", "SPLIT": "split", "LOAD": "load", "WEIGHTS": "weights"}
_OTHERS = {
    "GPUS": "dp",
    "DROPOUT": "model",
    "CARD": "card",
    "ARGS": "extra_args",
    "UNTIL": "until",
    "PROFILE": "profile",
    "FP8": "fp8_recipe",
    **dict.fromkeys(("LORA_RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS"), "lora"),
}
FIELDS = _COUNTS | _COUNTS_FROM_0 | _RATES | _CHOICES | _SWITCHES | _TEXTS | _OTHERS
"""Setting -> the field of an experiment that it changes."""


def parse(words: Iterable[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Read ``KEY=VALUE`` words; an empty value counts as not given. ``extra`` are the command's own
    keys.

    Raises:
        UserError: a word has no ``=``, its key is unknown, or one of SWITCHES is neither 0 nor 1.
    """
    known = [*(setting.key for setting in SETTINGS), *extra]
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not of the form KEY=VALUE, such as STEPS=20")
        if key not in known:
            meant = similar(key.upper(), [key.upper()] if key.upper() in known else known)
            raise UserError(f"unknown setting {key}; {meant or 'make help lists all'}")
        if key in SWITCHES and value:
            switch(key, value)
        if value:
            found[key] = value
    return found


def require(settings: Mapping[str, str], keys: Iterable[str], usage: str) -> None:
    """Raise UserError, which ends with ``usage``, where one of ``keys`` is not given."""
    if missing := [key for key in keys if key not in settings]:
        raise UserError(f"{' and '.join(missing)} missing: {usage}")


def choice(key: str, value: str, valid: Collection[str]) -> str:
    """``value`` of ``KEY=value``. Raises UserError where it is none of ``valid``."""
    if value not in valid:
        raise UserError(f"{key}={value}; {nearest(value, valid)}")
    return value


def count(key: str, value: str, least: int = 1) -> int:
    """The whole number in ``KEY=value``. Raises UserError where it is none or below ``least``."""
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise UserError(f"{key}={value}: expected a whole number, {least} or more")
    return int(value)


def count_in(settings: Mapping[str, str], key: str) -> int | None:
    """The whole number that ``key`` is set to, 1 or more; None where it is not given."""
    return count(key, settings[key]) if key in settings else None


def non_negative(key: str, value: str) -> float:
    """The number in ``KEY=value``. Raises UserError where it is no finite number, 0 or more."""
    return _number(key, value, math.inf, "a number, 0 or more")


def _share(key: str, value: str) -> float:
    return _number(key, value, 1, "a number from 0 to below 1")


def _number(key: str, value: str, below: float, expected: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < below:
        raise UserError(f"{key}={value}: expected {expected}")
    return number


def switch(key: str, value: str) -> bool:
    """The yes or no in ``KEY=value``: 1 or 0."""
    if value not in ("0", "1"):
        raise UserError(f"{key}={value}: expected 0 or 1")
    return value == "1"


def given(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of the experiment that were given, whether or not they differ from the
    catalogue's, in order.

    Those that ARGS= says are among them; of ARGS= remains what no setting says.

    Raises:
        UserError: ARGS= makes no sense, or says another value than a setting.
    """
    said = understood.understand(settings.get("ARGS", ""))
    for key, value in said.settings.items():
        if settings.get(key, value) != value:
            raise UserError(f"{key}={settings[key]}, and ARGS says {key}={value}; leave one out")
    left = {**settings, **said.settings} | {"ARGS": shlex.join(said.kept)}
    return {s.key: left[s.key] for s in EXPERIMENT_SETTINGS if left.get(s.key)}


def apply(
    experiment: Experiment, settings: Mapping[str, str], brought: Mapping[str, object] | None = None
) -> Experiment:
    """The experiment as the user wants it; settings that change nothing leave no trace in its
    label.

    ``GPUS`` fixes the ranks in all, so that the data-parallel size follows; without it the ranks
    follow from the sizes.

    Args:
        brought: fields that the weights to start from set, their model above all. Sizes are checked
        against these.

    Raises:
        UserError: a value is no number, or the sizes do not fit together (the formula is given with
        its values).
    """
    if brought:
        experiment = experiment.model_copy(
            update={name: value for name, value in brought.items() if name != "weights"}
        )
    asked = given(settings)
    changes = _changes(experiment, asked)
    effective = {
        field: value for field, value in changes.items() if getattr(experiment, field) != value
    }
    if not effective and not brought and "ARGS" not in asked:
        return experiment
    kept = {key: value for key, value in asked.items() if FIELDS[key] in effective or key == "ARGS"}
    weights = {"weights": brought["weights"]} if brought else {}
    return with_changes(experiment, **effective | weights, overrides=kept)


def _changes(experiment: Experiment, given: Mapping[str, str]) -> dict[str, object]:
    """Every field that the ``given`` settings set, with its value, be it another than the
    experiment's or not."""
    changes: dict[str, object] = {
        field: count(key, given[key]) for key, field in _COUNTS.items() if key in given
    }
    changes |= {
        field: count(key, given[key], least=0)
        for key, field in _COUNTS_FROM_0.items()
        if key in given
    }
    changes |= {
        field: non_negative(key, given[key]) for key, field in _RATES.items() if key in given
    }
    for key, field in _CHOICES.items():
        if key in given:
            changes[field] = choice(
                key, given[key], get_args(Experiment.model_fields[field].annotation)
            )
    changes |= {field: switch(key, given[key]) for key, field in _SWITCHES.items() if key in given}
    if "FP8" in given:
        changes |= _fp8(experiment, given["FP8"])
    if "DROPOUT" in given:
        changes["model"] = experiment.model.model_copy(
            update={"dropout": _share("DROPOUT", given["DROPOUT"])}
        )
    changes |= {field: given[key] for key, field in _TEXTS.items() if key in given}
    if "CARD" in given:
        required_card(given["CARD"], f"CARD={given['CARD']}")
        changes["card"] = given["CARD"]
    if "PROFILE" in given:
        changes["profile"] = _profiled_steps(given["PROFILE"])
    if lora_keys := [key for key in given if key.startswith("LORA_")]:
        changes["lora"] = _lora(experiment, {key: given[key] for key in lora_keys})
    if "UNTIL" in given:
        changes["until"] = _target(experiment, non_negative("UNTIL", given["UNTIL"]))
    if "ARGS" in given:
        said = _said(experiment, given)
        changes |= {"extra_args": said.rest, **said.fields}
        changes["model"] = changed_model(changes.get("model", experiment.model), said.model)
    if "GPUS" in given:
        changes["dp"] = _data_parallel_size(experiment, changes, count("GPUS", given["GPUS"]))
    if changes.get("recompute", "selective") != "selective":
        changes["recompute_modules"] = ()
    if changes.get("tp") == 1 and "SP" not in given:
        changes["sequence_parallel"] = False
    if changes.get("pp") == 1 and "VPP" not in given:
        changes["vpp"] = 1
    return changes


def changed_model(model: Model, fields: Mapping[str, object]) -> Model:
    """``model`` with ``fields`` of ARGS=. Raises UserError where a value is out of range."""
    return yaml_files.build(
        Model, {name: getattr(model, name) for name in Model.model_fields} | fields, "ARGS"
    )


def explicit_model(experiment: Experiment, model: Model) -> Model:
    """``model`` with what ARGS= of the command line says of a model, as it stands in the overrides
    of ``experiment``."""
    return changed_model(model, _said(experiment, experiment.overrides).model)


def _said(experiment: Experiment, settings: Mapping[str, str]) -> understood.Understood:
    return understood.understand(
        settings.get("ARGS", ""), experts=experiment.model.num_experts is not None
    )


def typed(settings: Mapping[str, object]) -> str:
    """``settings`` as the words after ``make <id>``, quoted for a shell."""
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())


def made(words: str, catalog: Catalog) -> Experiment:
    """What ``make WORDS`` runs, such as ``420 GPUS=4 TP=4``. Raises UserError where it runs
    nothing."""
    try:
        id_, *settings = shlex.split(words) or [""]
    except ValueError as error:
        raise UserError(f"{words}: {error}") from None
    return apply(catalog.find(id_), parse(settings))


def words(experiment: Experiment) -> str:
    """What ``make`` takes for the same step: its id, and settings that change its work."""
    settings = typed(
        {key: value for key, value in experiment.overrides.items() if key not in SAME_WORK}
    )
    return f"{experiment.id} {settings}".rstrip()


def is_same_work(experiment: Experiment, allowed: Set[str] = SAME_WORK) -> bool:
    """Whether its step does what the catalogue's does: it has no overrides but the ``allowed``
    ones."""
    return not experiment.extra_args and allowed >= experiment.overrides.keys()


def admitted(experiment: Experiment, settings: Mapping[str, int | str]) -> Experiment | None:
    """``experiment`` with ``settings``, or None where it does not admit them."""
    try:
        return apply(experiment, {key: str(value) for key, value in settings.items()})
    except UserError:
        return None


def _target(experiment: Experiment, loss: float) -> Target:
    """UNTIL= holds for a miniature as well, in as many steps as it takes anyway."""
    if not loss:
        raise UserError("UNTIL=0: no loss ever reaches 0")
    steps = experiment.until.miniature_steps if experiment.until else MINIATURE_STEPS
    return Target(validation_loss=loss, miniature_loss=loss, miniature_steps=steps)


def _fp8(experiment: Experiment, recipe: str) -> dict[str, str | None]:
    if recipe == "0":
        return {
            "precision": "bf16" if experiment.fp8_recipe else experiment.precision,
            "fp8_recipe": None,
        }
    recipes = get_args(get_args(Experiment.model_fields["fp8_recipe"].annotation)[0])
    return {"precision": "fp8", "fp8_recipe": choice("FP8", recipe, (*recipes, "0"))}


def _lora(experiment: Experiment, given: Mapping[str, str]) -> Lora | None:
    """The adapters that ``LORA_…`` settings make of the experiment's own."""
    rank = count("LORA_RANK", given["LORA_RANK"], least=0) if "LORA_RANK" in given else None
    known = experiment.lora
    if rank is None and known is None:
        raise UserError(
            f"{', '.join(given)}: {experiment.id} has no adapters; give LORA_RANK=, such as"
            " LORA_RANK=16"
        )
    if rank == 0:
        if len(given) > 1:
            raise UserError(
                "LORA_RANK=0 trains the weights; leave out"
                f" {', '.join(sorted(set(given) - {'LORA_RANK'}))}"
            )
        return None
    rank = rank or known.rank
    targets = (
        tuple(given["LORA_TARGETS"].replace(",", " ").split()) if "LORA_TARGETS" in given else None
    )
    for target in targets or ():
        if target not in get_args(LinearLayer):
            raise UserError(
                f"LORA_TARGETS={given['LORA_TARGETS']}: {nearest(target, get_args(LinearLayer))}"
            )
    if targets and len(set(targets)) != len(targets):
        raise UserError(f"LORA_TARGETS={given['LORA_TARGETS']}: a layer gets one adapter")
    alpha = non_negative("LORA_ALPHA", given["LORA_ALPHA"]) if "LORA_ALPHA" in given else None
    dropout = _share("LORA_DROPOUT", given["LORA_DROPOUT"]) if "LORA_DROPOUT" in given else None
    if alpha == 0:
        raise UserError(f"LORA_ALPHA={given['LORA_ALPHA']}: expected a number above 0")
    fields = {"rank": rank, "alpha": alpha or (known.scale if known else 2) * rank}
    fields |= {"dropout": known.dropout} | {"targets": known.targets} if known else {}
    fields |= {} if dropout is None else {"dropout": dropout}
    return Lora(**fields | ({"targets": targets} if targets else {}))


def _profiled_steps(value: str) -> tuple[int, int] | None:
    if value in ("0", "1"):
        return PROFILED_STEPS if value == "1" else None
    steps = re.fullmatch(r"(\d+)-(\d+)", value, re.ASCII)
    if not steps:
        raise UserError(
            f"PROFILE={value}: expected 1, or the first and the last step to trace, such as 8-10"
        )
    return int(steps[1]), int(steps[2])


def _data_parallel_size(experiment: Experiment, changes: Mapping[str, object], gpus: int) -> int:
    tp, pp, cp = (changes.get(axis, getattr(experiment, axis)) for axis in ("tp", "pp", "cp"))
    if gpus % (tp * pp * cp):
        raise UserError(
            f"{experiment.id}: GPUS={gpus} must divide by tp x pp x cp = {tp} x {pp} x {cp} ="
            f" {tp * pp * cp}; try GPUS={-(-gpus // (tp * pp * cp)) * tp * pp * cp}, or smaller"
            " TP=, PP= or CP="
        )
    dp = gpus // (tp * pp * cp)
    if "dp" in changes and changes["dp"] != dp:
        raise UserError(
            f"{experiment.id}: GPUS={gpus} makes dp = {dp}, but DP={changes['dp']} is given; leave"
            " one out"
        )
    return dp
