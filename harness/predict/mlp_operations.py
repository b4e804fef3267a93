"""The operations of a layer's second norm and its MLP or experts, and what they keep.

Sources, core_v0.19.0 and Transformer Engine 2.19: megatron/core/transformer/mlp.py,
megatron/core/transformer/moe/{router,experts,shared_experts,token_dispatcher}.py,
transformer_engine/pytorch/module/{layernorm_linear,linear,grouped_linear}.py.
"""

from __future__ import annotations

from dataclasses import replace

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind, of_mlp
from harness.predict.operations import (
    Operation,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    hidden_tokens,
    layouts_of_a_norm,
    mask_bytes,
    norm,
    norm_output_bytes,
    padded_rows,
    saved_bytes,
    weight_gradient_bytes,
)


def mlp_operations(experiment: Experiment, kind: LayerKind) -> list[Operation]:
    """A layer's second norm and its MLP or experts, in the order of the forward pass."""
    if kind == "experts":
        return _experts(experiment)
    mlp = frozenset({"mlp"})
    fc1, *rest = _mlp(experiment, experiment.model.ffn, mlp)
    inputs = (norm_output_bytes(experiment),) * layouts_of_a_norm(experiment)
    return [norm(experiment), replace(fc1, saves=inputs), *rest]


def shared_expert(experiment: Experiment) -> list[Operation]:
    """The expert of every token; its input is the router's, of which delayed fp8 keeps a copy.

    Other recipes keep the original (set_save_original_input in
    megatron/core/transformer/moe/shared_experts.py).
    """
    width = experiment.model.moe_shared_expert_intermediate_size
    if not width:
        return []
    fc1, *rest = _mlp(experiment, width, frozenset({"moe", "shared_experts"}))
    quantised = norm_output_bytes(experiment) if experiment.fp8_recipe == "delayed" else 0
    return [replace(fc1, saves=(quantised,)), *rest]


def _mlp(experiment: Experiment, width: int, modules: frozenset[str]) -> list[Operation]:
    """Both linear layers of an MLP and its activation, without the input, which others keep."""
    size, hidden = element_bytes(experiment), hidden_bytes(experiment)
    tp, fc1_matrices = experiment.tp, experiment.model.fc1_matrices
    activated = width * experiment.rank_tokens / tp
    before = size * activated * fc1_matrices
    weights = {name: one.weights / tp for name, one in of_mlp(experiment.model, width).items()}
    # by rows and by columns: no source says so, but 614 had the second copy's 1.8 GiB on two H200s
    copies = 2 if experiment.fp8_recipe == "blockwise" else 1
    return [
        Operation(
            (),
            hidden,
            weight_gradient_bytes(experiment, weights["linear_fc1"]),
            # the input again, and its gradient before it is scattered
            gathered=2 * gathered_bytes(experiment),
            modules=modules,
        ),
        Operation((before,), before, modules=modules),
        Operation(
            (saved_bytes(experiment) * activated,) * copies,
            size * activated,
            weight_gradient_bytes(experiment, weights["linear_fc2"]),
            passing=hidden,
            gathered=gathered_bytes(experiment),
            modules=modules,
        ),
    ]


def _experts(experiment: Experiment) -> list[Operation]:
    """Router, dispatch and experts, with ``moe_router_topk`` copies of each token.

    The norm before experts is not fused with the first matrix. Its output, the router's input, may
    be recomputed (``layernorm``), and so may the activation, the second matrix's input
    (``moe_act``). Clamping as GPT-OSS does keeps its own input as well as the clamped one
    (weighted_bias_quick_geglu_impl in megatron/core/fusions/fused_bias_geglu.py). The product with
    the router's weights in bf16, for which upstream has no fused kernel without a gate, keeps both
    factors.
    """
    model, size = experiment.model, element_bytes(experiment)
    tokens, hidden = hidden_tokens(experiment), hidden_bytes(experiment)
    # probabilities (fp32), their map (bool), the rows they go to; fp32 scores of each loss, and of
    # a score function before top-k
    before_topk = model.moe_router_pre_softmax or model.moe_router_score_function == "sigmoid"
    # the fused kernel keeps scores in any case (FusedTopkScoreFunction)
    of_topk = before_topk or experiment.router_fusion
    scores = bool(model.moe_aux_loss_coeff) + bool(model.moe_z_loss_coeff) + of_topk
    router = model.num_experts * (4 + 1 + 8 + 4 * scores) + 12 * model.moe_router_topk
    rows = tokens * model.moe_router_topk + padded_rows(experiment) / experiment.etp
    before = size * rows * model.moe_ffn * model.fc1_matrices
    factors = 2 if model.activation == "clamped_quick_geglu" else 1
    weighted = 0 if model.gated else size * rows * model.moe_ffn
    dispatched = rows * experiment.etp * model.hidden_size
    held = model.num_experts // experiment.ep
    weights = {
        name: held * one.weights / experiment.etp
        for name, one in of_mlp(model, model.moe_ffn).items()
    }
    moe, activation = frozenset({"moe"}), frozenset({"moe", "moe_act"})
    return [
        Operation((mask_bytes(experiment), hidden), hidden, adds_residual=True),
        Operation((hidden,), hidden, modules=frozenset({"layernorm"})),
        *shared_expert(experiment),
        Operation((tokens * router,), 0, modules=moe),
        Operation(
            (saved_bytes(experiment) * dispatched,),
            size * dispatched,
            weight_gradient_bytes(experiment, weights["linear_fc1"]),
            modules=moe,
        ),
        Operation((before,), before, modules=moe),
        Operation((*(before,) * (factors - 1), weighted), 0, modules=activation),
        Operation(
            (saved_bytes(experiment) * rows * model.moe_ffn,),
            size * rows * model.moe_ffn,
            weight_gradient_bytes(experiment, weights["linear_fc2"]),
            passing=size * dispatched,
            modules=activation,
        ),
        Operation((), size * dispatched, passing=hidden, modules=moe),
    ]
