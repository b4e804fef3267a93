"""Reports what this machine has for runs, what it lacks, and how to get it.

torch is not imported: its version is read from its files.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Literal

from harness.data import data_sets
from harness.errors import UserError
from harness.machine import gpus
from harness.machine.provenance import git, package_version, source_commit
from harness.machine.requirements import (
    INSTALL_MAMBA_KERNELS,
    MAMBA_KERNELS,
    mamba_kernels_lacking,
)
from harness.machine.stages import ROOT, Venv, distribution, missing, requirements, version
from harness.machine.upstream import FILL, locate
from harness.system import screen

ANSWER_TIMEOUT_S = 10
State = Literal["ok", "note", "warn", "missing"]
COLOURS = {"ok": screen.GREEN, "note": screen.FAINT, "warn": screen.YELLOW, "missing": screen.RED}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Without what is ``missing``, no run can start on this machine's device; a ``note`` is optional.
    """

    topic: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Torch:
    """An installed PyTorch: its version and its CUDA (``"13.0"``; None: built for the CPU)."""

    version: str
    cuda: str | None


def doctor() -> int:
    """Print the report.

    Returns 0 if runs can start on this machine's device (its GPUs, else its CPU), else 1.
    """
    cards = gpus.list_gpus()
    report = {
        "Packages": [*packages(bool(cards))],
        "Upstream": [upstream()],
        "GPUs": [*devices(cards)],
        "Machine": [*machine(bool(cards))],
        "Optional": [*optional_tools()],
    }
    for title, findings in report.items():
        print(f"\n{title}")
        for finding in findings:
            print(line(finding, colour=screen.colour()))
    lacking = [f.topic for findings in report.values() for f in findings if f.state == "missing"]
    several = "s" if len(cards) > 1 else ""
    where = f"on {len(cards)} GPU{several}" if cards else "on the CPU, as miniatures"
    if lacking:
        print(f"\nRuns cannot start {where}: {', '.join(lacking)}.")
        return 1
    print(f"\nRuns can start {where}: make 101")
    return 0


def judged(topic: str, good: bool, text: str, problem: str, remedy: str = "") -> Finding:
    """``ok`` with ``text`` where it is ``good``, else a warning: ``problem`` and its remedy."""
    return Finding(topic, "ok", text) if good else Finding(topic, "warn", problem, remedy)


def line(finding: Finding, *, colour: bool) -> str:
    """The finding as text, with its remedy below."""
    word = screen.paint(f"{finding.state:7}", COLOURS[finding.state], colour)
    room = max(screen.width(piped=1000) - 33, 40)
    text = f"\n{'':33}".join(
        textwrap.wrap(finding.text, room, break_long_words=False, break_on_hyphens=False)
    )
    remedy = "".join(f"\n{'':31}→ {way}" for way in finding.remedy.splitlines())
    return f"  {word}  {finding.topic:20}  {text}{remedy}"


def packages(on_gpu: bool) -> Iterator[Finding]:
    """Python, the set-up stages, torch, Transformer Engine, Apex."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    here = Venv(Path(sys.prefix))
    # with VENV=0, the interpreter is not one that scripts/setup.sh made
    environment = here if here.stamp("light").exists() else None
    yield stage("light", environment, "make help")
    yield stage("heavy", environment, "make setup")
    found = installed_torch()
    yield torch(found, on_gpu, gpus.driver_versions()[1])
    yield transformer_engine(package_version("transformer-engine"), on_gpu)
    if found and found.cuda:
        yield apex(find_spec("fused_weight_gradient_mlp_cuda") is not None)
    yield mamba_kernels(mamba_kernels_lacking(), on_gpu)


def stage(name: str, environment: Venv | None, command: str) -> Finding:
    """Whether a set-up stage is complete: as pinned in ``environment``, else in any version."""
    topic = f"stage {name}"
    if environment and environment.stamp(name).exists():
        if not environment.ready(name):
            text = "out of date or damaged; the next make installs it again"
            return Finding(topic, "warn", text, command)
        damaged = {info.name.split("-")[0] for info in environment.damaged()}
        return judged(
            topic,
            not damaged,
            f"{len(requirements(name))} packages as pinned in pyproject.toml",
            f"files are missing from {', '.join(sorted(damaged)[:5])}",
            f"rm {environment.stamp(name)}; {command}",
        )
    lacking = missing(name)
    if not lacking:
        return Finding(topic, "ok", f"installed{_differing(name)}")
    names = ", ".join(map(distribution, lacking))
    if environment:
        remedy = f"comes with the first run, or: {command}"
        return Finding(topic, "note", f"not installed yet: {names}", remedy)
    state = "missing" if set(lacking) & set(requirements("core")) else "note"
    remedy = f"{sys.executable} -m pip install {' '.join(lacking)}"
    return Finding(topic, state, f"lacks {names}", remedy)


def _differing(name: str) -> str:
    """The installed versions that differ from the pins, ready to follow a sentence."""
    differing = []
    for requirement in requirements(name):
        package, pin = distribution(requirement), version(requirement)
        have = package_version(package)
        if have and have.partition("+")[0] != pin:
            differing.append(f"{package} {have} (tested: {pin})")
    return f"; differs from the tested versions: {', '.join(differing)}" if differing else ""


def installed_torch() -> Torch | None:
    """The PyTorch that is installed, from its files."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    said = dict(re.findall(r"^(\w+)\b[^=\n]*= '([^']*)'", text, re.MULTILINE))
    return Torch(said["__version__"], said.get("cuda"))


def torch(found: Torch | None, on_gpu: bool, driver_cuda: str | None) -> Finding:
    """Whether this PyTorch can use the device.

    ``driver_cuda`` is the newest CUDA that the driver supports.
    """
    if found is None:
        remedy = "comes with the first run, or: make setup"
        return Finding("PyTorch", "note", "not installed yet", remedy)
    text = f"{found.version}, " + (f"for CUDA {found.cuda}" if found.cuda else "for the CPU")
    if on_gpu and not found.cuda:
        return Finding("PyTorch", "missing", f"{text}; this machine has GPUs", "make setup-gpu")
    if on_gpu and driver_cuda and _major(driver_cuda) < _major(found.cuda):
        text += f"; the driver supports CUDA {driver_cuda}"
        remedy = "a newer driver (580 for CUDA 13), or NVIDIA's container: make docker-run"
        return Finding("PyTorch", "missing", text, remedy)
    return Finding("PyTorch", "ok", text)


def _major(cuda: str) -> int:
    return int(cuda.partition(".")[0])


def transformer_engine(installed: str | None, on_gpu: bool) -> Finding:
    """Transformer Engine, which full-size runs on GPUs use."""
    topic = "Transformer Engine"
    if installed and _has_torch_extension():
        return Finding(topic, "ok", installed)
    text = f"{installed}, without its extension for PyTorch" if installed else "not installed"
    if on_gpu:
        return Finding(topic, "missing", f"{text}; runs on GPUs use it", "make setup-gpu")
    return Finding(topic, "note", f"{text}; runs on a CPU do not use it")


def _has_torch_extension() -> bool:
    """Whether Transformer Engine's library for PyTorch is there, in either of its wheels."""
    try:
        spec = find_spec("transformer_engine")
    except ImportError:
        spec = None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    places = [
        place for folder in folders for place in (folder, folder.parent, folder / "wheel_lib")
    ]
    return any(next(place.glob("transformer_engine_torch*.so"), None) for place in places)


def apex(installed: bool) -> Finding:
    """Apex, whose kernel fuses gradient accumulation into the weight gradient's GEMM."""
    if installed:
        return Finding("Apex", "ok", "fuses gradient accumulation into GEMMs")
    text = "not installed; optional: GRAD_FUSION=1 fuses gradients by Transformer Engine"
    return Finding("Apex", "note", text)


def mamba_kernels(lacking: list[str], on_gpu: bool) -> Finding:
    """The packages without which no row with Mamba layers starts on a GPU."""
    topic, names = "Mamba kernels", " and ".join(MAMBA_KERNELS)
    if not lacking:
        return Finding(topic, "ok", f"{names}: rows with Mamba layers run on GPUs")
    text = f"rows with Mamba layers, such as 681, need {' and '.join(lacking)} on GPUs"
    if not on_gpu:
        return Finding(topic, "note", f"{text}; their CPU miniatures do without")
    return Finding(topic, "note", text, INSTALL_MAMBA_KERNELS)


def upstream() -> Finding:
    """Which Megatron-LM runs, and whether it is the tested one."""
    try:
        tree = locate()
    except UserError as error:
        text, _, remedy = str(error).partition("\n")
        return Finding("Megatron-LM", "missing", text, remedy)
    if tree is None:
        wheel = package_version("megatron-core")
        text = (
            f"megatron-core {wheel} from its wheel"
            if wheel
            else "its wheel comes with the first run"
        )
        remedy = f"for upstream's own pretrain_gpt.py: {FILL}"
        return Finding("Megatron-LM", "note", f"{text}; the submodule is not checked out", remedy)
    (there, changed), pinned = source_commit(tree), git(ROOT, "rev-parse", "HEAD:megatron-lm")
    if os.environ.get("MEGATRON_LM"):
        return complete_tree(f"MEGATRON_LM={tree}, {there or 'commit unknown'}", changed)
    if there and pinned and there != pinned:
        text = f"the submodule is at {there[:10]}, tested with {pinned[:10]}"
        return Finding("Megatron-LM", "warn", text, FILL)
    return complete_tree(f"the submodule, {there or 'commit unknown'}", changed)


def complete_tree(tree: str, changed: bool | None) -> Finding:
    """A complete source tree of upstream, whose files may differ from its commit."""
    problem = f"{tree}; its files differ from that commit"
    return judged("Megatron-LM", not changed, tree, problem, "git status there shows which")


def devices(cards: tuple[gpus.LocalGpu, ...]) -> Iterator[Finding]:
    """The driver, every GPU with the processes on it, and how GPUs are connected."""
    driver, cuda = gpus.driver_versions()
    if not cards:
        said = "the driver shows none" if driver else "no NVIDIA driver"
        yield Finding("GPU", "note", f"{said}; experiments run as CPU miniatures")
        return
    what = f"{driver}, supports CUDA {cuda}" if driver else "AMD's; runs there were never tried"
    yield Finding("driver", "ok", what)
    for use in gpus.use():
        text = f"{use.gpu.name}, {use.gpu.total_mib / 1024:.0f} GiB"
        problem = f"{text}; busy: {gpus.describe(use).partition(': ')[2]}"
        yield judged(f"GPU {use.gpu.index}", not use.busy, f"{text}, free", problem)
    if driver and len(cards) > 1:
        yield nvlink(*nvlink_pairs(len(cards)))


def nvlink_pairs(count: int) -> tuple[int, int]:
    """Return (pairs connected by NVLink, all pairs) of the first ``count`` GPUs."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        pairs = list(combinations(handles, 2))
        return sum(_linked(pynvml, *pair) for pair in pairs), len(pairs)
    finally:
        pynvml.nvmlShutdown()


def _linked(pynvml, one, other) -> bool:
    try:
        status = pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        return False
    return status == pynvml.NVML_P2P_STATUS_OK


def nvlink(linked: int, pairs: int) -> Finding:
    """The links of tensor, context and expert parallelism."""
    return judged(
        "NVLink",
        linked == pairs,
        "between all GPUs",
        f"between {linked} of {pairs} pairs of GPUs; others communicate several times slower",
        "keep TP, CP and EP within linked GPUs; nvidia-smi topo -m shows them",
    )


def machine(on_gpu: bool) -> Iterator[Finding]:
    """Memory, disks, shared memory, limits."""
    import psutil

    memory = psutil.virtual_memory()
    yield amount(
        "memory",
        memory.available / 2**30,
        8,
        "an experiment of 8 processes needs up to 8 GiB",
        f" free of {memory.total / 2**30:.0f}; {os.cpu_count()} cores",
        "end other programs",
    )
    yield amount(
        "disk",
        shutil.disk_usage(ROOT).free / 2**30,
        10,
        "set-up and runs need up to 10 GiB",
        f" free in {ROOT}",
        "make room, or move them: VENV=/big/disk/venv OUTDIR=/big/disk/outdir",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        use = shutil.disk_usage(shared)
        yield amount(
            "/dev/shm",
            use.free / 2**30,
            1,
            "NCCL and data loaders use it",
            f" free of {use.total / 2**30:.1f}",
            "docker run --ipc=host, or end what fills it",
        )
    yield limit("open files", resource.RLIMIT_NOFILE, 4096, "", "ulimit -n 65536")
    if on_gpu:
        yield limit(
            "locked memory",
            resource.RLIMIT_MEMLOCK,
            64 << 20,
            " bytes",
            "ulimit -l unlimited, docker run --ulimit memlock=-1: RDMA between nodes needs it",
        )


def amount(topic: str, gib: float, enough_gib: float, why: str, rest: str, remedy: str) -> Finding:
    """Whether there is enough of a resource that is measured in GiB."""
    text = f"{gib:.1f} GiB{rest}"
    return judged(topic, gib >= enough_gib, text, f"{text}; {why}", remedy)


def limit(topic: str, which: int, enough: int, unit: str, remedy: str) -> Finding:
    """Whether a resource limit of this process is high enough for runs."""
    soft, _ = resource.getrlimit(which)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft:,}{unit}"
    enough_given = soft == resource.RLIM_INFINITY or soft >= enough
    return judged(topic, enough_given, text, text, remedy)


def optional_tools() -> Iterator[Finding]:
    """What some targets use: data sets, a C++ compiler, containers, Slurm."""
    yield prepared_data()
    yield compiler()
    yield containers()
    yield slurm()


def prepared_data() -> Finding:
    """Prepared data sets: their headers, sizes and tokenizers; make data-check reads tokens too."""
    sets = data_sets.prepared_names()
    damaged = [name for name in sets if not _sound(name)]
    if damaged:
        remedy = f"make data-check NAME={damaged[0]}"
        return Finding("data sets", "warn", f"damaged: {', '.join(damaged)}", remedy)
    none = "none prepared; experiments run on mock data, and tables mark it"
    return Finding("data sets", "ok" if sets else "note", ", ".join(sets) or none)


def _sound(name: str) -> bool:
    try:
        data_sets.find(name)
    except (UserError, OSError):
        return False
    return True


def compiler() -> Finding:
    """The C++ compiler, tried on a small program."""
    use, remedy = "compiles upstream's index helpers and Transformer Engine", "sudo apt install g++"
    if (path := shutil.which("c++")) is None:
        return Finding("c++", "note", f"not installed; {use}", remedy)
    program = "#include <vector>\nint main() { return 0; }\n"
    said = _answer([path, "-x", "c++", "-fsyntax-only", "-"], program)
    return judged("c++", said is None, path, f"{path} does not compile: {said}", remedy)


def containers() -> Finding:
    """The container tool that docker/engine.sh chooses, and whether it answers."""
    usual = "podman" if shutil.which("podman") and not shutil.which("docker") else "docker"
    tool, *words = os.environ.get("DOCKER", "").split() or [usual]
    if (path := shutil.which(tool)) is None:
        text = "not installed; used by make docker-build and make docker-run"
        return Finding(tool, "note", text, "https://docs.docker.com/engine/install")
    said = _answer([tool, *words, "info"])
    return judged(
        tool,
        said is None,
        f"{path}, and it answers",
        f"{path} does not answer: {said}",
        "start its service (sudo systemctl start docker), join its group, or DOCKER='sudo docker'",
    )


def slurm() -> Finding:
    """sbatch, and whether its controller answers."""
    if (path := shutil.which("sbatch")) is None:
        use = "submits the script of SLURM=1; without it, the script is printed"
        return Finding("sbatch", "note", f"not installed; {use}")
    said = _answer(["scontrol", "ping"])
    problem = f"{path}, but its controller does not answer: {said}"
    return judged("sbatch", said is None, path, problem)


def _answer(command: list[str], given: str = "") -> str | None:
    """None where ``command`` succeeds within ANSWER_TIMEOUT_S; else why not, in a line."""
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWER_TIMEOUT_S} s"
    except OSError as error:
        return str(error.strerror)
    if done.returncode == 0:
        return None
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
