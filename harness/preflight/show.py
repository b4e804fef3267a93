"""What ``make preflight`` prints: what was measured, and the data sheet's figure beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from harness.experiment.fabrics import NETWORKS
from harness.experiment.hardware import find_card
from harness.predict.machine_file import Machine
from harness.system import screen


def show(machine: Machine) -> None:
    """Print the machine's rates."""
    name = machine.gpu or f"{machine.cpu}, a process each"
    print(f"{len(machine.gpus)} x {name}; {machine.cores} cores")
    for line in screen.grid([("", "measured", "data sheet", "share"), *_rows(machine)]):
        print(f"  {line}")
    for line in machine.failures:
        print(f"not measured: {line}")


def _rows(machine: Machine) -> Iterator[tuple[str, str, str, str]]:
    card = find_card(machine.gpu) if machine.gpu else None
    peak, bandwidth = (card.bf16_tflops, card.memory_gb_per_s) if card else (None, None)
    for gpu in machine.gpus:
        which = f"{'GPU' if machine.device == 'cuda' else 'process'} {gpu.index}"
        yield _row(f"{which}: product, at first", gpu.first_tflops, peak, "TFLOP/s")
        yield _row(f"{which}: product, sustained", gpu.sustained_tflops, peak, "TFLOP/s")
        yield _row(f"{which}: memory copy", gpu.copy_gb_per_s, bandwidth, "GB/s")
        if machine.device == "cuda":
            yield _row(f"{which}: copy from the host", gpu.to_device_gb_per_s, None, "GB/s")
    if rates := [rate.tflops for rate in machine.products]:
        what = f"products, median of {len(rates)}"
        yield _row(what, statistics.median(rates), peak, "TFLOP/s")
    for rate in machine.attention:
        what = f"attention, {rate.head_size} a head, {rate.length:,} tokens, "
        what += f"dropout {rate.dropout:g}" if rate.dropout else "no dropout"
        yield _row(what, rate.tflops, peak, "TFLOP/s")
    for rate in machine.linears:
        recipe = f"fp8 {rate.recipe}" if rate.recipe else "bf16"
        what = f"linear layer, {recipe}, {rate.rows:,} x {rate.columns:,} x {rate.inner:,}"
        yield _row(what, rate.tflops, None, "TFLOP/s")
    for rate in machine.grouped:
        what = f"{rate.experts} experts, {rate.rows:,} x {rate.columns:,} x {rate.inner:,}"
        yield _row(what, rate.tflops, peak, "TFLOP/s")
    largest = max((rate.size for rate in machine.collectives), default=0)
    for rate in machine.collectives:
        if rate.size == largest:
            what = f"{rate.name.replace('_', '-')} of {rate.size / 2**20:,.0f} MiB"
            yield _row(what, rate.size / rate.us / 1e3, None, "GB/s")
    for rate in machine.between_nodes:
        if rate.size == max(other.size for other in machine.between_nodes):
            name = f"{rate.name.replace('_', '-')} of {rate.size / 2**20:,.0f} MiB"
            what = f"{rate.ranks} nodes: {name}"
            yield _row(what, rate.size / rate.us / 1e3, None, "GB/s")
    sheet = NETWORKS[card.network].levels[0].gb_per_s if card else None
    for other, rate in machine.nodes_gb_per_s.items():
        yield _row(f"to node {other}, a GPU to its peer", rate, sheet, "GB/s")
    yield _row("disk, written and synced", machine.storage.disk_write_gb_per_s, None, "GB/s")
    yield _row("launch of an add", machine.launch.add_us, None, "µs")
    yield _row("launch of an operation with autograd", machine.launch.operation_us, None, "µs")
    for rate in machine.layers:
        passes = rate.forward_ms + rate.backward_ms
        yield _row(f"launch of a layer, both passes: {rate.kind}", passes, None, "ms")


def _row(what: str, value: float, sheet: float | None, unit: str) -> tuple[str, str, str, str]:
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    share = f"{value / sheet:.0%}" if sheet else ""
    return what, f"{number} {unit}", f"{sheet:,.0f}" if sheet else "", share
