"""AMD GPUs of this machine, by amdsmi's Python bindings or the program rocm-smi. Written from their
documentation: no AMD GPU was at hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from harness.system.files import json_object

ANSWER_S = 20
"""rocm-smi opens every device, which takes seconds on a node that sleeps."""
_QUESTIONS = (
    *("--showproductname", "--showuniqueid", "--showmeminfo", "vram"),
    *("--showuse", "--showpower", "--showtemp", "--showclocks", "--json"),
)
_FIELDS = {
    "name": r"card series|device name",
    "uuid": r"unique id",
    "total": r"vram total memory \(b\)",
    "used": r"vram total used memory \(b\)",
    "use": r"gpu use \(%\)",
    "power": r"(average graphics package|current socket graphics package) power \(w\)",
    "temperature": r"temperature \(sensor (junction|edge)\) \(c\)",
    "clock": r"sclk clock speed:?",
}
"""Names of rocm-smi's fields, which differ between versions in their capitals."""


@dataclass(frozen=True)
class RocmGpu:
    """One GPU, which is one GCD of an MI250X; None where the driver does not say.

    ``index`` is rocm-smi's, in the order of PCI addresses, as HIP counts them.
    """

    index: int
    name: str
    uuid: str
    total_mib: float
    used_gib: float
    utilization: int | None = None
    clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    pids: tuple[int, ...] = ()


def gpus() -> tuple[RocmGpu, ...]:
    """Every AMD GPU of this machine as it is now; none without amdsmi and rocm-smi."""
    return _by_amdsmi() or _by_rocm_smi()


def _by_amdsmi() -> tuple[RocmGpu, ...]:
    amdsmi = _bindings()
    if amdsmi is None:
        return ()
    try:
        handles = amdsmi.amdsmi_get_processor_handles()
        return tuple(_of_handle(amdsmi, number, handle) for number, handle in enumerate(handles))
    except Exception:  # AmdSmiException has subclasses that differ between versions
        return ()


@cache
def _bindings() -> Any:
    """amdsmi, initialised until this process ends; None where it is missing or sees no driver."""
    try:
        import amdsmi

        amdsmi.amdsmi_init()
    except Exception:  # ImportError, OSError where the library is missing, or its own
        return None
    return amdsmi


def _of_handle(amdsmi: Any, number: int, handle: Any) -> RocmGpu:
    def ask(question: str, *arguments: Any) -> Any:
        """The answer; an empty mapping where this GPU or driver gives none."""
        with suppress(Exception):
            return getattr(amdsmi, question)(handle, *arguments)
        return {}

    vram = amdsmi.amdsmi_get_gpu_vram_usage(handle)  # in MB
    power = ask("amdsmi_get_power_info")
    clock = ask("amdsmi_get_clock_info", amdsmi.AmdSmiClkType.GFX)
    temperature = ask(
        "amdsmi_get_temp_metric",
        amdsmi.AmdSmiTemperatureType.HOTSPOT,
        amdsmi.AmdSmiTemperatureMetric.CURRENT,
    )
    processes = ask("amdsmi_get_gpu_process_list") or ()
    return RocmGpu(
        number,
        str(ask("amdsmi_get_gpu_asic_info").get("market_name", "AMD GPU")),
        str(ask("amdsmi_get_gpu_device_uuid") or number),
        float(vram["vram_total"]),
        vram["vram_used"] / 1024,
        _number(ask("amdsmi_get_gpu_activity").get("gfx_activity"), int),
        _number(clock.get("clk", clock.get("cur_clk")), int),
        _number(power.get("average_socket_power"), float)
        or _number(power.get("current_socket_power"), float),
        _number(temperature, int),
        tuple(sorted(process["pid"] for process in processes if "pid" in process)),
    )


def _by_rocm_smi() -> tuple[RocmGpu, ...]:
    program = shutil.which("rocm-smi")
    if program is None:
        return ()
    try:
        said = subprocess.run(
            [program, *_QUESTIONS], capture_output=True, text=True, timeout=ANSWER_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    # warnings of the driver come before the JSON
    cards = json_object(said[max(said.find("{"), 0) :]) or {}
    found = [
        (int(number[1]), fields)
        for card, fields in cards.items()
        if (number := re.fullmatch(r"card(\d+)", card)) and isinstance(fields, dict)
    ]
    return tuple(
        gpu
        for index, fields in sorted(found, key=lambda each: each[0])
        if (gpu := _of(index, fields))
    )


def _of(index: int, fields: Mapping[str, Any]) -> RocmGpu | None:
    """The GPU that ``fields`` describe; None where they do not say how much memory it has."""

    def field(name: str) -> Any:
        pattern = re.compile(_FIELDS[name], re.IGNORECASE)
        return next((value for key, value in fields.items() if pattern.fullmatch(key)), None)

    total = _number(field("total"), int)
    if total is None:
        return None
    clock = re.search(r"\d+", str(field("clock")))
    return RocmGpu(
        index,
        str(field("name") or "AMD GPU"),
        str(field("uuid") or index),
        total / 2**20,
        (_number(field("used"), int) or 0) / 2**30,
        _number(field("use"), int),
        int(clock[0]) if clock else None,
        _number(field("power"), float),
        _number(field("temperature"), int),
    )


def _number[Kind: (int, float)](value: Any, kind: Callable[[float], Kind]) -> Kind | None:
    """``value`` as a number; None where it is none, such as ``N/A``."""
    try:
        return kind(float(value))
    except (TypeError, ValueError):
        return None
