"""GPU models: memory, peak rates, links; and how to emulate a smaller one (``CARD=``)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from harness.errors import UserError, nearest
from harness.experiment.fabrics import LINKS

FAMILY_CLOSE = 0.6
"""Ratio of difflib above which a name is close."""
Precision = Literal["bf16", "fp8", "fp4", "fp32"]

GPUS_OF_A_NODE = 8
"""Of most machines; a card's own is ``Card.node_gpus``."""

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
    link: str = "pcie4"
    """What joins the cards of a node (fabrics.LINKS)."""
    network: str = "ndr"
    """What joins the nodes of the vendor's reference system (fabrics.NETWORKS)."""
    fp4_tflops: float | None = None
    """In NVFP4, which tensor cores of compute capability 10.0 and higher multiply."""
    achieved_tflops: tuple[float, float | None] | None = None
    """The fastest matrix products in bf16 and fp8 that mamf-finder measured (ACHIEVED)."""

    @property
    def link_gb_per_s(self) -> float:
        """What it can send to its nearest neighbours, by the data sheet."""
        return LINKS[self.link].levels[0].gb_per_s

    @property
    def node_gpus(self) -> int:
        """GPUs of a node: all that its links join."""
        return LINKS[self.link].levels[-1].gpus

    @property
    def is_blackwell(self) -> bool:
        """Whether it is a data-centre card of this generation."""
        return self.key.startswith(("b200", "b300", "gb200", "gb300"))

    def multiplies_groups(self, kernel: str) -> bool:
        """Whether Transformer Engine multiplies all experts by this ``kernel`` on it.

        Compute capability 9.0 for ``cutlass``, 9.0 to 11.0 for ``cublas`` and ``fused``.
        """
        is_hopper = self.key.startswith(("h100", "h200", "gh200"))
        return is_hopper or (self.is_blackwell and kernel != "cutlass")


def find_card(name: str) -> Card | None:
    """The GPU of this short key or NVML name; case, spaces and vendor prefixes do not matter."""
    return _BY_NAME.get(_normal(name))


def required_card(name: str, where: str) -> Card:
    """The GPU of this short key or NVML name. Raises UserError, after ``where``, if unknown."""
    card = find_card(name)
    if card is None:
        raise UserError(f"{where}: unknown GPU; {_nearest_cards(name)}")
    return card


def _nearest_cards(name: str) -> str:
    """The cards whose short key is close to ``name``, else those of a family that is: ``h100``."""
    keys = [card.key for card in CARDS]
    families = {key.partition("-")[0] for key in keys}
    close = get_close_matches(name.lower(), families, cutoff=FAMILY_CLOSE)
    if get_close_matches(name.lower(), keys, cutoff=FAMILY_CLOSE) or not close:
        return nearest(name, keys)
    of_family = [key for key in keys if key.partition("-")[0] in close]
    return f"did you mean {', '.join(of_family)}?"


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


ACHIEVED = "stas00/ml-engineering, compute/accelerator/README.md at 744d01e, table of MAMF"
"""Source of ``achieved_tflops``."""

_A100, _H100 = "NVIDIA A100 datasheet", "NVIDIA H100 Tensor Core GPU datasheet"
_V100, _H200 = "NVIDIA V100 datasheet", "NVIDIA H200 Tensor Core GPU datasheet"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_ADA6 = "NVIDIA RTX 6000 Ada Generation datasheet"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet"
_B200, _B300 = "NVIDIA HGX B200 datasheet", "NVIDIA HGX B300 datasheet"
_GB200, _GB300 = "NVIDIA GB200 NVL72 datasheet", "NVIDIA GB300 NVL72 datasheet"
_MI250X = "AMD Instinct MI250X datasheet, half of it: a package has two GPUs"
_MI300X = "AMD Instinct MI300X datasheet"
_NV2 = {"link": "nvlink2", "network": "hdr"}
_PCIE4, _PCIE5 = {"link": "pcie4", "network": "hdr"}, {"link": "pcie5", "network": "ndr"}
_DGX_A100, _DGX_H100 = {"link": "nvlink3", "network": "hdr"}, {"link": "nvlink4", "network": "ndr"}
_HGX_B200, _HGX_B300 = {"link": "nvlink5", "network": "ndr"}, {"link": "nvlink5", "network": "xdr"}
_NVL72_NDR, _NVL72_XDR = {"link": "nvl72", "network": "ndr"}, {"link": "nvl72", "network": "xdr"}
_BRIDGED = {"link": "nvlink4-bridge", "network": "ndr"}
_LUMI = {"link": "infinity-fabric-3", "network": "slingshot-11"}
_OAM = {"link": "infinity-fabric-4", "network": "roce-400"}


def _card(
    key: str, name: str, memory_mib: int, rates: tuple[float | None, ...], source: str, **more: Any
) -> Card:
    """``rates``: TFLOP/s in bf16, fp8 and fp32, memory GB/s; ``more``: fields with defaults."""
    return Card(key, name, memory_mib, *rates, source, **more)


CARDS = (
    _card("t4", "Tesla T4", 15360, (None, None, 8.1, 320), "NVIDIA T4 datasheet", link="pcie3"),
    _card("v100-16gb", "Tesla V100-SXM2-16GB", 16384, (None, None, 15.7, 900), _V100, **_NV2),
    _card("v100-32gb", "Tesla V100-SXM2-32GB", 32768, (None, None, 15.7, 900), _V100, **_NV2),
    _card("a10-24gb", "NVIDIA A10", 23028, (125, None, 31.2, 600), "NVIDIA A10 datasheet"),
    _card(
        "a100-40gb",
        "NVIDIA A100-SXM4-40GB",
        40960,
        (312, None, 19.5, 1555),
        _A100,
        achieved_tflops=(271.2, None),
        **_DGX_A100,
    ),
    _card(
        "a100-80gb",
        "NVIDIA A100-SXM4-80GB",
        81920,
        (312, None, 19.5, 2039),
        _A100,
        achieved_tflops=(271.2, None),
        **_DGX_A100,
    ),
    _card(
        "a100-pcie-40gb",
        "NVIDIA A100-PCIE-40GB",
        40960,
        (312, None, 19.5, 1555),
        _A100,
        achieved_tflops=(252.9, None),
        **_PCIE4,
    ),
    _card(
        "a100-pcie-80gb",
        "NVIDIA A100 80GB PCIe",
        81920,
        (312, None, 19.5, 1935),
        _A100,
        achieved_tflops=(252.9, None),
        **_PCIE4,
    ),
    _card("rtx3090", "NVIDIA GeForce RTX 3090", 24576, (71, None, 35.6, 936), _AMPERE),
    _card("l4", "NVIDIA L4", 23034, (121, 242.5, 30.3, 300), "NVIDIA L4 datasheet"),
    _card("l40s", "NVIDIA L40S", 46068, (362, 733, 91.6, 864), "NVIDIA L40S datasheet"),
    _card("rtx4090", "NVIDIA GeForce RTX 4090", 24564, (165.2, 330.3, 82.6, 1008), _ADA),
    _card("rtx6000-ada", "NVIDIA RTX 6000 Ada Generation", 49140, (364.2, 728.5, 91.1, 960), _ADA6),
    _card(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        32607,
        (209.5, 419, 104.8, 1792),
        _BLACKWELL,
        fp4_tflops=1676,
        **_PCIE5,
    ),
    _card("h100-pcie-80gb", "NVIDIA H100 PCIe", 81559, (756.5, 1513, 51, 2000), _H100, **_PCIE5),
    _card(
        "h100-80gb",
        "NVIDIA H100 80GB HBM3",
        81559,
        (989.5, 1979, 67, 3350),
        _H100,
        achieved_tflops=(794.5, 1402.6),
        **_DGX_H100,
    ),
    _card("h100-nvl-94gb", "NVIDIA H100 NVL", 95830, (835.5, 1670.5, 60, 3900), _H100, **_BRIDGED),
    _card("gh200-96gb", "NVIDIA GH200 480GB", 97871, (989.5, 1979, 67, 4000), _GH200, **_DGX_H100),
    _card(
        "h200-141gb",
        "NVIDIA H200",
        143771,
        (989.5, 1979, 67, 4800),
        _H200,
        achieved_tflops=(794.5, 1453.4),
        **_DGX_H100,
    ),
    _card(
        "h200-nvl-141gb", "NVIDIA H200 NVL", 143771, (835.5, 1670.5, 60, 4800), _H200, **_BRIDGED
    ),
    _card(
        "b200-180gb",
        "NVIDIA B200",
        183359,
        (2250, 4500, 75, 7700),
        _B200,
        fp4_tflops=9000,
        achieved_tflops=(1745.0, 3432.5),
        **_HGX_B200,
    ),
    _card(
        "b300-288gb",
        "NVIDIA B300 SXM6 AC",
        275040,
        (2250, 4500, 75, 8000),
        _B300,
        fp4_tflops=13500,
        achieved_tflops=(1769.0, 3353.3),
        **_HGX_B300,
    ),
    _card(
        "gb200-186gb",
        "NVIDIA GB200",
        189471,
        (2500, 5000, 80, 8000),
        _GB200,
        fp4_tflops=10000,
        achieved_tflops=(1822.0, 3615.6),
        **_NVL72_NDR,
    ),
    _card(
        "gb300-288gb",
        "NVIDIA GB300",
        284208,
        (2500, 5000, 80, 8000),
        _GB300,
        fp4_tflops=15000,
        **_NVL72_XDR,
    ),
    _card(
        "mi250x-64gb", "AMD Instinct MI250X", 65520, (191.5, None, 23.95, 1638), _MI250X, **_LUMI
    ),
    _card(
        "mi300x-192gb",
        "AMD Instinct MI300X",
        196592,
        (1307.4, 2614.9, 163.4, 5300),
        _MI300X,
        achieved_tflops=(668.4, None),
        **_OAM,
    ),
)
_BY_NAME = {_normal(name): card for card in CARDS for name in (card.key, card.name)}
