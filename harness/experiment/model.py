"""A model's architecture in upstream's terms, and LoRA adapters on it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]


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
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """Both scale attention with the length; DeepSeek sets them, GPT-OSS leaves the defaults."""


class LatentAttention(Checked):
    """Multi-latent attention: keys and values are rebuilt from one narrow projection.

    Source: DeepSeek-AI 2024 (arXiv:2405.04434), section 2.1; names as in
    megatron/core/transformer/multi_latent_attention.py.
    """

    q_lora_rank: Count | None = None
    """Width to which queries are compressed; None: they are projected at once."""
    kv_lora_rank: Count
    """Width to which keys and values are compressed together."""
    qk_head_dim: Count
    """A head's queries and keys without positions."""
    qk_pos_emb_head_dim: Count
    """The rotated part of a head's queries and keys; of the keys, all heads share it."""
    v_head_dim: Count


CONV_WIDTH = 4
"""Tokens that a Mamba layer's convolution sees: ``d_conv`` of MambaMixer in
megatron/core/ssm/mamba_mixer.py, for which upstream has no argument."""


class Mamba(Checked):
    """Sizes of Mamba-2 layers (Dao and Gu 2024, arXiv:2405.21060, section 7).

    Names as in megatron/core/transformer/transformer_config.py, without ``mamba_``.
    """

    num_heads: Count
    """The layer is ``num_heads`` x ``head_dim`` wide inside, in most models twice hidden_size."""
    head_dim: Count = 64
    state_dim: Count = 128
    """Values of the state that each channel of a head has."""
    num_groups: Count = 8
    """Groups of heads that share what is written to the state and read from it, B and C."""

    @property
    def inner_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: the heads' inputs, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_dim

    @property
    def projected_size(self) -> int:
        """Outputs of in_proj: gate, the convolution's input, and a time step for each head."""
        return self.inner_size + self.conv_size + self.num_heads


MAMBA, ATTENTION, MLP = "M", "*", "-"
"""Letters of ``Model.layer_pattern`` (Symbols in
megatron/core/models/hybrid/hybrid_layer_allocation.py)."""


class Model(Checked):
    """An architecture, in upstream's terms."""

    name: str
    num_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    layer_pattern: str | None = None
    """Of a model with Mamba layers, each of its ``num_layers``: M Mamba, * attention, - an MLP.
    None: each layer has attention and an MLP or experts."""
    mamba: Mamba | None = None
    ffn_hidden_size: Count | None = None
    num_query_groups: Count | None = None
    kv_channels: Count | None = None
    vocab_size: Count = 50257
    untie_embeddings: bool = False
    add_bias_linear: bool = True
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    activation: Literal["gelu", "swiglu", "clamped_quick_geglu", "squared_relu"] = "gelu"
    position_embedding: Literal["learned_absolute", "rope", "yarn", "none"] = "learned_absolute"
    """``none``: only the mask and Mamba layers say which token comes first."""
    rotary_base: Count = 10000
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that positions rotate."""
    rope_scaling_factor: Annotated[float, Field(gt=0)] | None = None
    """Factor by which Llama 3.1's scaling lengthens the low frequencies of rotary positions."""
    yarn: Yarn | None = None
    qk_norm: Literal["none", "head", "projection"] = "none"
    """``head``: Q and K are normalised by head, with latent attention the compressed ones;
    ``projection``: over all heads (harness/specs/)."""
    latent_attention: LatentAttention | None = None
    attention_output_gate: bool = False
    attention_sinks: bool = False
    """A learned term per head in the softmax's denominator."""
    window_size: Count | None = None
    """Tokens that every other layer sees, beginning with the first: the token and those before."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    init_method_std: Annotated[float, Field(gt=0)] = 0.006
    num_experts: Count | None = None
    first_dense_layers: Annotated[int, Field(ge=0)] = 0
    """Layers before those with experts: ``first_k_dense_replace`` of Hugging Face."""
    moe_router_topk: Count | None = None
    moe_ffn_hidden_size: Count | None = None
    moe_shared_expert_intermediate_size: Count | None = None
    """Width of the expert that every token passes through; of several, their widths together."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before top-k, so that the chosen weights do not sum to 1."""
    moe_router_enable_expert_bias: bool = False
    """Balance the load by biases that choose experts and do not weight them (DeepSeek-V3)."""
    moe_router_num_groups: Count | None = None
    """Groups of experts, of which a token may use ``moe_router_group_topk``."""
    moe_router_group_topk: Count | None = None
    moe_router_topk_scaling_factor: Annotated[float, Field(gt=0)] | None = None
    """Factor of the chosen experts' weights."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss"] = (
        "aux_loss"
    )
    """Whether loads are balanced over a micro-batch, each sequence, or the global batch."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss; None: tokens are routed at random, for timing."""
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    mtp_num_layers: Count | None = None
    """Layers after the last one that predict more tokens ahead, one more each (DeepSeek-V3)."""
    mtp_loss_scaling_factor: Annotated[float, Field(gt=0)] = 0.1

    @model_validator(mode="after")
    def _routed(self) -> Model:
        if self.num_experts and not self.moe_router_topk:
            raise ValueError(f"num_experts ({self.num_experts}) needs moe_router_topk")
        return self

    @property
    def ffn(self) -> int:
        """Width of the dense MLP: ``ffn_hidden_size``, by default 4 x hidden_size as upstream."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of a head's queries: ``kv_channels``, by default hidden_size / heads."""
        if self.latent_attention:
            return self.latent_attention.qk_head_dim + self.latent_attention.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_head_size(self) -> int:
        """Width of a head's values."""
        return self.latent_attention.v_head_dim if self.latent_attention else self.head_size

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
        """Width of all keys together."""
        return self.key_heads * self.head_size

    @property
    def value_size(self) -> int:
        """Width of all values together."""
        return self.key_heads * self.value_head_size

    @property
    def context_size(self) -> int:
        """Width of attention's result, the input of linear_proj."""
        return self.num_attention_heads * self.value_head_size

    @property
    def qkv_size(self) -> int:
        """Outputs of linear_qkv: queries, keys, values, and a gate as wide as the queries."""
        gates = 2 if self.attention_output_gate else 1
        return self.query_size * gates + self.key_size + self.value_size

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return self.activation in ("swiglu", "clamped_quick_geglu")

    @property
    def fc1_matrices(self) -> int:
        """Matrices side by side in linear_fc1: with a gate two."""
        return 2 if self.gated else 1

    @property
    def moe_ffn(self) -> int:
        """Width of one expert: ``moe_ffn_hidden_size``, by default the dense MLP's as upstream."""
        return self.moe_ffn_hidden_size or self.ffn

    @property
    def rotates(self) -> bool:
        """Whether positions rotate queries and keys."""
        return self.position_embedding in ("rope", "yarn")

    @property
    def dense_layers(self) -> int:
        """Transformer layers without experts, at the beginning; without ``layer_pattern``."""
        return self.first_dense_layers if self.num_experts else self.num_layers

    @property
    def predictors(self) -> int:
        """Layers of multi-token prediction, built as the last transformer layer is."""
        return self.mtp_num_layers or 0


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
