"""Experts' products in one launch, by cuBLAS: Transformer Engine wants their sizes on the GPU.

With ``NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM=1`` its GroupedLinear multiplies all experts of a
rank by one kernel (``is_module_grouped_tensor_path_supported`` in
transformer_engine/pytorch/module/grouped_linear.py: cuBLAS 13.4 on Hopper), whose sizes are read on
the GPU. Upstream hands them over as a list (``TEGroupedMLP.forward`` in
megatron/core/transformer/moe/experts.py). Its operations of the same name, which multiply where a
matrix of all experts is one parameter, take sizes on the GPU already.
"""

from __future__ import annotations

import os
from functools import cache

from harness.errors import UserError
from harness.upstreams.megatron_lm.environment import GROUPED_GEMM


def install() -> None:
    """Install what the variables ask for. The first step refuses a cuBLAS that is too old."""
    if _asked("cublas"):
        _hand_over_on_gpu()
    if _asked("fused"):
        _check_before_fusing()


def _asked(kernel: str) -> bool:
    return all(os.environ.get(name) == "1" for name in GROUPED_GEMM[kernel])


def _hand_over_on_gpu() -> None:
    import torch
    from transformer_engine.pytorch import GroupedLinear

    forward = GroupedLinear.forward

    def with_sizes_on_gpu(self, inp, m_splits, *args, **kwargs):
        _check_cublas("cublas")
        if not isinstance(m_splits, torch.Tensor):
            pinned = torch.tensor(m_splits, dtype=torch.int64).pin_memory()
            m_splits = pinned.to(inp.device, non_blocking=True)
        return forward(self, inp, m_splits, *args, **kwargs)

    GroupedLinear.forward = with_sizes_on_gpu


def _check_before_fusing() -> None:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    fuse = TEGroupedMLP._make_fused_ops

    def fuse_where_possible(self):
        _check_cublas("fused")
        return fuse(self)

    TEGroupedMLP._make_fused_ops = fuse_where_possible


@cache
def _check_cublas(kernel: str) -> None:
    """Raise UserError where Transformer Engine would take one product for each expert unasked."""
    import torch
    import transformer_engine_torch
    from transformer_engine.pytorch.module import grouped_linear

    if not grouped_linear.is_module_grouped_tensor_path_supported(None, torch.bfloat16):
        raise UserError(
            f"GROUPED_GEMM={kernel}: cuBLAS {transformer_engine_torch.get_cublasLt_version()} has"
            f" no grouped products for {torch.cuda.get_device_name()}: Hopper needs 13.4, Blackwell"
            " 13.3\npip install 'nvidia-cublas>=13.4', or set GROUPED_GEMM=cutlass"
        )
