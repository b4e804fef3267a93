"""Host time of transformer layers: upstream's model at size 1, where launching bounds every step.

Two depths separate what a layer costs from what a model has once. Layers are those of
megatron.core, with Transformer Engine on a GPU, wrapped for data parallelism as in training: its
hooks add up gradients in fp32, which a layer's backward pass pays for.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from harness.experiment.model import Lora
from harness.predict.machine_file import LayerRate
from harness.preflight.clock import Clock

HIDDEN, HEADS, LENGTH, VOCABULARY = 256, 4, 64, 512
ROUTED_LENGTH = 2048
"""Tokens for experts: so many that their numbers differ from step to step as in training. cuBLASLt
looks for a kernel for each size that it has not seen, longer than it takes to launch one."""
DEPTHS = {"cuda": (1, 4), "cpu": (1, 2)}
STEPS = {"cuda": 5, "cpu": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        config: fields of upstream's TransformerConfig.
        parallel: arguments of ``parallel_state.initialize_model_parallel``.
        wrap: fields of upstream's DistributedDataParallelConfig.
        optimizer: its name.
        lora: of its adapters; None: the layer itself is trained.
        ranks: GPUs at least.
        gpu: whether a CPU has no such layer.
    """

    config: dict[str, Any]
    parallel: dict[str, int] = field(default_factory=dict)
    wrap: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    lora: Lora | None = None
    ranks: int = 1
    gpu: bool = False


_GATED = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
}


def _experts(number: int, topk: int) -> dict[str, Any]:
    return {
        "num_moe_experts": number,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": HIDDEN,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        **_GATED,
    }


_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
_FSDP = _SHARDED | {
    "use_megatron_fsdp": True,
    "data_parallel_sharding_strategy": "optim_grads_params",
    "overlap_param_gather": True,
}

KINDS = {
    "dense": Kind({}),
    "gated": Kind(_GATED | _NO_DROPOUT),
    "muon": Kind(_NO_DROPOUT, optimizer="muon", gpu=True),
    "lora": Kind(_GATED | _NO_DROPOUT, lora=Lora(rank=16, alpha=32), gpu=True),
    "fp8 delayed": Kind({"fp8": "hybrid", "fp8_recipe": "delayed"}, gpu=True),
    "fp8 tensorwise": Kind({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, gpu=True),
    "8 experts": Kind(_experts(8, 2) | _NO_DROPOUT, gpu=True),
    "64 experts": Kind(_experts(64, 8) | _NO_DROPOUT, gpu=True),
    "replicas": Kind({}, wrap=_SHARDED, ranks=2),
    "fsdp": Kind({}, wrap=_FSDP, ranks=2, gpu=True),
    "tensor parallel": Kind({}, {"tensor_model_parallel_size": 2}, ranks=2),
    "expert parallel": Kind(
        _experts(16, 2) | _NO_DROPOUT, {"expert_model_parallel_size": 2}, ranks=2, gpu=True
    ),
    "context parallel": Kind(
        {"cp_comm_type": "p2p"}, {"context_parallel_size": 2}, ranks=2, gpu=True
    ),
}
"""Those of the same ``parallel`` are neighbours: changing it connects anew."""


def load() -> None:
    """Import what layers on a GPU use, with PyTorch's compiler of fused operations: some 10 s."""
    import transformer_engine.pytorch  # noqa: F401


def kinds(device: str, ranks: int) -> list[str]:
    """The kinds of layers that can be measured on so many ranks of this device."""
    return [
        name
        for name, kind in KINDS.items()
        if kind.ranks <= ranks and not (kind.gpu and device == "cpu")
    ]


def measure(name: str, clock: Clock, device: str, ranks: int) -> LayerRate:
    """Host time of a layer of this kind, and of the rest of its model."""
    few, many = DEPTHS[device]
    shallow, deep = (_model_ms(KINDS[name], depth, clock, device) for depth in (few, many))
    gc.collect()
    each = [max(0.0, (d - s) / (many - few)) for s, d in zip(shallow, deep, strict=True)]
    rest = [max(0.0, s - few * one) for s, one in zip(shallow, each, strict=True)]
    return LayerRate(
        kind=name,
        ranks=ranks,
        forward_ms=each[0],
        backward_ms=each[1],
        optimizer_ms=each[2],
        rest_forward_ms=rest[0],
        rest_backward_ms=rest[1],
        rest_optimizer_ms=rest[2],
    )


def _model_ms(kind: Kind, depth: int, clock: Clock, device: str) -> tuple[float, float, float]:
    """Forward pass, backward pass and optimizer's step of a model with ``depth`` layers, in ms."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()  # it has a row for each layer of the model before
    _connect(tuple(kind.parallel.items()))
    model = _wrapped(kind, depth, device)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=kind.optimizer,
            lr=1e-4,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=bool(kind.wrap.get("use_distributed_optimizer")),
        ),
        [model],
    )
    length = _length(kind)
    positions = torch.arange(length, device="cuda")[None]

    def forward() -> torch.Tensor:
        tokens = torch.randint(0, VOCABULARY, (1, length), device="cuda")
        return model(tokens, positions, None, labels=tokens).float().mean()

    def both() -> None:
        with model.no_sync():  # as in all micro-batches but the last
            forward().backward()

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward().backward()
        model.finish_grad_sync()
        optimizer.step()

    forward_ms, both_ms, step_ms = (
        clock.host_us(call, STEPS[device]) / 1e3 for call in (forward, both, step)
    )
    return forward_ms, both_ms - forward_ms, step_ms - both_ms


@lru_cache(maxsize=1)
def _connect(parallel: tuple[tuple[str, int], ...]) -> None:
    """Make upstream's groups of ranks, unless they are those of the call before."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**dict(parallel))
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _length(kind: Kind) -> int:
    if "num_moe_experts" in kind.config:
        return ROUTED_LENGTH
    return LENGTH // kind.parallel.get("context_parallel_size", 1)


def _wrapped(kind: Kind, depth: int, device: str):
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **{
            "num_layers": depth,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "bf16": True,
            "params_dtype": torch.bfloat16,
            "pipeline_dtype": torch.bfloat16,
            "bias_activation_fusion": device == "cuda",
            "bias_dropout_fusion": device == "cuda",
            "gradient_accumulation_fusion": False,
            "use_cpu_initialization": device == "cpu",
            **kind.parallel,
            **kind.config,
        }
    )
    make = get_gpt_layer_with_transformer_engine_spec
    if device == "cpu":
        make = get_gpt_layer_local_spec
    spec = make(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    module = GPTModel(
        config,
        spec,
        VOCABULARY,
        max(LENGTH, _length(kind)),
        share_embeddings_and_output_weights=True,
    ).cuda()
    if kind.lora:
        from harness.finetune import lora

        lora.attach([module], kind.lora, seed=1)
    wrap = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **kind.wrap)
    make_wrapped = DistributedDataParallel
    if kind.wrap.get("use_megatron_fsdp"):
        from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

        make_wrapped = FullyShardedDataParallel
    model = make_wrapped(config, wrap, Float16Module(config, module))
    model.train()
    return model
