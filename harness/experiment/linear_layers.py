"""The linear layers of a transformer layer: their sizes, and what tensor parallelism splits.

Sources: megatron/core/transformer/{attention,multi_latent_attention,mlp,multi_token_prediction}.py,
megatron/core/transformer/moe/shared_experts.py and megatron/core/ssm/mamba_mixer.py of
core_v0.19.0, as Transformer Engine's layers are built
(megatron/core/models/gpt/gpt_layer_specs.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from harness.experiment.model import Mamba, Model

LayerKind = Literal["dense", "experts", "mamba", "attention", "mlp"]
"""``dense`` and ``experts``: attention and what its name says; the others: only that."""


class Linear(NamedTuple):
    """A linear layer, before tensor parallelism."""

    inputs: int
    outputs: int
    split: Literal["inputs", "outputs", "nothing"]
    """What tensor parallel ranks share; of ``nothing``, each has the whole layer and computes it
    for its share of the tokens."""
    bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    def on_rank(self, tp: int) -> tuple[int, int]:
        """Inputs and outputs that one of ``tp`` ranks has."""
        return (
            self.inputs // (tp if self.split == "inputs" else 1),
            self.outputs // (tp if self.split == "outputs" else 1),
        )


def of_layer(model: Model, kind: LayerKind) -> dict[str, Linear]:
    """The linear layers of one layer, in order; without experts' and router."""
    match kind:
        case "mamba":
            return of_mamba(model.mamba, model.hidden_size)
        case "attention":
            return of_attention(model)
        case "mlp":
            return of_mlp(model, model.ffn)
        case "dense":
            return of_attention(model) | of_mlp(model, model.ffn)
    return of_attention(model) | of_shared_expert(model)


def of_mamba(mamba: Mamba, hidden: int) -> dict[str, Linear]:
    """The linear layers of a Mamba layer, which have no biases."""
    return {
        "in_proj": Linear(hidden, mamba.projected_size, "outputs", False),
        "out_proj": Linear(mamba.inner_size, hidden, "inputs", False),
    }


def of_attention(model: Model) -> dict[str, Linear]:
    """The linear layers of self-attention, in order."""
    hidden, bias = model.hidden_size, model.add_bias_linear
    proj = {"linear_proj": Linear(model.context_size, hidden, "inputs", bias)}
    latent = model.latent_attention
    if latent is None:
        return {"linear_qkv": Linear(hidden, model.qkv_size, "outputs", bias)} | proj
    queries = {"linear_q_proj": Linear(hidden, model.query_size, "outputs", False)}
    if rank := latent.q_lora_rank:
        queries = {
            "linear_q_down_proj": Linear(hidden, rank, "nothing", False),
            "linear_q_up_proj": Linear(rank, model.query_size, "outputs", False),
        }
    compressed = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    rebuilt = model.num_attention_heads * (latent.qk_head_dim + latent.v_head_dim)
    keys_and_values = {
        "linear_kv_down_proj": Linear(hidden, compressed, "nothing", False),
        "linear_kv_up_proj": Linear(latent.kv_lora_rank, rebuilt, "outputs", False),
    }
    return queries | keys_and_values | proj


def of_mlp(model: Model, width: int) -> dict[str, Linear]:
    """The linear layers of an MLP, or of an expert, of this width."""
    hidden, bias = model.hidden_size, model.add_bias_linear
    return {
        "linear_fc1": Linear(hidden, width * model.fc1_matrices, "outputs", bias),
        "linear_fc2": Linear(width, hidden, "inputs", bias),
    }


def of_shared_expert(model: Model) -> dict[str, Linear]:
    """The linear layers of the expert that every token passes through, if there is one."""
    width = model.moe_shared_expert_intermediate_size
    return of_mlp(model, width) if width else {}


def of_predictor(model: Model) -> Linear:
    """The layer by which multi-token prediction joins a hidden state with the next embedding."""
    return Linear(2 * model.hidden_size, model.hidden_size, "outputs", False)
