"""What joins GPUs: the links within a node and the networks between nodes, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Level:
    """GPUs that one kind of link or switch joins, and what each can send through it."""

    name: str
    gpus: int | None
    """Neighbouring ranks that it joins; None: all."""
    gb_per_s: float
    """Of one GPU, in one direction; where GPUs share a network card, its share."""


@dataclass(frozen=True)
class Fabric:
    """The levels of a node's links, or of a network, from the innermost outwards."""

    key: str
    levels: tuple[Level, ...]
    source: str
    share: float = 0.8
    """Of the data sheet, what NCCL's rings reach with large messages (MEASURED)."""
    reduce_share: float | None = None
    """The same where its switch computes an all-reduce (NVLink SHARP); None: it does not."""


MEASURED = (
    "stas00/ml-engineering, network/README.md at 744d01e: bus bandwidth of rings: NVLink"
    " 3, 4 and 5 78, 82 and 76 % of the data sheet; four nodes of eight B200 82 % of 400 Gb/s"
    " a GPU with messages of 512 MiB. Reduced in the switch: 480 and 838 GB/s, counted as 2 (n-1)/n"
    " of the message, of which (n+1)/n are sent: 308 and 539 GB/s"
)
"""Source of both shares; 80 % elsewhere, its rule of thumb."""
_DGX = "NVIDIA {} datasheet and user guide"
_SUPERPOD = "NVIDIA DGX SuperPOD reference architecture: 32 nodes a rail-optimised scalable unit"


def _switched(key: str, gpus: int, gb_per_s: float, source: str, **more: Any) -> Fabric:
    return Fabric(key, (Level(f"{key} switch", gpus, gb_per_s),), source, **more)


def _railed(key: str, gb_per_s: float, source: str) -> Fabric:
    """A network whose leaf switches join cards of the same rank in 32 nodes; its spine is full."""
    rail = Level(f"{key} rail", 256, gb_per_s)
    return Fabric(
        key, (rail, Level(f"{key} spine", None, gb_per_s)), f"{source}; {_SUPERPOD}", share=0.82
    )


LINKS = {
    fabric.key: fabric
    for fabric in (
        _switched("pcie3", 8, 16, "PCI Express 3.0 specification, 16 lanes"),
        _switched("pcie4", 8, 32, "PCI Express 4.0 specification, 16 lanes"),
        _switched("pcie5", 8, 64, "PCI Express 5.0 specification, 16 lanes"),
        _switched("nvlink2", 8, 150, "NVIDIA V100 datasheet: 300 GB/s both ways"),
        _switched("nvlink3", 8, 300, "NVIDIA A100 datasheet: 600 GB/s both ways", share=0.78),
        _switched(
            "nvlink4",
            8,
            450,
            "NVIDIA H100 datasheet: 900 GB/s both ways",
            share=0.82,
            reduce_share=0.685,
        ),
        _switched(
            "nvlink5",
            8,
            900,
            "NVIDIA HGX B200 datasheet: 1.8 TB/s both ways",
            share=0.76,
            reduce_share=0.6,
        ),
        _switched(
            "nvl72",
            72,
            900,
            "NVIDIA GB200 NVL72 datasheet: 72 GPUs, 1.8 TB/s each",
            share=0.76,
            reduce_share=0.6,
        ),
        Fabric(
            "nvlink4-bridge",
            (Level("NVLink bridge", 2, 300), Level("pcie5 switch", 8, 64)),
            "NVIDIA H100 NVL datasheet: pairs at 600 GB/s both ways",
        ),
        Fabric(
            "infinity-fabric-3",
            (Level("package", 2, 200), Level("infinity fabric", 8, 50)),
            "AMD CDNA 2 whitepaper and LUMI's documentation: 4 links of 50 GB/s within a package,"
            " at least one to another",
        ),
        _switched("infinity-fabric-4", 8, 448, "AMD Instinct MI300X datasheet: 7 links of 64 GB/s"),
    )
}
"""By key: within a node."""

NETWORKS = {
    fabric.key: fabric
    for fabric in (
        _railed("hdr", 25, _DGX.format("DGX A100") + ": a 200 Gb/s adapter a GPU"),
        _railed("ndr", 50, _DGX.format("DGX H100") + ": a 400 Gb/s adapter a GPU"),
        _railed("xdr", 100, _DGX.format("DGX B300") + ": an 800 Gb/s adapter a GPU"),
        _railed("roce-400", 50, "RoCE with a 400 Gb/s adapter a GPU"),
        Fabric(
            "slingshot-11",
            (Level("slingshot-11", None, 12.5),),
            "LUMI-G's documentation: four 200 Gb/s adapters for eight GCDs",
        ),
    )
}
"""By key: between nodes."""
