"""GPUs of this machine: which exist, which are busy, memory and clocks.

NVIDIA's through NVML; AMD's through ``rocm``, where there is no NVML.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from harness.errors import UserError
from harness.machine import rocm
from harness.system.screen import raw

BUSY_MIB = 1024
"""A GPU with more memory in use is busy, even where NVML lists no process: processes of other
containers are hidden."""

SAMPLE_S = 0.5
ROCM_SAMPLE_S = 5.0
"""rocm-smi is a program that asks every GPU, and takes a core meanwhile."""
MONITOR_S = 1.0


@dataclass(frozen=True)
class LocalGpu:
    """One GPU: its NVML index (that of nvidia-smi), the driver's name for it, and its memory."""

    index: int
    name: str
    uuid: str
    total_mib: float


@dataclass(frozen=True)
class GpuSample:
    """One GPU at one moment; None where the driver does not say. Memory as nvidia-smi shows it."""

    index: int
    used_gib: float
    utilization: int | None = None
    """Percent of the last sampling period in which a kernel ran."""
    sm_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None


@dataclass(frozen=True)
class GpuProcess:
    """A compute process on a GPU."""

    pid: int
    used_gib: float | None
    name: str | None


@dataclass(frozen=True)
class GpuUse:
    """Memory in use and processes of a GPU."""

    gpu: LocalGpu
    used_gib: float
    processes: tuple[GpuProcess, ...] = ()

    @property
    def busy(self) -> bool:
        return bool(self.processes) or self.used_gib * 1024 > BUSY_MIB


def list_gpus() -> tuple[LocalGpu, ...]:
    """Every GPU of this machine, by index; none without a driver."""
    with _nvml() as nvml:
        if nvml is None:
            return tuple(
                LocalGpu(gpu.index, gpu.name, gpu.uuid, gpu.total_mib) for gpu in rocm.gpus()
            )
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
            found.append(
                LocalGpu(index, _text(name), _text(uuid), memory(nvml, handle).total / 2**20)
            )
        return tuple(found)


def uuids() -> frozenset[str]:
    """Of every GPU of this machine."""
    return frozenset(gpu.uuid for gpu in list_gpus())


def keep_awake() -> None:
    """Keep the driver initialised until this process ends.

    Without persistence mode the driver initialises the GPUs at each first query, for seconds.
    """
    try:
        import pynvml
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()


def driver_versions() -> tuple[str | None, str | None]:
    """Driver version and the newest CUDA it supports, ``("580.95.05", "13.0")``; None without a
    driver."""
    with _nvml() as nvml:
        if nvml is None:
            return None, None
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        return _text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"


def kept_by_driver_gib(indices: Sequence[int]) -> float | None:
    """The most memory that the driver reserves on one of these GPUs and does not count as used.

    None where the driver does not say.
    """
    with _nvml() as nvml:
        handles = (
            [_ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index) for index in indices]
            if nvml
            else []
        )
        found = [_ask(nvml, memory, nvml, handle) for handle in handles if handle is not None]
    return max((m.reserved / 2**30 for m in found if hasattr(m, "reserved")), default=None)


def use() -> tuple[GpuUse, ...]:
    """Memory in use and compute processes of every GPU; those of other containers are hidden."""
    gpus = list_gpus()
    with _nvml() as nvml:
        return tuple(_use(nvml, gpu) for gpu in gpus) if nvml else _use_of_rocm()


def choose(count: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Pick ``count`` of the ``available`` GPUs.

    GPUs named in ``wanted`` are taken even if they are busy.

    Raises:
        UserError: there are too few GPUs, or too few free ones; busy ones are listed with their
            processes.
    """
    free = available(wanted)
    if len(free) >= count:
        return free[:count]
    if wanted is not None:
        raise UserError(
            f"GPUS_IDS={_ids(wanted)} names {_gpus(len(wanted))}, this run needs {count}"
        )
    uses = _visible(use())
    if len(uses) < count:
        where = (
            "CUDA_VISIBLE_DEVICES shows"
            if "CUDA_VISIBLE_DEVICES" in os.environ
            else "this machine has"
        )
        raise UserError(
            f"this run needs {_gpus(count)}, {where} {len(uses)}\n"
            f"GPUS={max(len(uses), 1)} runs it on fewer, DEVICE=cpu as a miniature"
        )
    busy = "\n".join(f"  {describe(u)}" for u in uses if u.busy)
    raise UserError(
        f"this run needs {_gpus(count)}, {len(free)} of {len(uses)} are free; busy:\n{busy}\n"
        f"GPUS_IDS={_ids([u.gpu.index for u in uses][:count])} takes them although they are busy"
    )


def available(wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """GPUs that may be used: ``wanted``, or the free ones (of CUDA_VISIBLE_DEVICES, if set).

    Raises:
        UserError: one of ``wanted`` does not exist or is named twice.
    """
    if wanted is None:
        return tuple(u.gpu.index for u in _visible(use()) if not u.busy)
    there = [gpu.index for gpu in list_gpus()]
    unknown = [index for index in wanted if index not in there]
    if unknown:
        raise UserError(
            f"GPUS_IDS={_ids(wanted)}: no GPU {_ids(unknown)}; this machine has"
            f" {_ids(there) or 'none'}"
        )
    if len(set(wanted)) < len(wanted):
        raise UserError(f"GPUS_IDS={_ids(wanted)} names a GPU twice")
    return tuple(wanted)


def describe(use: GpuUse) -> str:
    """One line about the use of a GPU: ``GPU 3: 71.2 GiB used, by python (pid 4711, 70.9 GiB)``."""
    line = f"GPU {use.gpu.index}: {use.used_gib:.1f} GiB used"
    if use.processes:
        line += ", by " + ", ".join(_describe_process(p) for p in use.processes)
    return line


def sample(indices: Sequence[int]) -> tuple[GpuSample, ...]:
    """Memory, utilisation, clock, power and temperature of these GPUs; empty without a driver."""
    with _nvml() as nvml:
        return tuple(_samples(nvml, indices))


class Sampler:
    """Appends samples to a file every ``SAMPLE_S``.

    It has a thread of its own: NVML may block where a GPU has failed.
    """

    def __init__(self, path: Path, indices: Sequence[int]):
        self._path = path
        self._indices = tuple(indices)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
        self.peak_gib: float | None = None
        """The most memory in use on one of the GPUs so far."""
        if self._indices:
            self._thread.start()

    def stop(self) -> None:
        """Write a last sample and end; waits 2 s at most for a blocked driver."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        with _nvml() as nvml:
            wait_s = SAMPLE_S if nvml else ROCM_SAMPLE_S
            failures = (nvml.NVMLError, OSError) if nvml else OSError
            try:
                if not _samples(nvml, self._indices):
                    return
                with self._path.open("a", encoding="utf-8") as file:
                    while not self._over.is_set():
                        self._over.wait(wait_s)
                        self._write(file, _samples(nvml, self._indices))
            except failures:
                return

    def _write(self, file: TextIO, samples: Sequence[GpuSample]) -> None:
        self.peak_gib = max([self.peak_gib or 0, *(s.used_gib for s in samples)])
        file.write(json.dumps({"time": time.time(), "gpus": [asdict(s) for s in samples]}) + "\n")
        file.flush()


def monitor(interval_s: float = MONITOR_S) -> int:
    """Show every GPU until interrupted: a live table on a terminal, a line each in a pipe. Returns
    0."""
    if not list_gpus():
        print("the NVIDIA driver shows no GPU here (make doctor says more)")
        return 0
    try:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            with Live(_table(), console=Console(file=raw(sys.stdout)), auto_refresh=False) as live:
                while True:
                    time.sleep(interval_s)
                    live.update(_table(), refresh=True)
        while True:
            for row in _rows():
                print(f"{time.strftime('%H:%M:%S')}  {' '.join(row)}", flush=True)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0


def _table() -> Any:
    from rich.table import Table

    table = Table("GPU", "memory", "busy", "SM clock", "power", "temp", "processes", box=None)
    for row in _rows():
        table.add_row(*row)
    return table


def _rows() -> list[list[str]]:
    uses = use()
    samples = sample([shown.gpu.index for shown in uses])
    return [_cells(shown, now) for shown, now in zip(uses, samples, strict=True)]


def _cells(shown: GpuUse, now: GpuSample) -> list[str]:
    return [
        f"{shown.gpu.index} {shown.gpu.name.removeprefix('NVIDIA ')}",
        f"{shown.used_gib:.1f}/{shown.gpu.total_mib / 1024:.0f} GiB",
        _or_dash(now.utilization, "%"),
        _or_dash(now.sm_clock_mhz, " MHz"),
        _or_dash(now.power_w and round(now.power_w), " W"),
        _or_dash(now.temperature_c, " °C"),
        ", ".join(f"{p.name or '?'} {p.pid}" for p in shown.processes) or "-",
    ]


def _or_dash(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value}{unit}"


@contextmanager
def _nvml() -> Iterator[Any]:
    """The initialised NVML bindings; None without bindings, library or driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def memory(nvml: Any, handle: Any) -> Any:
    """Memory as nvidia-smi shows it: ``used`` without what the driver reserves (``reserved``).

    Version 1 of this call, which older drivers have alone, counts reserved memory as used.
    """
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _use(nvml: Any, gpu: LocalGpu) -> GpuUse:
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
    processes = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return GpuUse(
        gpu,
        memory(nvml, handle).used / 2**30,
        tuple(
            GpuProcess(p.pid, p.usedGpuMemory and p.usedGpuMemory / 2**30, _name_of(p.pid))
            for p in processes
        ),
    )


def _use_of_rocm() -> tuple[GpuUse, ...]:
    return tuple(
        GpuUse(
            LocalGpu(gpu.index, gpu.name, gpu.uuid, gpu.total_mib),
            gpu.used_gib,
            tuple(GpuProcess(pid, None, _name_of(pid)) for pid in gpu.pids),
        )
        for gpu in rocm.gpus()
    )


def _samples(nvml: Any, indices: Sequence[int]) -> list[GpuSample]:
    """Samples of these GPUs, by NVML, or without it by ``rocm``."""
    if nvml:
        return [_sample(nvml, index) for index in indices]
    return [
        GpuSample(
            gpu.index,
            round(gpu.used_gib, 3),
            gpu.utilization,
            gpu.clock_mhz,
            gpu.power_w,
            gpu.temperature_c,
        )
        for gpu in rocm.gpus()
        if gpu.index in indices
    ]


def _sample(nvml: Any, index: int) -> GpuSample:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    utilization = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    return GpuSample(
        index,
        round(memory(nvml, handle).used / 2**30, 3),
        utilization and utilization.gpu,
        _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        None if power_mw is None else power_mw / 1000,
        _ask(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
    )


def _ask(nvml: Any, question: Any, *arguments: Any) -> Any:
    """The answer; None where this GPU or driver gives none (virtual GPUs, missing rights)."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _visible(uses: Sequence[GpuUse]) -> tuple[GpuUse, ...]:
    """The GPUs in CUDA_VISIBLE_DEVICES, by index or UUID and in its order; all where it is unset.

    As in CUDA, the list ends at the first entry that names no GPU.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return tuple(uses)
    found = []
    for name in (name.strip() for name in names.split(",")):
        match = [
            u
            for u in uses
            if name == str(u.gpu.index) or ("GPU-" in name and u.gpu.uuid.startswith(name))
        ]
        if not match:
            break
        found += match
    return tuple(found)


def _describe_process(process: GpuProcess) -> str:
    memory = f", {process.used_gib:.1f} GiB" if process.used_gib else ""
    return f"{process.name or 'a process of another user or container'} (pid {process.pid}{memory})"


def _name_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def _ids(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
