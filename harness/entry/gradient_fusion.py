"""Products that add to gradients, where Apex is not installed.

Upstream imports two functions from Apex's extension ``fused_weight_gradient_mlp_cuda``
(megatron/core/tensor_parallel/layers.py) and refuses ``--gradient-accumulation-fusion`` without it.
Transformer Engine's product with ``accumulate=True`` computes the same; its own layers fuse by it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from harness.entry import on_cpu

if TYPE_CHECKING:
    import torch

MODULE = "fused_weight_gradient_mlp_cuda"


def install() -> None:
    """Be Apex's extension, where it is not installed. Call before upstream is imported."""
    if MODULE not in sys.modules and find_spec(MODULE) is None:
        sys.modules[MODULE] = sys.modules[__name__]


def wgrad_gemm_accum_fp32(
    input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
) -> None:
    """Add a weight's gradient of one micro-batch to ``main_grad``, in its precision.

    Args:
        input: of the layer, (tokens, inputs).
        grad_output: gradient of its output, (tokens, outputs).
        main_grad: (outputs, inputs).
    """
    if on_cpu():
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), input.to(main_grad.dtype))
    else:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            input,
            grad_output,
            out_dtype=main_grad.dtype,
            layout="NT",
            grad=True,
            accumulate=True,
            out=main_grad,
        )


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
"""For gradients in 16 bits."""
