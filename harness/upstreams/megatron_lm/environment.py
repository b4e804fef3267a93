"""The environment variables of a run, each with the reason it is set."""

from __future__ import annotations

import os
from dataclasses import dataclass

from harness.data import data_sets
from harness.experiment.experiment import Experiment
from harness.run.directory import PROFILE_VARIABLE
from harness.upstreams.megatron_lm.flags import Device
from harness.upstreams.megatron_lm.tracking import Tracking

UNTIL_VARIABLE = "HARNESS_UNTIL"
KEEP_VARIABLE = "HARNESS_KEEP"
GROUPED_GEMM = {
    "cutlass": ("NVTE_USE_CUTLASS_GROUPED_GEMM",),
    "cublas": ("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM",),
    # upstream asks for the second where an activation is gated; its kernels are Blackwell's only
    "fused": ("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "NVTE_CUTEDSL_FUSED_GROUPED_MLP"),
}
"""Transformer Engine's variables, by kernel."""


@dataclass(frozen=True)
class Variable:
    """One environment variable; ``reason`` is its comment in the script."""

    name: str
    value: str
    reason: str


def variables(
    e: Experiment,
    device: Device,
    *,
    memory_fraction: float | None = None,
    keep: int | None = None,
    tracking: Tracking | None = None,
) -> list[Variable]:
    """The variables of ``e`` on ``device``.

    Args:
        memory_fraction: share of the GPU's memory that PyTorch may allocate, where ``e.card``
            emulates a smaller card.
        keep: number of checkpoints that are kept.
        tracking: how the run is logged to Weights & Biases.
    """
    found = _cpu(e) if device == "cpu" else _cuda(e, memory_fraction)
    if e.profile:
        found.append(
            Variable(
                PROFILE_VARIABLE,
                "-".join(map(str, e.profile)),
                "steps to trace",
            )
        )
    if e.data != data_sets.MOCK:
        found.append(
            Variable("HF_HUB_OFFLINE", "1", "the tokenizer is local; nothing is downloaded")
        )
    if e.until:
        found.append(
            Variable(
                UNTIL_VARIABLE,
                f"{e.until.validation_loss:g}",
                "loss on held-out data at which the run ends",
            )
        )
    if keep:
        found.append(Variable(KEEP_VARIABLE, str(keep), "checkpoints to keep, the newest"))
    if tracking:
        found.append(Variable("WANDB_MODE", tracking.mode, "log to Weights & Biases"))
    return found


def _cpu(e: Experiment) -> list[Variable]:
    threads = max(1, (os.cpu_count() or 1) // e.ranks_per_node)
    found = [
        Variable("HARNESS_DEVICE", "cpu", "run on harness.cpu, the stand-in for CUDA"),
        Variable("CUDA_DEVICE_MAX_CONNECTIONS", "8", "upstream refuses 1 for FSDP")
        if e.fully_sharded
        else Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "1",
            "upstream asserts it for tensor and context parallelism",
        ),
        Variable("OMP_NUM_THREADS", str(threads), "the ranks share the cores"),
    ]
    if e.nodes == 1:
        found.append(
            Variable(
                "GLOO_SOCKET_IFNAME",
                "lo",
                "otherwise gloo resolves the host's name, which fails on many laptops",
            )
        )
    return found


def _cuda(e: Experiment, memory_fraction: float | None) -> list[Variable]:
    found = [
        Variable("HARNESS_DEVICE", "cuda", "one GPU per rank"),
        Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS", "8", "FSDP gathers on several queues; upstream refuses 1"
        )
        if e.fully_sharded
        else Variable(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "1",
            "one queue: communication starts before the GEMM that it overlaps",
        ),
        Variable("OMP_NUM_THREADS", "1", "torchrun's own choice for several ranks"),
    ]
    found += [
        Variable(name, "1", "multiply a rank's experts by one kernel")
        for name in GROUPED_GEMM.get(e.grouped_gemm, ())
    ]
    if e.tp_overlap:
        found.append(
            Variable("UB_SKIPMC", "1", "userbuffers share memory between GPUs without multicast")
        )
    if memory_fraction is not None:
        found.append(
            Variable(
                "PYTORCH_CUDA_ALLOC_CONF",
                f"per_process_memory_fraction:{memory_fraction:.4f}",
                f"emulate {e.card}: its memory less what CUDA and NCCL take there",
            )
        )
    return found
