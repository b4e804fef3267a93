"""A model's architecture in upstream's terms, and LoRA adapters on it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Checked(BaseModel):
    """A frozen value with checked fields: an unknown field or another type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)


class Yarn(Checked):
    """How YaRN stretches rotary positions (Peng et al. 2023, arXiv:2309.00071)."""

    rotary_scaling_factor: Annotated[float, Field(gt=0)]
    original_max_position_embeddings: Count
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    correction_range_round_to_int: bool = True


class Model(Checked):
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
    """Factor by which Llama 3.1's scaling lengthens the low frequencies of rotary positions."""
    yarn: Yarn | None = None
    qk_norm: Literal["none", "head", "projection"] = "none"
    """``head``: Q and K are normalised by head; ``projection``: over all heads (harness/specs/)."""
    attention_output_gate: bool = False
    attention_sinks: bool = False
    """A learned term per head in the softmax's denominator."""
    window_size: Count | None = None
    """Tokens that every other layer sees, beginning with the first: the token and those before."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init_method_std: Annotated[float, Field(gt=0)] = 0.006
    num_experts: Count | None = None
    moe_router_topk: Count | None = None
    moe_ffn_hidden_size: Count | None = None
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before top-k, so that the chosen weights do not sum to 1."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss; None: tokens are routed at random, for timing."""
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] | None = None

    @property
    def ffn(self) -> int:
        """Width of the dense MLP: ``ffn_hidden_size``, by default 4 x hidden_size as upstream."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of a head: ``kv_channels``, by default hidden_size / num_attention_heads."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and of values: ``num_query_groups``, by default as many as of queries."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of all queries together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Width of all keys together, and of all values."""
        return self.key_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        """Outputs of linear_qkv: queries, keys, values, and a gate as wide as the queries."""
        return self.query_size * (2 if self.attention_output_gate else 1) + 2 * self.key_size

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return self.activation != "gelu"

    @property
    def fc1_matrices(self) -> int:
        """Matrices side by side in linear_fc1: with a gate two."""
        return 2 if self.gated else 1

    @property
    def moe_ffn(self) -> int:
        """Width of one expert: ``moe_ffn_hidden_size``, by default the dense MLP's as upstream."""
        return self.moe_ffn_hidden_size or self.ffn


LinearLayer = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
COLUMN_PARALLEL: tuple[LinearLayer, ...] = ("linear_qkv", "linear_fc1")
"""Tensor parallelism splits the outputs of these; of the other layers it splits the inputs."""


class Lora(Checked):
    """LoRA adapters on frozen linear layers, the ``targets`` (harness/finetune/lora.py)."""

    rank: Count
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[LinearLayer, ...], Field(strict=False, min_length=1)] = get_args(
        LinearLayer
    )

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds."""
        return self.alpha / self.rank
