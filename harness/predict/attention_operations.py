"""The operations of a layer's norm and self-attention, plain or latent, and what they keep.

Sources, core_v0.19.0 and Transformer Engine 2.19:
megatron/core/transformer/{attention,multi_latent_attention}.py,
transformer_engine/pytorch/module/{layernorm_linear,linear}.py.
"""

from __future__ import annotations

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import Linear, of_attention
from harness.predict.operations import (
    Operation,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    hidden_tokens,
    layouts_of_a_norm,
    norm,
    norm_output_bytes,
    saved_bytes,
    weight_gradient_bytes,
)


def attention_operations(experiment: Experiment) -> list[Operation]:
    """A layer's norm and attention on one micro-batch, in the order of the forward pass."""
    if experiment.model.latent_attention:
        return [norm(experiment), *_latent(experiment), *_attended(experiment)]
    model, linears = experiment.model, of_attention(experiment.model)
    size, tokens = element_bytes(experiment), _tokens(experiment)
    projected = size * (model.query_size + model.key_size + model.value_size) * tokens
    if model.attention_output_gate:
        # the gate, a view that holds its buffer
        projected += size * model.qkv_size * tokens
    return [
        norm(experiment),
        Operation(
            (norm_output_bytes(experiment),) * layouts_of_a_norm(experiment),
            hidden_bytes(experiment),
            _weight_gradient(experiment, linears["linear_qkv"]),
            # the input again, and its gradient before it is scattered
            gathered=2 * gathered_bytes(experiment),
        ),
        Operation((projected,), projected),
        *_attended(experiment),
    ]


def _latent(experiment: Experiment) -> list[Operation]:
    """Latent attention up to queries, keys and values.

    The norm before it is not fused with its two projections, so its output may be recomputed
    (``layernorm``). Norms of what is compressed are fused with the projections that rebuild, which
    keep both sides of the norm; with rotation they may be recomputed (``mla_up_proj``).
    """
    model, size = experiment.model, element_bytes(experiment)
    latent, linears = model.latent_attention, of_attention(model)
    tokens, local = _tokens(experiment), hidden_tokens(experiment)
    rank = latent.q_lora_rank or 0
    compressed = size * local * (rank + latent.kv_lora_rank + latent.qk_pos_emb_head_dim)
    normed = saved_bytes(experiment) * local * (rank + latent.kv_lora_rank)
    normed *= layouts_of_a_norm(experiment)
    normed += 4 * local * (1 + bool(rank))
    rebuilt = model.query_size + linears["linear_kv_up_proj"].outputs
    rotated = model.query_size + model.key_size + model.value_size
    # each projection down quantises its input
    copies = 2 if experiment.quantised else 1
    up = frozenset({"mla_up_proj"})
    gradients = {name: _weight_gradient(experiment, linears[name]) for name in linears}
    return [
        Operation(
            (copies * norm_output_bytes(experiment),),
            hidden_bytes(experiment),
            max(gradients[name] for name in linears if "down" in name),
            gathered=hidden_bytes(experiment),  # of queries and of keys, before their sum
            modules=frozenset({"layernorm"}),
        ),
        Operation((compressed,), compressed),
        Operation((normed,), 0, max(gradients.values()), modules=up),
        Operation((), size * tokens * rebuilt, modules=up),
        Operation((size * tokens * rotated,), size * tokens * rotated, modules=up),
    ]


def _attended(experiment: Experiment) -> list[Operation]:
    """Flash attention's result and statistics, and the output projection, which keeps the result.

    Where heads are exchanged (a2a, a2a+p2p), Transformer Engine keeps the result on either side
    (out_part in AttnFuncWithCPAndQKVOA2A and AttnFuncWithCPAndKVP2P,
    attention/dot_product_attention/context_parallel.py).
    """
    model, size, tokens = experiment.model, element_bytes(experiment), _tokens(experiment)
    result = size * model.context_size * tokens
    statistics = 4 * model.num_attention_heads * tokens  # of flash attention's softmax, fp32
    exchanged = result if experiment.exchanges_heads else 0
    # other recipes keep the original, which attention keeps in any case: set_save_original_input in
    # megatron/core/transformer/attention.py
    delayed = experiment.fp8_recipe == "delayed"
    quantised = saved_bytes(experiment) * model.context_size * tokens if delayed else 0
    gated = result if model.attention_output_gate else 0  # the product
    return [
        Operation((statistics, exchanged), 0, modules=frozenset({"core_attn"})),
        Operation((result,), 0),
        Operation((_qk_norm_bytes(experiment), gated), 0),
        Operation(
            (quantised,),
            result,
            _weight_gradient(experiment, of_attention(model)["linear_proj"]),
            passing=hidden_bytes(experiment),
            gathered=gathered_bytes(experiment),
        ),
    ]


def _qk_norm_bytes(experiment: Experiment) -> float:
    """What norms of queries and keys keep; of latent attention they are counted with it."""
    model, size = experiment.model, element_bytes(experiment)
    width = model.query_size + model.key_size
    per_token = 0.0
    if model.qk_norm == "head" and not model.latent_attention:
        per_token = size * width + 4 * width / model.head_size  # inputs and fp32 statistics
    if model.qk_norm == "projection":
        # harness/specs/projection_norm.py, in fp32 and eager
        per_token = (4 + 4 + size) * width
    return per_token * _tokens(experiment)


def _tokens(experiment: Experiment) -> float:
    """Tokens times the share of heads that a rank has."""
    return experiment.rank_tokens / experiment.tp


def _weight_gradient(experiment: Experiment, linear: Linear) -> float:
    split = 1 if linear.split == "nothing" else experiment.tp
    return weight_gradient_bytes(experiment, linear.weights / split)
