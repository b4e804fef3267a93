"""GPU memory outside of PyTorch's allocator: CUDA's context, loaded kernels, NCCL's buffers."""

from __future__ import annotations

from harness.experiment.experiment import Experiment

# Fitted to what NVML counted beyond PyTorch's reserved memory in the runs on H200s of
# experiments/runs: one GPU, and two to four with each kind of parallelism.
CONTEXT_GIB = 2.44
"""CUDA, cuBLAS, cuDNN and Transformer Engine on one GPU."""
COMMUNICATOR_GIB = 0.45
"""Channels and buffers of one NCCL communicator, whatever the number of its ranks up to four."""
EXPERTS_GIB = 0.4
"""Kernels of grouped products and permutation."""


def context_gib(experiment: Experiment) -> float:
    """GiB that nvidia-smi shows beyond what PyTorch reserves."""
    experts = EXPERTS_GIB if experiment.model.num_experts else 0
    return CONTEXT_GIB + COMMUNICATOR_GIB * _communicators(experiment) + experts


def _communicators(experiment: Experiment) -> int:
    """NCCL communicators of a rank: one is made for each group that communicates.

    Source: megatron/core/parallel_state.py. The distributed optimizer and Megatron-FSDP have
    groups of their own; pipelines one for each direction and the embedding's.
    """
    own_group = (
        experiment.sharding.startswith(("optim", "fsdp_")) and experiment.optimizer == "adam"
    )
    return (
        (experiment.replicas > 1) * (1 + own_group)
        + (experiment.tp > 1) * (1 + experiment.sequence_parallel)
        + sum(ranks > 1 for ranks in experiment.cp_levels)
        + 3 * (experiment.pp > 1)
        + 3 * (max(experiment.ep, experiment.etp) > 1)
        + (experiment.fp8_recipe == "delayed" and experiment.world_size > 1)
    )
