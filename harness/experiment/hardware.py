"""GPU models: memory, bandwidth, peak rates; and how to emulate a smaller one (``CARD=``)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.errors import UserError, nearest

Precision = Literal["bf16", "fp8", "fp32"]

GPUS_OF_A_NODE = 8
"""Of NVIDIA's HGX and DGX machines with SXM cards; NVLink reaches no further."""

DRIVER_RESERVED_MIB = 600
"""What the driver keeps: an H200 has 143,771 MiB by nvidia-smi and 143,165 MiB by PyTorch."""

NON_ALLOCATOR_MIB = 3072
"""Memory that PyTorch's allocator cannot have: driver, CUDA context with its kernels, NCCL.

One figure for every world size, because NCCL's part is small: in the published table four or
eight GPUs take 0.4 to 0.6 GiB more than one (104 against 101, 114 and 118 against 111). With this
figure an H200 that emulated an H100 let 111 run and 121 run out of memory, as published.
"""


@dataclass(frozen=True)
class Card:
    """One GPU model, as its datasheet states it.

    Peaks are dense (without sparsity): of the tensor cores with fp32 accumulation; for fp32 of the
    CUDA cores. None: the GPU has no hardware for that precision.
    """

    key: str
    """Short name, as in ``CARD=h100-80gb``."""
    name: str
    """As NVML, nvidia-smi and PyTorch call it."""
    memory_mib: int
    """All of its memory, as nvidia-smi shows it."""
    bf16_tflops: float | None
    fp8_tflops: float | None
    fp32_tflops: float
    memory_gb_per_s: int
    """Memory bandwidth."""
    source: str
    """Title of the datasheet or whitepaper with these figures."""


def find_card(name: str) -> Card | None:
    """The GPU of this short key or NVML name; case, spaces and vendor prefixes do not matter."""
    return _BY_NAME.get(_normal(name))


def required_card(name: str, where: str) -> Card:
    """The GPU of this short key or NVML name. Raises UserError, after ``where``, if unknown."""
    card = find_card(name)
    if card is None:
        raise UserError(f"{where}: unknown GPU; {nearest(name, [card.key for card in CARDS])}")
    return card


def peak_tflops(name: str, precision: Precision) -> float | None:
    """Dense peak in TFLOP/s of the GPU ``name``; None where the GPU or its figure is unknown."""
    card = find_card(name)
    return getattr(card, f"{precision}_tflops") if card else None


def allocator_fraction(card: str, real_total_mib: float) -> float:
    """The ``per_process_memory_fraction`` of PYTORCH_CUDA_ALLOC_CONF that emulates ``card``.

    PyTorch applies the fraction to the memory that CUDA shows, which excludes the driver's part:
    ``(memory of card - NON_ALLOCATOR_MIB) / (real_total_mib - DRIVER_RESERVED_MIB)``, rounded to
    three decimals.

    Args:
        card: the card to emulate: a short key or an NVML name.
        real_total_mib: all memory of the GPU that is there, as nvidia-smi shows it.

    Raises:
        UserError: ``card`` is unknown, or the GPU is no larger than it.
    """
    smaller = required_card(card, f"CARD={card}")
    if smaller.memory_mib >= real_total_mib:
        raise UserError(
            f"CARD={card} has {smaller.memory_mib:,} MiB, this GPU {real_total_mib:,.0f} MiB\n"
            "only a smaller card can be emulated; leave CARD= out, or name a smaller one"
        )
    allowed_mib = smaller.memory_mib - NON_ALLOCATOR_MIB
    return round(allowed_mib / (real_total_mib - DRIVER_RESERVED_MIB), 3)


def _normal(name: str) -> str:
    parts = re.split(r"[\s_-]+", name.strip().lower())
    return "-".join(part for part in parts if part not in ("nvidia", "tesla", "geforce"))


_A100, _H100 = "NVIDIA A100 datasheet", "NVIDIA H100 Tensor Core GPU datasheet"
_V100, _H200 = "NVIDIA V100 datasheet", "NVIDIA H200 Tensor Core GPU datasheet"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_ADA6 = "NVIDIA RTX 6000 Ada Generation datasheet"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet"
_GB200 = "NVIDIA GB200 NVL72 datasheet"

# key, name, memory MiB, TFLOP/s in bf16, fp8 and fp32, memory GB/s, source
CARDS = (
    Card("t4", "Tesla T4", 15360, None, None, 8.1, 320, "NVIDIA T4 datasheet"),
    Card("v100-16gb", "Tesla V100-SXM2-16GB", 16384, None, None, 15.7, 900, _V100),
    Card("v100-32gb", "Tesla V100-SXM2-32GB", 32768, None, None, 15.7, 900, _V100),
    Card("a10-24gb", "NVIDIA A10", 23028, 125, None, 31.2, 600, "NVIDIA A10 datasheet"),
    Card("a100-40gb", "NVIDIA A100-SXM4-40GB", 40960, 312, None, 19.5, 1555, _A100),
    Card("a100-80gb", "NVIDIA A100-SXM4-80GB", 81920, 312, None, 19.5, 2039, _A100),
    Card("a100-pcie-40gb", "NVIDIA A100-PCIE-40GB", 40960, 312, None, 19.5, 1555, _A100),
    Card("a100-pcie-80gb", "NVIDIA A100 80GB PCIe", 81920, 312, None, 19.5, 1935, _A100),
    Card("rtx3090", "NVIDIA GeForce RTX 3090", 24576, 71, None, 35.6, 936, _AMPERE),
    Card("l4", "NVIDIA L4", 23034, 121, 242.5, 30.3, 300, "NVIDIA L4 datasheet"),
    Card("l40s", "NVIDIA L40S", 46068, 362, 733, 91.6, 864, "NVIDIA L40S datasheet"),
    Card("rtx4090", "NVIDIA GeForce RTX 4090", 24564, 165.2, 330.3, 82.6, 1008, _ADA),
    Card("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation", 49140, 364.2, 728.5, 91.1, 960, _ADA6),
    Card("rtx5090", "NVIDIA GeForce RTX 5090", 32607, 209.5, 419, 104.8, 1792, _BLACKWELL),
    Card("h100-pcie-80gb", "NVIDIA H100 PCIe", 81559, 756.5, 1513, 51, 2000, _H100),
    Card("h100-80gb", "NVIDIA H100 80GB HBM3", 81559, 989.5, 1979, 67, 3350, _H100),
    Card("h100-nvl-94gb", "NVIDIA H100 NVL", 95830, 835.5, 1670.5, 60, 3900, _H100),
    Card("gh200-96gb", "NVIDIA GH200 480GB", 97871, 989.5, 1979, 67, 4000, _GH200),
    Card("h200-141gb", "NVIDIA H200", 143771, 989.5, 1979, 67, 4800, _H200),
    Card("h200-nvl-141gb", "NVIDIA H200 NVL", 143771, 835.5, 1670.5, 60, 4800, _H200),
    Card("b200-180gb", "NVIDIA B200", 183359, 2250, 4500, 75, 7700, "NVIDIA HGX B200 datasheet"),
    Card("gb200-186gb", "NVIDIA GB200", 189471, 2500, 5000, 80, 8000, _GB200),
)
_BY_NAME = {_normal(name): card for card in CARDS for name in (card.key, card.name)}
