"""GPUs and links that are slower than their peers in the same node."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from harness.predict.machine_file import GpuRates, Machine

LEAST_SHARE = 0.85
"""A GPU or link below this share of the median of its peers is slow."""

RATES: tuple[tuple[str, str, Callable[[GpuRates], float], str], ...] = (
    (
        "sustained product",
        "TFLOP/s",
        lambda gpu: gpu.sustained_tflops,
        "nvidia-smi -q -d PERFORMANCE says why its clock is low",
    ),
    (
        "memory copy",
        "GB/s",
        lambda gpu: gpu.copy_gb_per_s,
        "nvidia-smi -q -d ECC,ROW_REMAPPER shows failing memory",
    ),
    (
        "copy from the host",
        "GB/s",
        lambda gpu: gpu.to_device_gb_per_s,
        "nvidia-smi -q shows its PCIe generation and width",
    ),
)
"""What is compared: name, unit, rate of a GPU, and where its cause is looked up."""


def slow(machine: Machine) -> list[str]:
    """A line for each slow GPU and link: its rate beside the median, and what to do.

    The processes of a CPU share its cores: they are not compared.
    """
    if machine.device == "cpu":
        return []
    return [*_slow_gpus(machine), *_slow_links(machine), *_slow_nodes(machine)]


def _slow_gpus(machine: Machine) -> Iterator[str]:
    for what, unit, rate_of, advice in RATES:
        usual = statistics.median(map(rate_of, machine.gpus))
        for gpu in machine.gpus:
            if rate_of(gpu) < LEAST_SHARE * usual:
                yield (
                    f"GPU {gpu.index}: {_compared(what, rate_of(gpu), usual, unit)}{_state(gpu)}\n"
                    f"{advice}; {_without(machine, gpu.index)} runs without it"
                )


def _slow_links(machine: Machine) -> Iterator[str]:
    links = {
        (gpu.index, machine.gpus[other].index): rate
        for gpu in machine.gpus
        for other, rate in gpu.pairs_gb_per_s.items()
        if gpu.index < machine.gpus[other].index
    }
    usual = statistics.median(links.values()) if links else 0
    for (one, other), rate in links.items():
        if rate < LEAST_SHARE * usual:
            yield (
                f"GPU {one} to GPU {other}: {_compared('link', rate, usual, 'GB/s')}\n"
                "nvidia-smi nvlink -s and nvidia-smi topo -m show the links"
            )


def _slow_nodes(machine: Machine) -> Iterator[str]:
    usual = statistics.median(machine.nodes_gb_per_s.values()) if machine.nodes_gb_per_s else 0
    for node, rate in machine.nodes_gb_per_s.items():
        if rate < LEAST_SHARE * usual:
            yield (
                f"node {node}: {_compared('network', rate, usual, 'GB/s', 'the nodes')}\n"
                "ibstat and ethtool show the state of its network cards"
            )


def _compared(what: str, rate: float, usual: float, unit: str, peers: str = "the node") -> str:
    return f"{what} {rate:,.0f} {unit}, {rate / usual:.0%} of {peers}'s median {usual:,.0f}"


def _state(gpu: GpuRates) -> str:
    known = (
        (gpu.sm_clock_mhz, "MHz"),
        (gpu.power_w and round(gpu.power_w), "W"),
        (gpu.temperature_c, "°C"),
    )
    said = ", ".join(f"{number} {unit}" for number, unit in known if number is not None)
    return f" ({said})" if said else ""


def _without(machine: Machine, index: int) -> str:
    return "GPUS_IDS=" + ",".join(str(gpu.index) for gpu in machine.gpus if gpu.index != index)
