"""GPUs through NVML, whose bindings are replaced at their border: this runs where no driver is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import doctor
from harness.entry.report import RankReport
from harness.errors import UserError
from harness.machine import gpus, rocm
from harness.run.directory import RunDir

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
RESERVED = 615 * 2**20


class FakeNvml:
    """As much of pynvml as harness.machine.gpus asks: GPUs with memory in use and processes by pid."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = 0
    nvmlMemory_v2 = 2

    def __init__(
        self,
        used_gib: list[float],
        processes: dict[int, list[tuple[int, int | None]]] | None = None,
    ):
        self.used_gib = used_gib
        self.processes = processes or {}
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.used_gib)

    def nvmlDeviceGetHandleByIndex(self, index):
        assert self.open, "asked before nvmlInit"
        return index

    def nvmlDeviceGetName(self, index):
        return "NVIDIA H200"

    def nvmlDeviceGetUUID(self, index):
        return f"GPU-{index}a-b"

    def nvmlDeviceGetMemoryInfo(self, index, version=None):
        used = self.used_gib[index] * GIB
        if version is None:  # as nvml.h says: "Sum of Reserved and Allocated device memory"
            return SimpleNamespace(total=143771 * 2**20, used=used + RESERVED)
        return SimpleNamespace(total=143771 * 2**20, used=used, reserved=RESERVED)

    def nvmlDeviceGetComputeRunningProcesses(self, index):
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=used)
            for pid, used in self.processes.get(index, [])
        ]

    def nvmlDeviceGetUtilizationRates(self, index):
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetPowerUsage(self, index):
        return 650_500

    def nvmlDeviceGetClockInfo(self, index, kind):
        return 1980

    def nvmlDeviceGetTemperature(self, index, kind):
        raise self.NVMLError("not supported")

    def nvmlSystemGetDriverVersion(self):
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion(self):
        return 13000


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(*args, **kwargs):
        fake = FakeNvml(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


def test_without_a_driver_there_are_no_gpus(nvml, monkeypatch):
    fake = nvml([0])
    monkeypatch.setattr(
        fake, "nvmlInit", lambda: (_ for _ in ()).throw(fake.NVMLError("no driver"))
    )
    assert gpus.list_gpus() == gpus.use() == gpus.sample([0]) == ()
    assert gpus.driver_versions() == (None, None)


def test_without_the_bindings_there_are_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.list_gpus() == ()


def test_gpus_are_listed_with_their_memory(nvml):
    fake = nvml([0, 5])
    assert gpus.list_gpus()[1] == gpus.LocalGpu(1, "NVIDIA H200", "GPU-1a-b", 143771)
    assert gpus.driver_versions() == ("580.95.05", "13.0")
    assert fake.open == 0, "every nvmlInit has its nvmlShutdown"


def test_a_sample_has_what_the_driver_tells(nvml):
    nvml([1.25])
    assert gpus.sample([0]) == (gpus.GpuSample(0, 1.25, 97, 1980, 650.5, None),)


def test_what_the_driver_keeps_is_told_apart(nvml, monkeypatch):
    nvml([1.25, 2.5])
    assert gpus.kept_by_driver_gib([0, 1]) == pytest.approx(615 / 1024)
    assert gpus.kept_by_driver_gib([]) is None
    monkeypatch.delattr(FakeNvml, "nvmlMemory_v2")
    assert gpus.kept_by_driver_gib([0]) is None


def test_a_rank_counts_what_nvidia_smi_does(nvml, tmp_path, monkeypatch):
    nvml([1.25])
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetHandleByUUID", lambda self, uuid: 0, raising=False)
    cuda = SimpleNamespace(
        current_device=lambda: 0, get_device_properties=lambda _: SimpleNamespace(uuid="0a-b")
    )
    assert RankReport(RunDir(tmp_path))._nvml_used_gib(SimpleNamespace(cuda=cuda)) == 1.25


def test_the_driver_is_kept_awake_where_there_is_one(nvml, monkeypatch):
    fake = nvml([0])
    gpus.keep_awake()
    assert fake.open == 1
    monkeypatch.setattr(
        fake, "nvmlInit", lambda: (_ for _ in ()).throw(fake.NVMLError("no driver"))
    )
    gpus.keep_awake()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus.keep_awake()


def test_busy_gpus_are_passed_over(nvml):
    nvml([0.4, 90, 0.4, 0.4], {2: [(os.getpid(), GIB)]})
    assert gpus.choose(2) == (0, 3)


def test_too_few_free_gpus_are_refused_naming_who_is_busy(nvml):
    nvml([0.4, 90], {1: [(os.getpid(), 70 * GIB)]})
    with pytest.raises(UserError) as refused:
        gpus.choose(2)
    message = str(refused.value)
    name = Path("/proc/self/comm").read_text().strip()
    assert "needs 2 GPUs, 1 of 2 are free" in message
    assert f"GPU 1: 90.0 GiB used, by {name} (pid {os.getpid()}, 70.0 GiB)" in message
    assert "GPUS_IDS=0,1" in message


def test_memory_that_nobody_owns_up_to_is_busy_too(nvml):
    nvml([12.0])
    with pytest.raises(UserError, match=r"GPU 0: 12.0 GiB used\n"):
        gpus.choose(1)


def test_busy_gpus_that_are_asked_for_are_taken(nvml):
    nvml([0, 90])
    assert gpus.choose(1, (1,)) == (1,)


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [((0, 7), "no GPU 7; this machine has 0,1"), ((1, 1), "twice"), ((1,), "names 1 GPU, this")],
)
def test_gpus_that_cannot_be_had_are_refused(nvml, wanted, complaint):
    nvml([0, 0])
    with pytest.raises(UserError, match=complaint):
        gpus.choose(2, wanted)


def test_too_few_gpus_are_refused_with_the_way_out(nvml):
    nvml([0, 0])
    with pytest.raises(UserError, match=r"needs 8 GPUs, this machine has 2\nGPUS=2 .*DEVICE=cpu"):
        gpus.choose(8)


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [("2,3", (2, 3)), ("3, 0", (3, 0)), ("GPU-1a-b,GPU-0a", (1, 0)), ("1,7,0", (1,)), ("", ())],
)
def test_cuda_visible_devices_is_honoured(nvml, monkeypatch, visible, chosen):
    nvml([0, 0, 0, 0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.available() == chosen


def test_the_sampler_writes_lines_and_keeps_the_peak(nvml, tmp_path, monkeypatch):
    fake = nvml([1.0, 2.0])
    monkeypatch.setattr(gpus, "SAMPLE_S", 0.01)
    sampler = gpus.Sampler(tmp_path / "gpus.jsonl", [1])
    deadline = time.monotonic() + 10
    while sampler.peak_gib is None and time.monotonic() < deadline:
        time.sleep(0.01)
    fake.used_gib[1] = 3.0
    sampler.stop()
    lines = [json.loads(line) for line in (tmp_path / "gpus.jsonl").read_text().splitlines()]
    assert sampler.peak_gib == 3.0
    assert lines[0]["gpus"][0]["index"] == 1 and lines[0]["gpus"][0]["used_gib"] == 2.0
    assert lines[-1]["gpus"][0]["used_gib"] == 3.0, "the end of the run is sampled"
    assert fake.open == 0


def test_a_gpu_that_is_lost_ends_only_its_samples(nvml, tmp_path, monkeypatch):
    fake = nvml([1.0])
    monkeypatch.setattr(
        fake,
        "nvmlDeviceGetMemoryInfo",
        lambda *_a, **_k: (_ for _ in ()).throw(fake.NVMLError("lost")),
    )
    monkeypatch.setattr(gpus, "SAMPLE_S", 0.01)
    sampler = gpus.Sampler(tmp_path / "gpus.jsonl", [0])
    sampler.stop()
    assert sampler.peak_gib is None


def test_the_monitor_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.monitor() == 0
    assert "the NVIDIA driver shows no GPU" in capsys.readouterr().out


def test_the_monitor_prints_a_line_a_gpu_into_a_pipe(nvml, capsys, monkeypatch):
    nvml([1.0, 2.0], {1: [(os.getpid(), GIB)]})
    monkeypatch.setattr(time, "sleep", lambda _s: (_ for _ in ()).throw(KeyboardInterrupt))
    assert gpus.monitor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and "1 H200 2.0/140 GiB 97% 1980 MHz 650 W -" in lines[1]
        and str(os.getpid()) in lines[1]
    )


def test_nothing_heavy_is_imported():
    code = "import sys, harness.machine.gpus; print([m for m in ('torch', 'rich', 'pynvml') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
def test_the_real_driver_answers():
    found = gpus.list_gpus()
    if not found:
        pytest.skip("no NVIDIA GPU")
    assert all(g.total_mib > 1024 for g in found)
    assert all(s.used_gib >= 0 and s.temperature_c for s in gpus.sample([g.index for g in found]))
    words = [
        "nvidia-smi",
        "--query-gpu=memory.used,memory.reserved",
        "--format=csv,noheader,nounits",
        "--id=0",
    ]
    used_mib, kept_mib = map(
        float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split(",")
    )
    assert gpus.use()[0].used_gib * 1024 == pytest.approx(used_mib, abs=64)
    assert gpus.kept_by_driver_gib([0]) * 1024 == pytest.approx(kept_mib, abs=64)


ROCM_SMI = """\
WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status
{"card1": {"Card Series": "AMD Instinct MI250X", "Unique ID": "0x2b", "VRAM Total Memory (B)": "68702699520",
 "VRAM Total Used Memory (B)": "2147483648", "GPU use (%)": "0", "sclk clock speed:": "(800Mhz)"},
 "card0": {"Card series": "AMD Instinct MI250X", "Unique ID": "0x1a", "VRAM Total Memory (B)": "68702699520",
 "VRAM Total Used Memory (B)": "10960896", "GPU use (%)": "97", "sclk clock speed:": "(1700Mhz)",
 "Average Graphics Package Power (W)": "401.5", "Temperature (Sensor edge) (C)": "61.0"},
 "system": {"Driver version": "6.3.6"}}
"""


@pytest.fixture
def without_nvml(monkeypatch):
    """Neither NVML nor amdsmi: what a node of AMD GPUs with a bare container has."""
    rocm._bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    yield
    rocm._bindings.cache_clear()


@pytest.fixture
def rocm_smi(tmp_path, monkeypatch, without_nvml):
    """A node whose rocm-smi prints what version 2.3 of it does."""
    program = tmp_path / "rocm-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{ROCM_SMI}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_gpus_of_amd_are_listed_chosen_and_sampled_by_rocm_smi(rocm_smi, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = gpus.list_gpus()
    assert (first.index, first.name, first.uuid) == (0, "AMD Instinct MI250X", "0x1a")
    assert first.total_mib == pytest.approx(65520, abs=1) and second.uuid == "0x2b"
    assert gpus.available() == (0,), "2 GiB of the other are in use"
    now = gpus.sample([0])
    assert now == (gpus.GpuSample(0, 0.01, 97, 1700, 401.5, 61),)
    assert gpus.sample([1])[0].power_w is None
    assert gpus.driver_versions() == (None, None), "CUDA's"
    findings = list(doctor.devices(gpus.list_gpus()))
    assert [finding.topic for finding in findings] == ["driver", "GPU 0", "GPU 1"], "no NVLink"


def test_a_run_on_gpus_of_amd_is_sampled(rocm_smi, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "ROCM_SAMPLE_S", 0.01)
    sampler = gpus.Sampler(tmp_path / "gpus.jsonl", [0, 1])
    deadline = time.monotonic() + 10
    while sampler.peak_gib is None and time.monotonic() < deadline:
        time.sleep(0.02)
    sampler.stop()
    assert sampler.peak_gib == 2.0
    line = json.loads((tmp_path / "gpus.jsonl").read_text().splitlines()[0])
    assert [gpu["index"] for gpu in line["gpus"]] == [0, 1]


def test_amdsmi_is_asked_where_it_is_there(without_nvml, monkeypatch):
    """The answers of amdsmi's functions, as its documentation of ROCm 6.4 shows them."""
    amdsmi = SimpleNamespace(
        AmdSmiClkType=SimpleNamespace(GFX=0),
        AmdSmiTemperatureType=SimpleNamespace(HOTSPOT=1),
        AmdSmiTemperatureMetric=SimpleNamespace(CURRENT=0),
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["a"],
        amdsmi_get_gpu_asic_info=lambda _: {"market_name": "AMD Instinct MI250X"},
        amdsmi_get_gpu_device_uuid=lambda _: "c4ff",
        amdsmi_get_gpu_vram_usage=lambda _: {"vram_total": 65520, "vram_used": 3072},
        amdsmi_get_gpu_activity=lambda _: {"gfx_activity": 50, "umc_activity": "N/A"},
        amdsmi_get_power_info=lambda _: {"average_socket_power": "N/A", "current_socket_power": 90},
        amdsmi_get_clock_info=lambda *_: {"clk": 1700},
        amdsmi_get_gpu_process_list=lambda _: [{"pid": os.getpid(), "name": "python"}],
    )
    monkeypatch.setitem(sys.modules, "amdsmi", amdsmi)
    (use,) = gpus.use()
    assert (use.gpu.name, use.gpu.uuid, use.used_gib) == ("AMD Instinct MI250X", "c4ff", 3.0)
    assert use.busy and use.processes[0].pid == os.getpid()
    assert gpus.sample([0]) == (gpus.GpuSample(0, 3.0, 50, 1700, 90.0, None),)
