"""GPU models: memory, its bandwidth, peak rates by precision; and what it takes to behave as a
smaller one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError, nearest

Precision = Literal["bf16", "fp8", "fp32"]


@dataclass(frozen=True)
class Gpu:
    """One GPU model, as its datasheet states it.

    Peaks are in TFLOP/s without sparsity: of the tensor cores accumulating in fp32, for ``fp32`` of
    the CUDA cores. None: the GPU has no hardware for that precision.
    """

    key: str
    """Short name, as in ``CARD=h100-80gb``."""
    name: str
    """As NVML, nvidia-smi and PyTorch call it."""
    memory_mib: int
    """All of its memory, as nvidia-smi shows it."""
    bf16: float | None
    fp8: float | None
    fp32: float
    bandwidth_gb_s: int
    """Memory bandwidth."""
    source: str
    """Title of the datasheet or whitepaper with these figures."""


GPUS_OF_A_NODE = 8
"""Of NVIDIA's HGX and DGX machines with SXM cards; NVLink reaches no further."""

_A100, _V100 = "NVIDIA A100 datasheet", "NVIDIA V100 datasheet"
_H100, _H200 = "NVIDIA H100 Tensor Core GPU datasheet", "NVIDIA H200 Tensor Core GPU datasheet"
_ADA, _AMPERE = (
    "NVIDIA Ada GPU Architecture whitepaper",
    "NVIDIA Ampere GA102 GPU Architecture whitepaper",
)

# key, name, memory MiB, bf16, fp8, fp32, memory GB/s, source
GPUS = (
    Gpu("t4", "Tesla T4", 15360, None, None, 8.1, 320, "NVIDIA T4 datasheet"),
    Gpu("v100-16gb", "Tesla V100-SXM2-16GB", 16384, None, None, 15.7, 900, _V100),
    Gpu("v100-32gb", "Tesla V100-SXM2-32GB", 32768, None, None, 15.7, 900, _V100),
    Gpu("a10-24gb", "NVIDIA A10", 23028, 125, None, 31.2, 600, "NVIDIA A10 datasheet"),
    Gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 40960, 312, None, 19.5, 1555, _A100),
    Gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 81920, 312, None, 19.5, 2039, _A100),
    Gpu("a100-pcie-40gb", "NVIDIA A100-PCIE-40GB", 40960, 312, None, 19.5, 1555, _A100),
    Gpu("a100-pcie-80gb", "NVIDIA A100 80GB PCIe", 81920, 312, None, 19.5, 1935, _A100),
    Gpu("rtx3090", "NVIDIA GeForce RTX 3090", 24576, 71, None, 35.6, 936, _AMPERE),
    Gpu("l4", "NVIDIA L4", 23034, 121, 242.5, 30.3, 300, "NVIDIA L4 datasheet"),
    Gpu("l40s", "NVIDIA L40S", 46068, 362, 733, 91.6, 864, "NVIDIA L40S datasheet"),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24564, 165.2, 330.3, 82.6, 1008, _ADA),
    Gpu(
        "rtx6000-ada",
        "NVIDIA RTX 6000 Ada Generation",
        49140,
        364.2,
        728.5,
        91.1,
        960,
        "NVIDIA RTX 6000 Ada Generation datasheet",
    ),
    Gpu(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        32607,
        209.5,
        419,
        104.8,
        1792,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper",
    ),
    Gpu("h100-pcie-80gb", "NVIDIA H100 PCIe", 81559, 756.5, 1513, 51, 2000, _H100),
    Gpu("h100-80gb", "NVIDIA H100 80GB HBM3", 81559, 989.5, 1979, 67, 3350, _H100),
    Gpu("h100-nvl-94gb", "NVIDIA H100 NVL", 95830, 835.5, 1670.5, 60, 3900, _H100),
    Gpu(
        "gh200-96gb",
        "NVIDIA GH200 480GB",
        97871,
        989.5,
        1979,
        67,
        4000,
        "NVIDIA GH200 Grace Hopper Superchip datasheet",
    ),
    Gpu("h200-141gb", "NVIDIA H200", 143771, 989.5, 1979, 67, 4800, _H200),
    Gpu("h200-nvl-141gb", "NVIDIA H200 NVL", 143771, 835.5, 1670.5, 60, 4800, _H200),
    Gpu("b200-180gb", "NVIDIA B200", 183359, 2250, 4500, 75, 7700, "NVIDIA HGX B200 datasheet"),
    Gpu(
        "gb200-186gb", "NVIDIA GB200", 189471, 2500, 5000, 80, 8000, "NVIDIA GB200 NVL72 datasheet"
    ),
)

DRIVER_RESERVED_MIB = 600
"""What the driver keeps: of an H200's 143,771 MiB (nvidia-smi), PyTorch sees 143,165 MiB (139.81
GiB)."""

NON_ALLOCATOR_MIB = 3072
"""Memory of a card that PyTorch's allocator cannot have: driver, CUDA context with its kernels,
NCCL.

One figure for every world size, because NCCL is the small part: in the published table, four or
eight GPUs take 0.4 to 0.6 GiB more than one (104 against 101, 114 and 118 against 111). With it an
H200 as an H100 let 111 run and made 121 run out of memory, as published.
"""


def find_gpu(name: str) -> Gpu | None:
    """The GPU of this short key or NVML name, or None. Case, spaces and vendor prefixes do not
    matter."""
    return _BY_NAME.get(_normal(name))


def required_gpu(name: str, where: str) -> Gpu:
    """The GPU of this short key or NVML name. Raises UserError, which begins with ``where``, where
    it is unknown."""
    gpu = find_gpu(name)
    if gpu is None:
        raise UserError(f"{where}: unknown GPU; {nearest(name, [gpu.key for gpu in GPUS])}")
    return gpu


def peak_tflops(gpu_name: str, precision: Precision) -> float | None:
    """Dense peak in TFLOP/s of the GPU at ``precision``, or None where the GPU or its figure is
    unknown."""
    gpu = find_gpu(gpu_name)
    return getattr(gpu, precision) if gpu else None


def allocator_fraction(card: str, real_total_mib: float) -> float:
    """The ``per_process_memory_fraction`` for PYTORCH_CUDA_ALLOC_CONF that makes a GPU as small as
    ``card``.

    PyTorch takes the fraction of what CUDA shows, which is the GPU's memory less the driver's part:
    ``(memory of card - NON_ALLOCATOR_MIB) / (real_total_mib - DRIVER_RESERVED_MIB)``, to three
    decimals.

    Args:
        card: the card to behave as: a short key or an NVML name.
        real_total_mib: all memory of the GPU that is really there, as nvidia-smi shows it.

    Raises:
        UserError: ``card`` is unknown, or the GPU is no larger than it.
    """
    gpu = required_gpu(card, f"CARD={card}")
    if gpu.memory_mib >= real_total_mib:
        raise UserError(
            f"CARD={card} has {gpu.memory_mib:,} MiB, this GPU {real_total_mib:,.0f} MiB\n"
            "only a smaller card can be emulated; leave CARD= out, or name a smaller one"
        )
    return round((gpu.memory_mib - NON_ALLOCATOR_MIB) / (real_total_mib - DRIVER_RESERVED_MIB), 3)


def _normal(name: str) -> str:
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "-".join(word for word in words if word not in ("nvidia", "tesla", "geforce"))


_BY_NAME = {_normal(name): gpu for gpu in GPUS for name in (gpu.key, gpu.name)}
