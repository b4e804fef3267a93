"""The tensors that a layer leaves for its backward pass, operation by operation.

Counted are the tensors that autograd keeps in Megatron-LM core_v0.19.0 with Transformer Engine
2.19's layers (attention_operations.py, mlp_operations.py, mamba_operations.py). The
method, and for GPT-2's layers the result (34 bytes a token and hidden unit), are those of
Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1.
"""

from __future__ import annotations

from typing import Literal

from harness.experiment import linear_layers
from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind
from harness.predict import stages
from harness.predict.attention_operations import attention_operations
from harness.predict.flops import padded_vocab_size
from harness.predict.mamba_operations import mamba_operations
from harness.predict.mlp_operations import mlp_operations
from harness.predict.operations import (
    Operation,
    backward_bytes,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    hidden_tokens,
    norm_statistics,
    recomputing,
    saved_bytes,
    weight_gradient_bytes,
)


def layer_operations(experiment: Experiment, kind: str) -> list[Operation]:
    """A layer on one micro-batch in order; ``kind``: a field of ``stages.Layers``."""
    if kind == "predictors":
        experiment = stages.of_predictors(experiment)
    match whole := _transformer_kind(experiment, kind):
        case "mamba":
            operations = mamba_operations(experiment)
        case "attention":
            operations = attention_operations(experiment)
        case "mlp":
            operations = mlp_operations(experiment, "dense")
        case _:
            operations = [*attention_operations(experiment), *mlp_operations(experiment, whole)]
    if kind == "predictors":
        operations = [*_joining_operations(experiment), *operations, _last_norm(experiment)]
    return recomputing(operations, experiment.selectively_recomputed)


def graphed_operations(experiment: Experiment, kind: str) -> frozenset[int]:
    """Which of ``layer_operations`` CUDA graphs launch, by their place."""
    attention, layer = len(attention_operations(experiment)), layer_operations(experiment, kind)
    first = len(_joining_operations(experiment)) if kind == "predictors" else 0
    graphed: set[int] = set()
    if "attn" in experiment.graphed:
        graphed |= {*range(first + attention)}
    if "mlp" in experiment.graphed and kind != "experts":
        graphed |= {*range(first + attention, len(layer))}
    if "moe_router" in experiment.graphed and kind == "experts":
        router = next(i for i, one in enumerate(layer) if i >= attention and "moe" in one.modules)
        graphed |= {*range(attention, router + 1)}
    return frozenset(graphed)


def prepared_bytes(experiment: Experiment, kind: str) -> float:
    """Copies of tokens, one for each of their experts, that a graph of moe_preprocess leaves in a
    layer; what is launched one by one frees them once they are sorted."""
    if kind != "experts" or "moe_preprocess" not in experiment.graphed:
        return 0.0
    return hidden_bytes(experiment) * experiment.model.moe_router_topk


def kept_bytes(experiment: Experiment, kind: str) -> float:
    """Bytes that a layer keeps of one micro-batch for the backward pass."""
    if experiment.recompute == "full":
        return hidden_bytes(experiment)
    return computed_bytes(experiment, kind)


def computed_bytes(experiment: Experiment, kind: str) -> float:
    """The same where the whole layer is not, or no longer, to be recomputed."""
    return _kept(layer_operations(experiment, kind))


def attention_bytes(experiment: Experiment) -> float:
    """Bytes that a layer's attention and its norm keep of one micro-batch for the backward pass."""
    return _kept(recomputing(attention_operations(experiment), experiment.selectively_recomputed))


def mamba_bytes(experiment: Experiment) -> float:
    """Bytes that a Mamba layer and its norm keep of one micro-batch for the backward pass."""
    return _kept(mamba_operations(experiment))


def mlp_bytes(experiment: Experiment, kind: str | None = None) -> float:
    """Bytes that a layer's MLP or experts and their norm keep of one micro-batch.

    ``kind``: of the layer; None: experts if the model has any. Of ``predictors`` what joins them is
    counted, too.
    """
    if kind == "predictors":
        experiment = stages.of_predictors(experiment)
    whole = _transformer_kind(experiment, kind)
    operations = mlp_operations(experiment, "experts" if whole == "experts" else "dense")
    kept = _kept(recomputing(operations, experiment.selectively_recomputed))
    return kept + (predictor_bytes(experiment) if kind == "predictors" else 0)


def predictor_bytes(experiment: Experiment) -> float:
    """Bytes that a layer of multi-token prediction keeps besides its transformer layer."""
    experiment = stages.of_predictors(experiment)
    return _kept([*_joining_operations(experiment), _last_norm(experiment)])


def layer_backward_bytes(experiment: Experiment, kind: str) -> float:
    """The most that a layer's backward pass needs beyond what was kept of it, in bytes."""
    hidden = hidden_bytes(experiment)
    masked = hidden if experiment.model.dropout else 0
    return backward_bytes(layer_operations(experiment, kind), hidden, masked)


def loss_kind(experiment: Experiment) -> Literal["unfused", "native", "te"]:
    """Which implementation of the loss runs."""
    return experiment.cross_entropy_fusion_impl if experiment.cross_entropy_fusion else "unfused"


def loss_bytes(experiment: Experiment) -> float:
    """Bytes of the logits when the loss needs most of them.

    The unfused loss works in place: its backward pass has the fp32 softmax and a bf16 gradient
    (megatron/core/tensor_parallel/cross_entropy.py). The fused loss is compiled, and writes the
    softmax to a new tensor: two in fp32, and the logits in bf16 (fusions/fused_cross_entropy.py).
    Transformer Engine's, up to 2.11, overwrites the logits by their gradient
    (transformer_engine/pytorch/triton/cross_entropy.py). Each further token that is predicted has
    left what its loss keeps before (process_mtp_loss in
    megatron/core/transformer/multi_token_prediction.py).
    """
    predictors, size = experiment.model.predictors, element_bytes(experiment)
    gradient = 2 if experiment.precision != "fp32" else 0
    most, kept = {"unfused": (4, 4), "native": (8, 4), "te": (size - gradient, size)}[
        loss_kind(experiment)
    ]
    return logits_on(experiment) * (most + gradient + kept * predictors)


def output_backward_bytes(experiment: Experiment) -> float:
    """Bytes when the output layer goes backward.

    They are the logits' gradient, that of its input (before and after sequence parallelism scatters
    it), and that of its weight.
    """
    model, size = experiment.model, element_bytes(experiment)
    vocabulary = padded_vocab_size(model.vocab_size, experiment.tp) / experiment.tp
    of_weight = weight_gradient_bytes(experiment, vocabulary * model.hidden_size)
    of_input = hidden_bytes(experiment) + gathered_bytes(experiment)
    return size * logits_on(experiment) + of_input + of_weight


def logits_on(experiment: Experiment) -> float:
    """Logits of one micro-batch on a rank."""
    vocabulary = padded_vocab_size(experiment.model.vocab_size, experiment.tp)
    return experiment.rank_tokens * vocabulary / experiment.tp


def _joining_operations(experiment: Experiment) -> list[Operation]:
    """Norms of a hidden state and of the next token's embedding, joined by a projection."""
    hidden, linear = hidden_bytes(experiment), linear_layers.of_predictor(experiment.model)
    joined = hidden_tokens(experiment) * linear.inputs * saved_bytes(experiment)
    gradient = weight_gradient_bytes(experiment, linear.weights / experiment.tp)
    return [
        Operation((hidden, hidden, *norm_statistics(experiment) * 2), 2 * hidden),
        Operation((joined,), 2 * hidden, gradient),
    ]


def _last_norm(experiment: Experiment) -> Operation:
    """The norm after a predicting transformer layer, and its result, the output layer's input."""
    hidden = hidden_bytes(experiment)
    return Operation((hidden, *norm_statistics(experiment), hidden), hidden)


def _transformer_kind(experiment: Experiment, kind: str | None) -> LayerKind:
    return stages.predictor_kind(experiment) if kind in (None, "predictors") else kind


def _kept(operations: list[Operation]) -> float:
    return sum(sum(operation.saves) for operation in operations)
