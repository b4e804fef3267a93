"""The settings of the command line (``KEY=VALUE``): each declared once, and how a value is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from harness.errors import UserError, nearest, similar
from harness.experiment.experiment import GRAPHABLE, RECOMPUTABLE, SHARDING, Experiment
from harness.experiment.hardware import required_card

MINIATURE_STEPS = 20
"""Steps of a run on the CPU, unless STEPS= is given."""
PROFILED_STEPS = (8, 9)
"""What PROFILE=1 traces: compilation, tuning and the allocator's growth are over by then."""


@dataclass(frozen=True)
class Setting:
    """One setting. Help, parsing, refusal, labels and the comparison of runs follow from it."""

    key: str
    example: str
    does: str
    """What ``make help`` says of it."""
    field: str | None = None
    """The field of an experiment that it sets; None: it only says how a run is launched."""
    read: Callable[[str, str], object] | None = None
    """Turns key and value into the field's value; None: overrides.py does, from several settings
    or from the experiment."""
    changes: Literal["losses", "work", "length"] | None = None
    """What another value of the field changes: the losses; the work of a step, while losses stay
    the same but for rounding and dropout's draws; or only how long the run is and what it watches.
    None: another setting of the field says it."""


def parse(words: Iterable[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """Read ``KEY=VALUE`` words; an empty value counts as not given.

    Args:
        extra: keys of the command itself.

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
    """Raise UserError, which ends with ``usage``, if one of ``keys`` is not given."""
    if missing := [key for key in keys if key not in settings]:
        raise UserError(f"{' and '.join(missing)} missing: {usage}")


def choice(key: str, value: str, valid: Collection[str]) -> str:
    """``value`` of ``KEY=value``. Raises UserError if it is none of ``valid``."""
    if value not in valid:
        raise UserError(f"{key}={value}; {nearest(value, valid)}")
    return value


def count(key: str, value: str, least: int = 1) -> int:
    """The whole number in ``KEY=value``. Raises UserError if it is none or below ``least``."""
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise UserError(f"{key}={value}: expected a whole number, {least} or more")
    return int(value)


def count_in(settings: Mapping[str, str], key: str) -> int | None:
    """The whole number that ``key`` is set to, 1 or more; None if it is not given."""
    return count(key, settings[key]) if key in settings else None


def gpu_ids(settings: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs that ``GPUS_IDS=`` names; None if it is not given. Raises UserError for no index."""
    if not (given := settings.get("GPUS_IDS")):
        return None
    return tuple(count("GPUS_IDS", index, least=0) for index in given.split(","))


def non_negative(key: str, value: str) -> float:
    """The number in ``KEY=value``. Raises UserError if it is not finite and 0 or more."""
    return _number(key, value, math.inf, "a number, 0 or more")


def share(key: str, value: str) -> float:
    """The number in ``KEY=value``. Raises UserError if it is not from 0 to below 1."""
    return _number(key, value, 1, "a number from 0 to below 1")


def whole_share(key: str, value: str) -> float:
    """The number in ``KEY=value``. Raises UserError if it is not from 0 to 1."""
    return _number(key, value, math.nextafter(1, 2), "a number from 0 to 1")


def switch(key: str, value: str) -> bool:
    """The yes or no in ``KEY=value``. Raises UserError if it is neither 1 nor 0."""
    if value not in ("0", "1"):
        raise UserError(f"{key}={value}: expected 0 or 1")
    return value == "1"


def _number(key: str, value: str, below: float, expected: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < below:
        raise UserError(f"{key}={value}: expected {expected}")
    return number


def _count_from_0(key: str, value: str) -> int:
    return count(key, value, least=0)


def _count_or_none(key: str, value: str) -> int | None:
    return count(key, value, least=0) or None


def _positive_or_none(key: str, value: str) -> float | None:
    return non_negative(key, value) or None


def _text(_key: str, value: str) -> str:
    return value


def _text_or_none(_key: str, value: str) -> str | None:
    return None if value == "0" else value


def _choice_of(field: str) -> Callable[[str, str], str]:
    """Reads one of the values that the ``field`` of an experiment may have."""
    return lambda key, value: choice(
        key, value, get_args(Experiment.model_fields[field].annotation)
    )


def _card(key: str, value: str) -> str:
    required_card(value, f"{key}={value}")
    return value


def _graphs(key: str, value: str) -> bool | tuple[str, ...]:
    if value in ("0", "1"):
        return value == "1"
    named = value.split(",")
    if unknown := [name for name in named if name not in GRAPHABLE]:
        raise UserError(
            f"{key}={value}: expected 0, 1 or modules; {nearest(unknown[0], GRAPHABLE)}"
        )
    return tuple(name for name in GRAPHABLE if name in named)


def _profiled_steps(key: str, value: str) -> tuple[int, int] | None:
    if value in ("0", "1"):
        return PROFILED_STEPS if value == "1" else None
    steps = re.fullmatch(r"(\d+)-(\d+)", value, re.ASCII)
    if not steps:
        raise UserError(
            f"{key}={value}: expected 1, or the first and the last step to trace, such as 8-10"
        )
    return int(steps[1]), int(steps[2])


EXPERIMENT_SETTINGS = (
    Setting(
        "STEPS",
        "20",
        f"training steps (published: 100; CPU default: {MINIATURE_STEPS})",
        "steps",
        count,
        "length",
    ),
    Setting("GPUS", "4", "GPUs in all; data parallelism follows: dp = GPUS / (tp x pp x cp)", "dp"),
    Setting("DP", "2", "data-parallel size; GPUs follow", "dp", count, "work"),
    Setting("TP", "2", "tensor-parallel size", "tp", count, "work"),
    Setting("SP", "1", "sequence parallelism, 0 or 1", "sequence_parallel", switch, "work"),
    Setting(
        "TP_OVERLAP",
        "1",
        "overlap sequence parallelism's exchanges with products, 0 or 1",
        "tp_overlap",
        switch,
        "work",
    ),
    Setting("PP", "4", "pipeline-parallel size", "pp", count, "work"),
    Setting("VPP", "3", "virtual stages on each pipeline rank", "vpp", count, "work"),
    Setting(
        "FIRST_STAGE_LAYERS",
        "2",
        "layers of the first pipeline stage, others share the rest; 0: as many as the others",
        "first_stage_layers",
        _count_or_none,
        "work",
    ),
    Setting(
        "LAST_STAGE_LAYERS",
        "2",
        "layers of the last pipeline stage, in the same way",
        "last_stage_layers",
        _count_or_none,
        "work",
    ),
    Setting(
        "PP_LAYOUT",
        '"Et*7|(t*10|)*6t*5L"',
        "what each stage holds: E embedding, t layer, L loss, | next stage (VPP follows); 0: even",
        "pp_layout",
        _text_or_none,
        "work",
    ),
    Setting(
        "EMBEDDING_AS_LAYER",
        "1",
        "the first stage has one layer less, 0 or 1: 126 layers and the loss divide by PP x VPP",
        "embedding_as_layer",
        switch,
        "work",
    ),
    Setting(
        "LOSS_AS_LAYER",
        "1",
        "the last stage has one layer less, 0 or 1",
        "loss_as_layer",
        switch,
        "work",
    ),
    Setting("CP", "2", "context-parallel size", "cp", count, "work"),
    Setting(
        "CP_COMM_TYPE",
        "a2a",
        "how context parallelism exchanges: p2p (a ring), all_gather, a2a (heads), or a2a+p2p",
        "cp_comm_type",
        _choice_of("cp_comm_type"),
        "work",
    ),
    Setting(
        "CP_A2A",
        "2",
        "ranks of CP that exchange heads by a2a+p2p, a ring between them; else all of a node",
        "cp_a2a",
        count,
        "work",
    ),
    Setting("EP", "4", "expert-parallel size", "ep", count, "work"),
    Setting("ETP", "2", "expert tensor-parallel size", "etp", count, "work"),
    Setting(
        "MOE_DISPATCHER",
        "allgather",
        "how tokens reach experts: alltoall, allgather, or flex (DeepEP, HybridEP)",
        "moe_dispatcher",
        _choice_of("moe_dispatcher"),
        "work",
    ),
    Setting(
        "MOE_BACKEND",
        "hybridep",
        "what sends tokens with MOE_DISPATCHER=flex: deepep or hybridep",
        "moe_backend",
        _choice_of("moe_backend"),
        "work",
    ),
    Setting(
        "MOE_CAPACITY",
        "1.25",
        "rows an expert takes, relative to an even share; other tokens are dropped (0: all)",
        "moe_capacity",
        _positive_or_none,
        "losses",
    ),
    Setting(
        "ROUTER_FUSION",
        "1",
        "choose experts by one kernel, 0 or 1",
        "router_fusion",
        switch,
        "work",
    ),
    Setting(
        "SHARED_EXPERT_OVERLAP",
        "1",
        "compute the shared expert while tokens are sent to the others, 0 or 1",
        "shared_expert_overlap",
        switch,
        "work",
    ),
    Setting(
        "EP_OVERLAP",
        "1",
        "send tokens to experts while another micro-batch computes, 0 or 1",
        "ep_overlap",
        switch,
        "work",
    ),
    Setting(
        "DELAY_WGRAD",
        "1",
        "compute weights' gradients while tokens are sent, 0 or 1 (with EP_OVERLAP=1)",
        "delay_wgrad",
        switch,
        "work",
    ),
    Setting(
        "GROUPED_GEMM",
        "cublas",
        "experts' products: streams (one each), or in one launch: cutlass, cublas, fused",
        "grouped_gemm",
        _choice_of("grouped_gemm"),
        "work",
    ),
    Setting("MBS", "2", "micro-batch size, in sequences", "micro_batch_size", count, "work"),
    Setting("GBS", "16", "global batch size, in sequences", "global_batch_size", count, "losses"),
    Setting("SEQ", "2048", "sequence length, in tokens", "seq_length", count, "losses"),
    Setting(
        "RECOMPUTE",
        "full",
        "activation recomputation: none, selective or full",
        "recompute",
        _choice_of("recompute"),
        "work",
    ),
    Setting(
        "RECOMPUTE_MODULES",
        "moe_act,layernorm",
        "what selective recomputation covers: " + ", ".join(RECOMPUTABLE),
        "recompute_modules",
        changes="work",
    ),
    Setting(
        "ENTRY",
        "hybrid",
        "upstream's model: gpt, or hybrid, which is to follow it (pretrain_hybrid.py)",
        "entry",
        _choice_of("entry"),
        "losses",
    ),
    Setting(
        "DROPOUT",
        "0",
        "share of hidden states and of attention weights that training drops",
        "model",
    ),
    Setting(
        "MTP",
        "1",
        "layers after the last one that predict more tokens ahead, one each",
        "model",
    ),
    Setting(
        "CROSS_ENTROPY_FUSION",
        "1",
        "the loss in fewer kernels, 0 or 1",
        "cross_entropy_fusion",
        switch,
        "work",
    ),
    Setting(
        "CROSS_ENTROPY_IMPL",
        "te",
        "whose fused loss: native, or te (Transformer Engine's: predicted, upstream refuses it)",
        "cross_entropy_fusion_impl",
        _choice_of("cross_entropy_fusion_impl"),
        "work",
    ),
    Setting(
        "ATTENTION_MASK",
        "0",
        "hand a causal mask to attention, 0 or 1: MBS x SEQ^2 bytes that its kernels do not read",
        "attention_mask",
        switch,
        "work",
    ),
    Setting(
        "GRAD_FUSION",
        "1",
        "add weights' gradients up within their products, 0 or 1: default where Apex is installed",
        "gradient_fusion",
        switch,
        "work",
    ),
    Setting(
        "DETERMINISTIC",
        "1",
        "repeat losses bit by bit, with slower kernels, 0 or 1",
        "deterministic",
        switch,
        "work",
    ),
    Setting(
        "CUDA_GRAPHS",
        "1",
        "launch a layer's kernels as a graph: 1, or only those of " + ", ".join(GRAPHABLE),
        "cuda_graphs",
        _graphs,
        "work",
    ),
    Setting(
        "FP8",
        "tensorwise",
        "linear layers in fp8, scaled: delayed, tensorwise, blockwise, mxfp8 (Blackwell); 0: bf16",
        "fp8_recipe",
        changes="losses",
    ),
    Setting(
        "FP4",
        "nvfp4",
        "linear layers in fp4, scaled: nvfp4, 16 values together (Blackwell); 0: bf16",
        "fp4_recipe",
        changes="losses",
    ),
    Setting("OPTIMIZER", "muon", "adam or muon", "optimizer", _choice_of("optimizer"), "losses"),
    Setting(
        "OPTIMIZER_STATE",
        "bf16",
        "precision of Adam's moments, fp32 or bf16 (with SHARDING=optim)",
        "optimizer_state",
        _choice_of("optimizer_state"),
        "losses",
    ),
    Setting(
        "OFFLOAD",
        "0.5",
        "share of Adam's state that host memory holds and the CPU updates (with SHARDING=optim)",
        "offload",
        whole_share,
        "work",
    ),
    Setting(
        "GRADIENTS",
        "bf16",
        "precision in which gradients are summed, fp32 or bf16",
        "gradients",
        _choice_of("gradients"),
        "losses",
    ),
    Setting(
        "SHARDING",
        "optim",
        "what data parallelism shards: " + ", ".join(SHARDING),
        "sharding",
        _choice_of("sharding"),
        "work",
    ),
    Setting(
        "OPTIM_INSTANCES",
        "2",
        "copies of what is sharded: each over DP x CP / OPTIM_INSTANCES ranks (HSDP)",
        "optimizer_instances",
        count,
        "work",
    ),
    Setting(
        "FP8_PARAMS",
        "1",
        "keep and gather linear layers' weights in fp8, 0 or 1 (with FP8= and SHARDING=optim)",
        "fp8_params",
        switch,
        "losses",
    ),
    Setting(
        "OVERLAP",
        "0",
        "exchange gradients and weights while computing, 0 or 1 (with SHARDING=optim)",
        "overlap",
        switch,
        "work",
    ),
    Setting("NODES", "2", "nodes; each runs GPUS / NODES ranks", "nodes", count, "work"),
    Setting(
        "DATA",
        "mock",
        'mock, a prepared data set (make data-list), or a blend: DATA="a:0.7 b:0.3"',
        "data",
        _text,
        "losses",
    ),
    Setting(
        "SPLIT",
        "949,50,1",
        "shares of the data for training, validation and test",
        "split",
        _text,
        "losses",
    ),
    Setting(
        "WEIGHTS",
        "llama3-8b",
        "start from these: a name in weights/ (make import-hf), a run, or a folder",
        "weights",
        _text,
        "losses",
    ),
    Setting(
        "LORA_RANK",
        "16",
        "train adapters of this rank, with frozen weights; 0: train the weights",
        "lora",
        changes="losses",
    ),
    Setting(
        "LORA_ALPHA",
        "32",
        "what adapters add is scaled by alpha / rank (default: twice the rank)",
        "lora",
    ),
    Setting("LORA_DROPOUT", "0.05", "dropout of the adapters' input", "lora"),
    Setting(
        "LORA_TARGETS",
        "linear_qkv,linear_proj",
        "layers that get an adapter (default: linear_fc1, linear_fc2 too)",
        "lora",
    ),
    Setting(
        "LR",
        "3e-4",
        "highest learning rate, decaying over STEPS (published: 6e-5, over 430000)",
        "lr",
        non_negative,
        "losses",
    ),
    Setting(
        "MIN_LR",
        "3e-5",
        "lowest learning rate (default: a tenth of LR)",
        "min_lr",
        non_negative,
        "losses",
    ),
    Setting(
        "LR_DECAY",
        "linear",
        "how it falls: cosine, linear, constant or inverse-square-root",
        "lr_decay",
        _choice_of("lr_decay"),
        "losses",
    ),
    Setting(
        "LR_WARMUP",
        "100",
        "steps in which it rises from 0 (default: 5% of STEPS)",
        "lr_warmup_steps",
        _count_from_0,
        "losses",
    ),
    Setting(
        "EVAL_EVERY",
        "50",
        "steps between evaluations on held-out data",
        "eval_interval",
        count,
        "length",
    ),
    Setting(
        "EVAL_STEPS",
        "10",
        "batches of one evaluation; 0: none",
        "eval_steps",
        _count_from_0,
        "length",
    ),
    Setting(
        "UNTIL",
        "3.2",
        "stop at this loss on held-out data; STEPS at most",
        "until",
        changes="length",
    ),
    Setting(
        "LOAD",
        "label",
        "continue from the newest checkpoint of a run or a folder, under any layout",
        "load",
        _text,
        "losses",
    ),
    Setting(
        "CARD",
        "h100-80gb",
        "emulate a smaller card: cap the memory as on that GPU",
        "card",
        _card,
        "work",
    ),
    Setting(
        "PROFILE",
        "1",
        "trace steps 8-9, or PROFILE=8-10: where does the time of a step go? (make profile)",
        "profile",
        _profiled_steps,
        "length",
    ),
    Setting(
        "ARGS", '"--lr 1e-4"', "more of upstream's own arguments (make arguments)", "extra_args"
    ),
)
"""Settings that change the experiment itself, and therefore its label."""

LAUNCH_SETTINGS = (
    Setting("DEVICE", "cpu", "cpu (a miniature) or cuda; detected if not given"),
    Setting("DRY_RUN", "1", "print the command, run nothing"),
    Setting("GPUS_IDS", "0,1", "the GPUs to use, by index"),
    Setting("OUTDIR", "outdir", "where run directories go"),
    Setting("NODE_RANK", "0", "which of NODES this machine is"),
    Setting("RENDEZVOUS", "host:29500", "address at which the nodes rendezvous"),
    Setting("SLURM", "1", "render an sbatch script; submit it where sbatch exists"),
    Setting("PARTITION", "gpu", "Slurm partition (with SLURM=1)"),
    Setting("ACCOUNT", "team", "Slurm account (with SLURM=1)"),
    Setting("TIME", "00:30:00", "Slurm time limit (with SLURM=1)"),
    Setting("QOS", "normal", "Slurm quality of service (with SLURM=1)"),
    Setting("CONSTRAINT", "h100", "features that Slurm's nodes must have (with SLURM=1)"),
    Setting("EXCLUSIVE", "1", "whole nodes, 0 or 1 (with SLURM=1)"),
    Setting(
        "GRACE",
        "300",
        "seconds before the time limit at which a run saves, and its job is requeued (SLURM=1)",
    ),
    Setting("CHAIN", "8", "so many jobs, each resumes where the one before ended (with SLURM=1)"),
    Setting("CLUSTER", "lumi-g", "profile of a cluster: a name in clusters/, or a file"),
    Setting("CONTAINER", "pyxis", "how jobs enter a container: pyxis, apptainer, singularity; 0"),
    Setting("IMAGE", "image.sqsh", "image of that container, or of pods (with K8S=1)"),
    Setting(
        "NUMA_BINDING",
        "exclusive",
        "bind ranks to cores near their GPU (torchrun): node, socket, exclusive, core-complex",
    ),
    Setting(
        "K8S",
        "1",
        "render a Kubernetes JobSet (trainjob: a TrainJob); create it where kubectl exists",
    ),
    Setting("CLAIM", "megatron", "PersistentVolumeClaim of outdir/, data/, weights/ (with K8S=1)"),
    Setting("NAMESPACE", "research", "Kubernetes namespace (with K8S=1)"),
    Setting("QUEUE", "gpu-queue", "Kueue's local queue (with K8S=1)"),
    Setting("RDMA", "rdma/ib:8", "RDMA resource of a node, and how many of it (with K8S=1)"),
    Setting("HOST_NETWORK", "1", "pods use their node's network (with K8S=1)"),
    Setting("RESTARTS", "3", "times that a JobSet starts again after a failure (with K8S=1)"),
    Setting("SAVE", "1", "keep checkpoints: 1 in the run directory, or a folder; 0: none"),
    Setting("SAVE_EVERY", "50", "steps between checkpoints (default: one, at the end)"),
    Setting("KEEP", "2", "checkpoints to keep, the newest (default: all)"),
    Setting(
        "RESUME",
        "1",
        "resume the run of these settings, or RESUME=label, from its newest whole checkpoint; auto:"
        " start it where there is none",
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
        "make chapter-N: run again what has a result; RESUME=: accept settings that change the"
        " losses",
    ),
)
"""Settings of how and where it is launched; the experiment stays the same."""

SETTINGS = EXPERIMENT_SETTINGS + LAUNCH_SETTINGS
FIELDS = {setting.key: setting.field for setting in EXPERIMENT_SETTINGS}
"""Setting -> the field of an experiment that it changes."""
SWITCHES = (
    *("DRY_RUN", "SLURM", "EXCLUSIVE", "HOST_NETWORK", "PACK", "FORCE"),
    *("ALL", "CHECK", "YES", "VERIFY", "QUICK"),
)
"""0 or 1 and nothing else, whichever command they belong to: DRY_RUN=yes must not run."""
SAME_WORK = frozenset({"STEPS", "DATA", "CARD", "EVAL_EVERY", "EVAL_STEPS"})
"""Settings with which a step still does the work that was published."""
