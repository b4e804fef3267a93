"""The catalogue: models and experiments as validated, frozen values, read from
experiments/*.yaml."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from harness import ROOT
from harness.errors import UserError, nearest
from harness.experiment.constraints import violations
from harness.system import yaml_files

EXPERIMENTS = ROOT / "experiments"

LONGEST_LABEL = 180
"""Characters of a label: room for ``.2`` and for the names of temporary files."""
LONGEST_VALUE = 40

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Id = Annotated[str, Field(pattern=r"^[1-9]\d\dh?$")]

SHARDING = {
    "no_shard": (
        "replicated",
        "every data-parallel rank holds all parameters, gradients and optimizer state",
    ),
    "optim": (
        "ZeRO-2",
        (
            "published as ZeRO-2; upstream's distributed optimizer shards the optimizer state"
            " (ZeRO-1 in memory): gradients are reduce-scattered but held whole, parameters are"
            " replicated"
        ),
    ),
    "fsdp_optim": ("FSDP optim", "Megatron-FSDP optim: optimizer state is sharded (ZeRO-1)"),
    "fsdp_optim_grads": (
        "FSDP grads",
        "Megatron-FSDP optim_grads: optimizer state and gradients are sharded (ZeRO-2)",
    ),
    "fsdp_optim_grads_params": (
        "FSDP",
        "Megatron-FSDP optim_grads_params: parameters are sharded too (ZeRO-3)",
    ),
    "torch_fsdp2": (
        "FSDP2",
        "PyTorch's fully_shard: parameters, gradients and optimizer state are sharded (ZeRO-3)",
    ),
}
"""Sharding level -> (label in tables, what upstream really shards over the data-parallel ranks)."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)


class Yarn(_Frozen):
    """How YaRN stretches rotary positions (Peng et al. 2023, arXiv:2309.00071), in upstream's
    terms."""

    rotary_scaling_factor: Annotated[float, Field(gt=0)]
    original_max_position_embeddings: Count
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    correction_range_round_to_int: bool = True


class Model(_Frozen):
    """An architecture, in upstream's terms."""

    name: str
    num_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    ffn_hidden_size: Count | None = None
    num_query_groups: Count | None = None
    kv_channels: Count | None = None
    vocab_size: Count = 50257
    untie_embeddings: bool = False
    add_bias_linear: bool = True
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    activation: Literal["gelu", "swiglu", "clamped_quick_geglu"] = "gelu"
    position_embedding: Literal["learned_absolute", "rope", "yarn"] = "learned_absolute"
    rotary_base: Count = 10000
    rope_scaling_factor: Annotated[float, Field(gt=0)] | None = None
    """How much longer Llama 3.1's scaling makes the low frequencies of rotary positions."""
    yarn: Yarn | None = None
    qk_norm: Literal["none", "head", "projection"] = "none"
    """``head``: Q and K are normalised head by head; ``projection``: over all heads together
    (harness/specs/)."""
    attention_output_gate: bool = False
    attention_sinks: bool = False
    """A learned term per head in the softmax's denominator."""
    window_size: Count | None = None
    """Tokens that every other layer sees, the first layer being one of them: the token itself and
    those before it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init_method_std: Annotated[float, Field(gt=0)] = 0.006
    num_experts: Count | None = None
    moe_router_topk: Count | None = None
    moe_ffn_hidden_size: Count | None = None
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the choice, so that the chosen weights do not sum to 1."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss; None: tokens are dealt out to the experts at random, for
    timing."""
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] | None = None

    @property
    def ffn(self) -> int:
        """Width of the dense MLP: ``ffn_hidden_size``, by default 4 x hidden_size as upstream."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head: ``kv_channels``, by default hidden_size /
        num_attention_heads as upstream."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values: ``num_query_groups``, by default as many as of queries."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all queries together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Width of all keys together, which is that of the values."""
        return self.key_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Outputs of the attention's first matrix: queries, keys and values, and a gate as wide as
        the queries."""
        return self.query_size * (2 if self.attention_output_gate else 1) + 2 * self.key_size

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return self.activation != "gelu"

    @property
    def fc1_matrices(self) -> int:
        """Matrices as wide as an MLP, or an expert, side by side in linear_fc1: of a gated one the
        gate's and its own."""
        return 2 if self.gated else 1

    @property
    def moe_ffn(self) -> int:
        """Width of one expert: ``moe_ffn_hidden_size``, by default the dense MLP's as upstream."""
        return self.moe_ffn_hidden_size or self.ffn


LinearLayer = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
COLUMN_PARALLEL: tuple[LinearLayer, ...] = ("linear_qkv", "linear_fc1")
"""Those whose outputs tensor parallelism splits; of the others it splits the inputs."""


class Lora(_Frozen):
    """Adapters of low rank beside frozen layers (harness/finetune/lora.py). ``targets``: upstream's
    names of them."""

    rank: Count
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[LinearLayer, ...], Field(strict=False, min_length=1)] = get_args(
        LinearLayer
    )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


class Target(_Frozen):
    """The validation loss at which a long run is done; its miniature, another model on other data,
    has its own."""

    validation_loss: Annotated[float, Field(gt=0)]
    miniature_loss: Annotated[float, Field(gt=0)]
    miniature_steps: Count


class Experiment(_Frozen):
    """One row of the catalogue with every setting filled in. Sizes are counts of ranks; batches are
    counts of sequences."""

    id: Id
    slug: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    chapter: Count
    shows: Annotated[str, Field(min_length=1)]
    model: Model
    tp: Count = 1
    pp: Count = 1
    vpp: Count = 1
    cp: Count = 1
    ep: Count = 1
    etp: Count = 1
    dp: Count = 1
    nodes: Count = 1
    sequence_parallel: bool = Field(False, alias="sp")
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    micro_batch_size: Count = Field(alias="mbs")
    global_batch_size: Count = Field(alias="gbs")
    seq_length: Count = Field(alias="seq")
    sharding: Literal[
        "no_shard",
        "optim",
        "fsdp_optim",
        "fsdp_optim_grads",
        "fsdp_optim_grads_params",
        "torch_fsdp2",
    ] = "no_shard"
    recompute: Literal["none", "full", "selective"] = "none"
    recompute_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] | None = None
    optimizer: Literal["adam", "muon"] = "adam"
    optimizer_state: Literal["fp32", "bf16"] = "fp32"
    """Precision of Adam's moments; bf16 keeps of the fp32 weights only what bf16 lacks, too."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed up over micro-batches and ranks."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate, decayed to a tenth over ``steps``; None: the published launchers'
    schedule."""
    weights: str | None = None
    """What it starts from, whose model it trains: a name in weights/, or a run; None: random
    weights."""
    positions: Count | None = None
    """The longest sequence that learned positions are there for; None: as long as those it trains
    on."""
    lora: Lora | None = None
    cross_entropy_fusion: bool = False
    cuda_graphs: bool = False
    """A layer's kernels, or of a layer with experts its attention's and router's, are launched
    together."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    steps: Count = 100
    eval_interval: Count = 50
    eval_steps: Annotated[int, Field(ge=0)] = 10
    min_lr: Annotated[float, Field(ge=0)] | None = None
    lr_decay: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    lr_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    save_every: Count | None = None
    keep: Count | None = None
    until: Target | None = None
    load: str | None = None
    window_first_step: Count = 6
    data: str = "mock"
    split: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){0,2}$")] = "949,50,1"
    published_data: str | None = "openwebtext-10k"
    card: str | None = None
    profile: tuple[Count, Count] | None = None
    miniature: bool = False
    overrides: dict[str, str] = {}
    extra_args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The target's full name, such as ``101-gpt2xl-dp1-gbs1-bf16``."""
        return f"{self.id}-{self.slug}"

    @property
    def half_of(self) -> str | None:
        """The eight-GPU experiment that this one is the half-size companion of: ``408`` for
        ``408h``."""
        return self.id.removesuffix("h") if self.id.endswith("h") else None

    @property
    def world_size(self) -> int:
        """Ranks in all: tp x pp x cp x dp (experts share the same ranks)."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(self.world_size // (self.pp * self.ep * self.etp), 1)

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.nodes

    @property
    def highest_lr(self) -> float:
        """The learning rate after the warm-up: ``lr``, by default as in every published script."""
        return 6.0e-5 if self.lr is None else self.lr

    @property
    def lowest_lr(self) -> float:
        return self.highest_lr / 10 if self.min_lr is None else self.min_lr

    @property
    def lr_decay_steps(self) -> int:
        """Steps until the lowest learning rate: the whole run, or with the published rate the
        published number."""
        return 430000 if self.lr is None else self.steps

    @property
    def num_microbatches(self) -> int:
        """Micro-batches a rank runs in one step: gbs / (mbs x dp)."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def disturbed_steps(self) -> range:
        """The steps whose times a trace of the steps ``profile`` distorts: its warm-up, they
        themselves, its writing."""
        return range(self.profile[0] - 1, self.profile[1] + 2) if self.profile else range(0)

    @property
    def selectively_recomputed(self) -> tuple[str, ...]:
        """What selective recomputation takes, as upstream: attention's scores where no module is
        named."""
        return (self.recompute_modules or ("core_attn",)) if self.recompute == "selective" else ()

    @property
    def fully_sharded(self) -> bool:
        """Whether data parallelism is an FSDP, Megatron-LM's or PyTorch's."""
        return self.sharding not in ("no_shard", "optim")

    @property
    def shards_gradients(self) -> bool:
        return self.fully_sharded and self.sharding != "fsdp_optim"

    @property
    def shards_weights(self) -> bool:
        return self.sharding in ("fsdp_optim_grads_params", "torch_fsdp2")

    @property
    def layout(self) -> str:
        """The parallel layout in a few words: ``tp2+sp pp4 vpp3 m4``."""
        parts = [
            f"{axis}{getattr(self, axis)}"
            + ("+sp" if axis == "tp" and self.sequence_parallel else "")
            for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
            if getattr(self, axis) > 1
        ]
        if self.cp > 1 and self.cp_comm_type != "p2p":
            parts.append(self.cp_comm_type)
        if self.num_microbatches > 1 or self.pp > 1:
            parts.append(f"m{self.num_microbatches}")
        if self.sharding != "no_shard":
            parts.append(SHARDING[self.sharding][0])
        if self.recompute != "none":
            parts.append(f"{self.recompute} recompute")
        if self.fp8_recipe:
            parts.append(f"fp8 {self.fp8_recipe}")
        if self.optimizer != "adam":
            parts.append(self.optimizer)
        if self.optimizer_state != "fp32":
            parts.append(f"{self.optimizer_state} moments")
        if self.cuda_graphs:
            parts.append("CUDA graphs")
        return " ".join(parts) or "one GPU"

    @property
    def label(self) -> str:
        """Base name of the run directory: the name, then what was overridden, then ``cpu`` for a
        miniature.

        A value that a file name cannot hold as it is stands there with a digest of it, so that two
        of them differ; of ARGS there is the digest alone. It names a run and does not identify it:
        see harness/experiment/identity.py.
        """
        changed = [
            f"args-{_digest(value)}" if key == "ARGS" else f"{key.lower()}{_safe(value)}"
            for key, value in self.overrides.items()
        ]
        whole = "_".join([self.name, *changed, *(["cpu"] if self.miniature else [])])
        return (
            whole
            if len(whole) <= LONGEST_LABEL
            else f"{whole[: LONGEST_LABEL - 7]}-{_digest(whole)}"
        )

    def with_changes(self, **changes: Any) -> Experiment:
        """A copy with ``changes`` (field names), validated again. Raises UserError where they do
        not fit together."""
        fields = {name: getattr(self, name) for name in Experiment.model_fields}
        return _experiment({**fields, **changes}, self.id)


class Chapter(_Frozen):
    """One file of experiments: its number, its title, and the settings its experiments share."""

    chapter: Count
    title: str
    defaults: dict[str, Any] = {}
    experiments: dict[str, dict[str, Any]]


class Catalog(_Frozen):
    """Every experiment, by id."""

    chapters: dict[int, str]
    experiments: tuple[Experiment, ...]

    @cached_property
    def _by_name(self) -> dict[str, Experiment]:
        return {e.id: e for e in self.experiments} | {e.name: e for e in self.experiments}

    def find(self, wanted: str) -> Experiment:
        """The experiment with this id (``101``) or full name. Raises UserError naming the nearest
        ids."""
        found = self._by_name.get(wanted) or self._by_name.get(wanted.split("-")[0])
        if found and wanted in (found.id, found.name):
            return found
        if found:
            raise UserError(f"no experiment is called {wanted}; {found.id} is {found.name}")
        ids = [e.id for e in self.experiments if not e.half_of]
        if re.fullmatch(r"\d+", wanted):
            close = sorted(sorted(ids, key=lambda i: abs(int(i) - int(wanted)))[:5])
            raise UserError(
                f"no experiment {wanted}; nearest ids: {', '.join(close)} (make list shows all)"
            )
        raise UserError(f"no experiment {wanted}; {nearest(wanted, ids)} (make list shows all)")

    def in_chapter(self, number: int) -> tuple[Experiment, ...]:
        """The experiments of one chapter, in order. Raises UserError for an unknown chapter."""
        if number not in self.chapters:
            raise UserError(f"no chapter {number}; {nearest(str(number), map(str, self.chapters))}")
        return tuple(e for e in self.experiments if e.chapter == number)


@cache
def load_catalog(folder: Path = EXPERIMENTS) -> Catalog:
    """Read models.yaml and every NNN-*.yaml in ``folder``, once a process.

    Raises:
        UserError: a key or name is unknown, a value has the wrong type, sizes do not divide, or an
        id occurs twice.
    """
    models = _models(folder / "models.yaml")
    chapters: dict[int, str] = {}
    experiments: dict[str, Experiment] = {}
    for path in sorted(folder.glob("[0-9]*.yaml")):
        raw = yaml_files.read(path)
        rows = yaml_files.mapping(raw.get("experiments"), f"{path.name}: experiments")
        raw["experiments"] = {}
        for key, row in rows.items():
            with yaml_files.entry(path, rows, key):
                raw["experiments"][str(key)] = yaml_files.words(row, f"{path.name}: {key}")
        chapter = yaml_files.build(Chapter, raw, path.name)
        chapters[chapter.chapter] = chapter.title
        for key in rows:
            with yaml_files.entry(path, rows, key):
                e = _row(chapter, str(key), models, path.name)
                if e.id in experiments:
                    raise UserError(
                        f"{path.name}: experiment {e.id} is already in chapter"
                        f" {experiments[e.id].chapter}"
                    )
                experiments[e.id] = e
    return Catalog(
        chapters=dict(sorted(chapters.items())),
        experiments=tuple(experiments[i] for i in sorted(experiments)),
    )


def _models(path: Path) -> dict[str, Model]:
    rows, models = yaml_files.read(path), {}
    for name in rows:
        with yaml_files.entry(path, rows, name):
            where = f"model {yaml_files.word(name, f'{path.name}: model', 'gpt2-xl')}"
            models[name] = yaml_files.build(
                Model, {"name": name, **yaml_files.mapping(rows[name], where)}, where
            )
    return models


def _row(chapter: Chapter, id_: str, models: Mapping[str, Model], file: str) -> Experiment:
    """One row of a chapter's file. Raises UserError where it makes no sense."""
    fields = {**chapter.defaults, **chapter.experiments[id_], "id": id_, "chapter": chapter.chapter}
    name = yaml_files.word(
        fields.get("model", ""), f"{file}: {id_}: model", next(iter(models), "gpt2-xl")
    )
    if name not in models:
        raise UserError(f"{file}: {id_}: unknown model {name!r}; {nearest(name, models)}")
    return _experiment({**fields, "model": models[name]}, id_)


def _experiment(fields: Mapping[str, Any], where: str) -> Experiment:
    """Construct an experiment and check its constraints; every complaint becomes one line of a
    UserError."""
    experiment = yaml_files.build(Experiment, fields, where)
    if broken := violations(experiment):
        raise UserError("\n".join(f"{where}: {sentence}" for sentence in broken))
    return experiment


def _safe(value: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9.,+]+", "-", value).strip("-")
    return (
        readable
        if readable == value
        else f"{readable[:LONGEST_VALUE]}-{_digest(value)}".lstrip("-")
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
