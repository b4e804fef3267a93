"""What an experiment is: one row of the catalogue as a frozen value, and what follows from it."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Literal

from pydantic import Field

from harness.experiment.model import Checked, Count, Lora, Model

LONGEST_LABEL = 180
"""Characters of a label; file names have 255, which leaves room for ``.2`` and temporary files."""
LONGEST_VALUE = 40
"""Characters of a setting's value in a label."""

ID = r"[1-9]\d\dh?"
"""Pattern of the id of a row of the catalogue."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

SHARDING = {
    "no_shard": (
        "replicated",
        "every data-parallel rank holds all parameters, gradients and optimizer state",
    ),
    "optim": (
        "ZeRO-2",
        "published as ZeRO-2; upstream's distributed optimizer shards the optimizer state (ZeRO-1"
        " in memory): gradients are reduce-scattered but held whole, parameters are replicated",
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
"""Sharding -> (label in tables, what upstream really shards over data-parallel ranks)."""

RECOMPUTABLE = (
    "core_attn",
    "layernorm",
    "moe_act",
    "mlp",
    "moe",
    "shared_experts",
    "mla_up_proj",
)
"""Modules of selective recomputation (recompute_modules in
megatron/core/transformer/transformer_config.py, core_v0.19.0)."""


GRAPHABLE = ("attn", "mlp", "moe_router", "moe_preprocess")
"""Modules of CUDA graphs (cuda_graph_modules, in the same file)."""


class Target(Checked):
    """The validation loss at which a long run stops; its miniature trains another model."""

    validation_loss: Annotated[float, Field(gt=0)]
    miniature_loss: Annotated[float, Field(gt=0)]
    miniature_steps: Count


class Experiment(Checked):
    """One row of the catalogue, or a model on GPUs (unlisted.py), with every setting filled in.

    Parallel sizes are counts of ranks, batch sizes counts of sequences.
    """

    id: Name
    """Of a row its ID, else the model's name."""
    slug: Name
    chapter: Annotated[int, Field(ge=0)]
    """0: it is no row of the catalogue."""
    shows: Annotated[str, Field(min_length=1)]
    model: Model
    entry: Literal["gpt", "hybrid"] = "gpt"
    """Which of upstream's models and scripts trains it: GPTModel by pretrain_gpt.py, or HybridModel
    by pretrain_hybrid.py, which is to follow it."""
    tp: Count = 1
    pp: Count = 1
    vpp: Count = 1
    first_stage_layers: Count | None = None
    last_stage_layers: Count | None = None
    pp_layout: str | None = None
    """What each stage holds, such as ``Ett|ttt|tL``; harness/experiment/pipeline.py reads it."""
    embedding_as_layer: bool = False
    loss_as_layer: bool = False
    """Whether it takes the place of a layer where these are divided into stages."""
    cp: Count = 1
    ep: Count = 1
    etp: Count = 1
    moe_dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach their experts; ``flex``: by DeepEP or HybridEP, once for each node."""
    moe_backend: Literal["deepep", "hybridep"] = "deepep"
    """What sends tokens where ``moe_dispatcher`` is ``flex``."""
    moe_capacity: Annotated[float, Field(gt=0)] | None = None
    """Rows that an expert takes, relative to an even share; tokens beyond them are dropped."""
    router_fusion: bool = False
    """Top-k and the balancing loss by one kernel each (Transformer Engine's pytorch/router.py)."""
    shared_expert_overlap: bool = False
    """The expert of every token computes while tokens are sent to the others."""
    ep_overlap: bool = False
    """Tokens of a micro-batch are sent while another one computes."""
    delay_wgrad: bool = False
    """Weights' gradients of a layer wait for the gradients of its inputs, so that they are computed
    while tokens are sent."""
    grouped_gemm: Literal["streams", "cutlass", "cublas", "fused"] = "streams"
    """How the experts of a rank are multiplied: one product each over a few streams, or all by one
    kernel (general_grouped_gemm in transformer_engine/pytorch/cpp_extensions/gemm.py).

    ``fused``: by cuBLAS, and a matrix of all experts is one parameter, so that a step adds up and
    updates one gradient where the others have one for each expert (``moe_single_grouped_weight`` in
    megatron/core/transformer/transformer_config.py)."""
    dp: Count = 1
    nodes: Count = 1
    sequence_parallel: bool = Field(False, alias="sp")
    tp_overlap: bool = False
    """Sequence parallelism exchanges piece by piece while products compute (TE's userbuffers)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    cp_a2a: Count | None = None
    """Neighbouring context-parallel ranks that exchange heads by ``a2a+p2p``; a ring passes keys
    and values between such groups. None: as many as a node, CP and the heads admit."""
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
    optimizer_instances: Count = 1
    """Copies of the sharded state, each over so many times fewer ranks (hybrid sharding)."""
    fp8_params: bool = False
    """Weights of linear layers are kept and gathered in fp8."""
    overlap: bool = True
    """Replicas exchange gradients and weights while they compute."""
    recompute: Literal["none", "full", "selective"] = "none"
    recompute_modules: Annotated[tuple[str, ...], Field(strict=False)] = ()
    precision: Literal["bf16", "fp32", "fp8", "fp4"] = "bf16"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    fp4_recipe: Literal["nvfp4"] | None = None
    optimizer: Literal["adam", "muon"] = "adam"
    optimizer_state: Literal["fp32", "bf16"] = "fp32"
    """Precision of Adam's moments; with bf16, of the fp32 weights only what bf16 lacks is kept."""
    offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the optimizer's state that the host holds, whose CPU updates it."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over micro-batches and ranks."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Highest learning rate, decayed to a tenth over ``steps``; None: the published schedule."""
    weights: str | None = None
    """What it starts from: a name in weights/, or a run; None: random weights."""
    positions: Count | None = None
    """The longest sequence with learned positions; None: ``seq_length``."""
    lora: Lora | None = None
    gradient_fusion: bool | None = None
    """Add weights' gradients up within their products; None: where Apex is installed, which
    predictions leave out."""
    cross_entropy_fusion: bool = False
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    attention_mask: bool = True
    """Hand the causal mask to every layer, though Transformer Engine's attention reads none."""
    cuda_graphs: bool | Annotated[tuple[str, ...], Field(strict=False)] = False
    """Whether graphs launch what they can of a layer (``graphed``); or the modules that they do."""
    deterministic: bool = False
    """Kernels that repeat a result bit by bit (megatron/training/determinism.py)."""
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
    overrides: dict[str, str] = Field(default_factory=dict)
    extra_args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The target's full name, such as ``101-gpt2xl-dp1-gbs1-bf16``."""
        return f"{self.id}-{self.slug}"

    @property
    def half_of(self) -> str | None:
        """The eight-GPU experiment of which this is the half-size companion: 408 for 408h."""
        return self.id.removesuffix("h") if self.id.endswith("h") else None

    @property
    def world_size(self) -> int:
        """Number of ranks: tp x pp x cp x dp (experts share the same ranks)."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def is_pipelined(self) -> bool:
        return self.pp > 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, but for experts."""
        return self.dp * self.cp

    @property
    def rank_tokens(self) -> float:
        """Tokens of a micro-batch on a rank: context parallelism splits sequences."""
        return self.micro_batch_size * self.seq_length / self.cp

    @property
    def exchanges_heads(self) -> bool:
        """Whether context parallelism gives each rank some heads of longer parts of sequences."""
        return self.cp > 1 and self.cp_comm_type in ("a2a", "a2a+p2p")

    @property
    def cp_levels(self) -> tuple[int, int]:
        """Context-parallel ranks that exchange heads, and that exchange keys and values; more than
        one of both only by ``a2a+p2p``."""
        if not self.exchanges_heads:
            return 1, self.cp
        if self.cp_comm_type == "a2a":
            return self.cp, 1
        heads = self.cp_a2a or self._largest_cp_a2a
        return heads, self.cp // heads

    @property
    def _largest_cp_a2a(self) -> int:
        """The largest first level within a node that leaves a second one; 1: there is none."""
        model, tp = self.model, self.tp
        dividing = math.gcd(self.cp, model.num_attention_heads // tp, model.key_heads // tp)
        most = min(dividing, self.cp // 2, max(self.ranks_per_node // tp, 1))
        return next(ranks for ranks in range(most, 0, -1) if dividing % ranks == 0)

    @property
    def quantised(self) -> bool:
        """Whether linear layers multiply in fewer than 16 bits."""
        return self.precision in ("fp8", "fp4")

    @property
    def recipe(self) -> str | None:
        """How linear layers scale what they quantise; None where they do not."""
        return self.fp8_recipe or self.fp4_recipe

    @property
    def precision_aware(self) -> bool:
        """Whether the optimizer takes gradients and keeps moments in other types than fp32, or on
        the host: upstream's precision-aware optimizer."""
        return self.optimizer_state == "bf16" or self.offload > 0

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(self.world_size // (self.pp * self.ep * self.etp), 1)

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.nodes

    @property
    def highest_lr(self) -> float:
        """The learning rate after the warm-up; the default is that of every published script."""
        return 6.0e-5 if self.lr is None else self.lr

    @property
    def lowest_lr(self) -> float:
        return self.highest_lr / 10 if self.min_lr is None else self.min_lr

    @property
    def lr_decay_steps(self) -> int:
        """Steps until the lowest learning rate: the run's, or those of the published schedule."""
        if self.lr is None:
            return 430000
        if self.lr_decay == "constant":  # a short run begins as a long one does
            return max(self.steps, (self.lr_warmup_steps or 0) + 1)
        return self.steps

    @property
    def num_microbatches(self) -> int:
        """Micro-batches a rank runs in one step: gbs / (mbs x dp)."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def disturbed_steps(self) -> range:
        """The steps whose times tracing distorts: its warm-up, the traced ones, its writing."""
        return range(self.profile[0] - 1, self.profile[1] + 2) if self.profile else range(0)

    @property
    def uneven_pipeline(self) -> bool:
        """Whether a setting gives pipeline stages different numbers of layers."""
        ends = self.first_stage_layers or self.last_stage_layers
        return bool(ends or self.pp_layout or self.embedding_as_layer or self.loss_as_layer)

    @property
    def selectively_recomputed(self) -> tuple[str, ...]:
        """The modules of selective recomputation; upstream's default is attention's scores."""
        return (self.recompute_modules or ("core_attn",)) if self.recompute == "selective" else ()

    @property
    def graphed(self) -> tuple[str, ...]:
        """The modules that CUDA graphs launch, in upstream's names.

        Of experts none: how many tokens each gets changes from step to step.
        """
        if isinstance(self.cuda_graphs, tuple):
            return self.cuda_graphs
        if not self.cuda_graphs:
            return ()
        if not self.model.num_experts:
            return ("attn", "mlp")
        # with a capacity alltoall copies counts to the CPU in its preparation
        prepared = () if self.moe_capacity else ("moe_preprocess",)
        return ("attn", "moe_router", *prepared)

    @property
    def graphs_by(self) -> Literal["local", "transformer_engine"] | None:
        """Upstream's implementation of CUDA graphs: its own launches whole layers, Transformer
        Engine's parts of them."""
        if not self.cuda_graphs:
            return None
        whole = self.cuda_graphs is True and not self.model.num_experts
        return "local" if whole else "transformer_engine"

    @property
    def graphs_layers(self) -> bool:
        """Whether CUDA graphs launch whole layers."""
        return {*self.graphed} == {"attn", "mlp"}

    @property
    def fully_sharded(self) -> bool:
        """Whether data parallelism is FSDP, of Megatron-LM or PyTorch."""
        return self.sharding not in ("no_shard", "optim")

    @property
    def shards_gradients(self) -> bool:
        return self.fully_sharded and self.sharding != "fsdp_optim"

    @property
    def shards_weights(self) -> bool:
        return self.sharding in ("fsdp_optim_grads_params", "torch_fsdp2")

    @property
    def layout(self) -> str:
        """The parallel layout in short: ``tp2+sp pp4 vpp3 m4``."""
        parts = [
            f"{axis}{getattr(self, axis)}"
            + ("+sp" if axis == "tp" and self.sequence_parallel else "")
            for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
            if getattr(self, axis) > 1
        ]
        if self.uneven_pipeline:
            parts.append("uneven stages")
        if self.cp > 1 and self.cp_comm_type != "p2p":
            parts.append(self.cp_comm_type)
        if self.num_microbatches > 1 or self.pp > 1:
            parts.append(f"m{self.num_microbatches}")
        if self.sharding != "no_shard":
            parts.append(SHARDING[self.sharding][0])
        if self.optimizer_instances > 1:
            parts.append(f"{self.optimizer_instances} instances")
        if self.recompute != "none":
            parts.append(f"{self.recompute} recompute")
        if self.fp8_recipe:
            parts.append(f"fp8 {self.fp8_recipe}")
        if self.fp4_recipe:
            parts.append(f"fp4 {self.fp4_recipe}")
        if self.optimizer != "adam":
            parts.append(self.optimizer)
        if self.optimizer_state != "fp32":
            parts.append(f"{self.optimizer_state} moments")
        if self.offload:
            parts.append(f"{self.offload:.0%} offloaded")
        if self.cuda_graphs:
            parts.append("CUDA graphs")
        return " ".join(parts) or "one GPU"

    @property
    def label(self) -> str:
        """Base name of the run directory: the name, changed settings, ``cpu`` for a miniature.

        A value that does not fit into a file name is abbreviated and followed by a digest, so that
        two of them differ; of ARGS there is only the digest. The label names a run and does not
        identify it: see harness/experiment/identity.py.
        """
        changed = [
            f"args-{_digest(value)}" if key == "ARGS" else f"{key.lower()}{_safe(value)}"
            for key, value in self.overrides.items()
        ]
        whole = "_".join([self.name, *changed, *(["cpu"] if self.miniature else [])])
        if len(whole) <= LONGEST_LABEL:
            return whole
        return f"{whole[: LONGEST_LABEL - 7]}-{_digest(whole)}"


def _safe(value: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9.,+]+", "-", value).strip("-")
    if readable == value:
        return value
    return f"{readable[:LONGEST_VALUE]}-{_digest(value)}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
