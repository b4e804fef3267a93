"""Experts' products in one launch, by cuBLAS: Transformer Engine wants their sizes on the GPU.

With ``NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM=1`` its GroupedLinear multiplies all experts of a
rank by one kernel (``is_module_grouped_tensor_path_supported`` in
transformer_engine/pytorch/module/grouped_linear.py: cuBLAS 13.4 on Hopper), whose sizes are read on
the GPU. Upstream hands them over as a list (``TEGroupedMLP.forward`` in
megatron/core/transformer/moe/experts.py).
"""

from __future__ import annotations

import os

VARIABLE = "NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM"


def install() -> None:
    """Hand sizes over on the GPU, where the variable asks for these products."""
    if os.environ.get(VARIABLE) != "1":
        return
    import torch
    from transformer_engine.pytorch import GroupedLinear

    forward = GroupedLinear.forward

    def with_sizes_on_gpu(self, inp, m_splits, *args, **kwargs):
        if not isinstance(m_splits, torch.Tensor):
            pinned = torch.tensor(m_splits, dtype=torch.int64).pin_memory()
            m_splits = pinned.to(inp.device, non_blocking=True)
        return forward(self, inp, m_splits, *args, **kwargs)

    GroupedLinear.forward = with_sizes_on_gpu
