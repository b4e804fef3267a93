"""The category of a kernel or operator, by its name."""

from __future__ import annotations

import functools
import re
from enum import StrEnum


class Category(StrEnum):
    """What a moment of a step is spent on; of several at the same moment, the first one counts."""

    GEMM = "gemm"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    COMMUNICATION = "communication"
    MEMORY = "memory"
    LAUNCH_BOUND = "launch_bound"
    IDLE = "idle"


COMPUTE = frozenset(
    {Category.GEMM, Category.ATTENTION, Category.ELEMENTWISE, Category.OPTIMIZER, Category.OTHER}
)

TITLES = {
    Category.GEMM: "GEMM",
    Category.ATTENTION: "attention",
    Category.ELEMENTWISE: "normalisation, elementwise",
    Category.OPTIMIZER: "optimizer",
    Category.OTHER: "other kernels",
    Category.COMMUNICATION: "communication, exposed",
    Category.MEMORY: "memcpy, memset",
    Category.LAUNCH_BOUND: "idle: launch-bound",
    Category.IDLE: "idle: between kernels",
}

_RULES = (
    # NCCL (src/device: ncclDevKernel_*), gloo and c10d on a CPU, TE's user buffers, NVSHMEM and
    # PyTorch's symmetric memory
    (
        Category.COMMUNICATION,
        r"nccl|^gloo:|^c10d::|userbuffers|nvshmem|deep_ep|multimem_|_shot_all_",
    ),
    # multi-tensor kernels of Apex and TE, used by optimizers, clipping and gradient norms;
    # PyTorch's fused optimizers
    (Category.OPTIMIZER, r"multi_tensor_apply|(?<![Hh])[Aa]dam|^Optimizer\."),
    # FlashAttention, cuDNN (cudnn_generated_fort_native_sdpa_*, and around it
    # cudnn::fusion::compute_dot_do_o and others), memory-efficient attention; a CPU's batched
    # products
    (
        Category.ATTENTION,
        r"[Ff]lash|fmha|sdpa|cudnn::fusion|[Aa]ttention|[Ss]oft[Mm]ax|aten::(bmm|baddbmm)",
    ),
    # cuBLAS (nvjet_*, *gemm*, *gemv*, splitKreduce), CUTLASS, grouped GEMMs, inductor's GEMM
    # templates
    (
        Category.GEMM,
        r"[Gg]emm|GEMM|nvjet|gemv|cublas|splitKreduce|cutlass|xmma|triton_tem|aten::(add)?mm|aten::_grouped_mm",
    ),
    (Category.MEMORY, r"^aten::(copy_|fill_|zero_)$"),
    # PyTorch's and TE's other kernels (layer_norm, ln_fwd_*, casts, dropout, biases, permutations),
    # sorts, and inductor's
    (
        Category.ELEMENTWISE,
        r"at::native|^aten::|at_cuda_detail|cub::|elementwise|[Nn]orm|ln_[fb]wd|triton_|"
        r"transformer_engine|[Dd]ropout|[Gg]elu|silu|swiglu|rope|rotary|bias|[Ee]mbedding|permute|row_id_map|topk|"
        r"[Ss]ort|scatter|index|cast|transpose",
    ),
)
RULES = tuple((category, re.compile(pattern)) for category, pattern in _RULES)


@functools.cache
def category_of(name: str) -> Category:
    """The category of a GPU kernel or a CPU operator; ``OTHER`` if no rule matches."""
    return next((category for category, pattern in RULES if pattern.search(name)), Category.OTHER)
