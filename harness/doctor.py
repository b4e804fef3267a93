"""What this machine has for runs, what it lacks, and how to get it; found without importing
torch."""

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
from harness.machine.stages import ROOT, Venv, distribution, missing, requirements, version
from harness.machine.upstream import FILL, locate
from harness.system import screen

ANSWERS_WITHIN_S = 10
State = Literal["ok", "note", "warn", "missing"]
COLOURS = {"ok": screen.GREEN, "note": screen.FAINT, "warn": screen.YELLOW, "missing": screen.RED}


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``missing`` keeps runs on this machine's device from starting;
    ``note`` is optional."""

    topic: str
    state: State
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Torch:
    """An installed PyTorch: its version and the CUDA it was built for, ``"13.0"``; None for a CPU
    build."""

    version: str
    cuda: str | None


def doctor() -> int:
    """Print the report; returns 0 if runs on this machine's device (its GPUs, else its CPU) can
    start, else 1."""
    cards = gpus.list_gpus()
    report = {
        "Packages": [*packages(bool(cards))],
        "Upstream": [upstream()],
        "GPUs": [*devices(cards)],
        "Machine": [*machine(bool(cards))],
        "Around": [*around()],
    }
    for title, findings in report.items():
        print(f"\n{title}")
        for finding in findings:
            print(line(finding, colour=screen.colour()))
    lacking = [f.topic for findings in report.values() for f in findings if f.state == "missing"]
    where = (
        f"on {len(cards)} GPU{'s' if len(cards) > 1 else ''}"
        if cards
        else "on the CPU, as miniatures"
    )
    print(
        f"\nRuns cannot start {where}: {', '.join(lacking)}."
        if lacking
        else f"\nRuns can start {where}: make 101"
    )
    return 1 if lacking else 0


def line(finding: Finding, *, colour: bool) -> str:
    """The finding as text, what mends it below."""
    word = screen.paint(f"{finding.state:7}", COLOURS[finding.state], colour)
    room = max(screen.width(piped=1000) - 33, 40)
    text = f"\n{'':33}".join(
        textwrap.wrap(finding.text, room, break_long_words=False, break_on_hyphens=False)
    )
    mend = "".join(f"\n{'':31}→ {way}" for way in finding.mend.splitlines())
    return f"  {word}  {finding.topic:20}  {text}{mend}"


def packages(on_gpu: bool) -> Iterator[Finding]:
    """Python, the set-up stages, torch, Transformer Engine, Apex."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    here = Venv(Path(sys.prefix))
    # else VENV=0: someone else's interpreter
    environment = here if here.stamp("light").exists() else None
    yield stage("light", environment, "make help")
    yield stage("heavy", environment, "make setup")
    found = installed_torch()
    yield torch(found, on_gpu, gpus.driver_versions()[1])
    yield transformer_engine(package_version("transformer-engine"), on_gpu)
    if found and found.cuda:
        yield apex(find_spec("fused_weight_gradient_mlp_cuda") is not None)


def stage(name: str, environment: Venv | None, command: str) -> Finding:
    """Whether a set-up stage is complete: in our virtual environment exactly as pinned, elsewhere
    in any version."""
    topic = f"stage {name}"
    if environment and environment.stamp(name).exists():
        if environment.ready(name):
            if damaged := environment.damaged():
                names = ", ".join(sorted(info.name.split("-")[0] for info in damaged)[:5])
                return Finding(
                    topic,
                    "warn",
                    f"files are missing from {names}",
                    f"rm {environment.stamp(name)}; {command}",
                )
            return Finding(
                topic, "ok", f"{len(requirements(name))} packages as pinned in pyproject.toml"
            )
        return Finding(topic, "warn", "out of date or damaged; the next make mends it", command)
    lacking = missing(name)
    if not lacking:
        return Finding(topic, "ok", f"all there, in versions of this interpreter{_others(name)}")
    names = ", ".join(map(distribution, lacking))
    if environment:
        return Finding(
            topic, "note", f"not installed yet: {names}", f"comes with the first run, or: {command}"
        )
    state = "missing" if set(lacking) & set(requirements("core")) else "note"
    return Finding(
        topic, state, f"lacks {names}", f"{sys.executable} -m pip install {' '.join(lacking)}"
    )


def _others(name: str) -> str:
    """Which pins the installed versions differ from, ready to follow a sentence."""
    pairs = [
        (distribution(r), version(r), package_version(distribution(r))) for r in requirements(name)
    ]
    differing = [
        f"{n} {have} (tested: {pin})"
        for n, pin, have in pairs
        if have and have.partition("+")[0] != pin
    ]
    return f"; not the tested ones: {', '.join(differing)}" if differing else ""


def installed_torch() -> Torch | None:
    """Read which PyTorch is installed from its files."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    said = dict(re.findall(r"^(\w+)\b[^=\n]*= '([^']*)'", text, re.MULTILINE))
    return Torch(said["__version__"], said.get("cuda"))


def torch(found: Torch | None, on_gpu: bool, driver_cuda: str | None) -> Finding:
    """Whether this PyTorch can use the device; ``driver_cuda`` is the newest CUDA that the driver
    speaks."""
    if found is None:
        return Finding(
            "PyTorch", "note", "not installed yet", "comes with the first run, or: make setup"
        )
    text = f"{found.version}, " + (f"for CUDA {found.cuda}" if found.cuda else "for the CPU")
    if on_gpu and not found.cuda:
        return Finding("PyTorch", "missing", f"{text}; this machine has GPUs", "make setup-gpu")
    if on_gpu and driver_cuda and _major(driver_cuda) < _major(found.cuda):
        return Finding(
            "PyTorch",
            "missing",
            f"{text}; the driver speaks CUDA {driver_cuda}",
            "a newer driver (580 for CUDA 13), or NVIDIA's container: make docker-run",
        )
    return Finding("PyTorch", "ok", text)


def _major(cuda: str | None) -> int:
    return int((cuda or "0").partition(".")[0])


def transformer_engine(installed: str | None, on_gpu: bool) -> Finding:
    """Transformer Engine, which full-size runs on GPUs use."""
    if installed and _has_torch_extension():
        return Finding("Transformer Engine", "ok", installed)
    if installed:
        text = f"{installed}, without its extension for PyTorch"
        if on_gpu:
            return Finding("Transformer Engine", "missing", text, "make setup-gpu")
        return Finding("Transformer Engine", "note", f"{text}; runs on a CPU do without")
    if on_gpu:
        return Finding(
            "Transformer Engine", "missing", "not installed; runs on GPUs use it", "make setup-gpu"
        )
    return Finding("Transformer Engine", "note", "not installed; runs on a CPU do without")


def _has_torch_extension() -> bool:
    """Whether Transformer Engine's library for PyTorch is there, from its own wheel or within the
    package."""
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
        return Finding("Apex", "ok", "its kernel that fuses gradient accumulation is there")
    return Finding(
        "Apex", "note", "not installed; optional, it fuses gradient accumulation into GEMMs"
    )


def upstream() -> Finding:
    """Which Megatron-LM runs, and whether it is the tested one."""
    try:
        tree = locate()
    except UserError as error:
        text, _, mend = str(error).partition("\n")
        return Finding("Megatron-LM", "missing", text, mend)
    if tree is None:
        wheel = package_version("megatron-core")
        text = (
            f"megatron-core {wheel} from its wheel"
            if wheel
            else "its wheel comes with the first run"
        )
        mend = f"for upstream's own pretrain_gpt.py: {FILL}"
        return Finding("Megatron-LM", "note", f"{text}; the submodule is not checked out", mend)
    (there, changed), pinned = source_commit(tree), git(ROOT, "rev-parse", "HEAD:megatron-lm")
    if os.environ.get("MEGATRON_LM"):
        return as_it_is(f"MEGATRON_LM={tree}, {there or 'commit unknown'}", changed)
    if there and pinned and there != pinned:
        return Finding(
            "Megatron-LM",
            "warn",
            f"the submodule is at {there[:10]}, tested with {pinned[:10]}",
            FILL,
        )
    return as_it_is(f"the submodule, {there or 'commit unknown'}", changed)


def as_it_is(tree: str, changed: bool | None) -> Finding:
    """A whole upstream tree, whose files may have been changed since its commit."""
    if changed:
        return Finding(
            "Megatron-LM",
            "warn",
            f"{tree}; its files were changed since",
            "git status there shows which",
        )
    return Finding("Megatron-LM", "ok", tree)


def devices(cards: tuple[gpus.LocalGpu, ...]) -> Iterator[Finding]:
    """Driver, every GPU with who uses it, and how they are connected."""
    driver, cuda = gpus.driver_versions()
    if not cards:
        said = "the driver shows none" if driver else "no NVIDIA driver"
        yield Finding("GPU", "note", f"{said}; experiments run as CPU miniatures")
        return
    yield Finding("driver", "ok", f"{driver}, speaks CUDA {cuda}")
    for use in gpus.use():
        text = f"{use.gpu.name}, {use.gpu.total_mib / 1024:.0f} GiB"
        if use.busy:
            yield Finding(
                f"GPU {use.gpu.index}",
                "warn",
                f"{text}; busy: {gpus.describe(use).partition(': ')[2]}",
            )
        else:
            yield Finding(f"GPU {use.gpu.index}", "ok", f"{text}, free")
    if len(cards) > 1:
        yield nvlink(*nvlink_pairs(len(cards)))


def nvlink_pairs(count: int) -> tuple[int, int]:
    """Return how many pairs of the first ``count`` GPUs reach each other over NVLink, and how many
    pairs there are."""
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
    """What tensor, context and expert parallelism will communicate over."""
    if linked == pairs:
        return Finding("NVLink", "ok", "between all GPUs")
    text = (
        f"between {linked} of {pairs} pairs of GPUs; the others' communication is several times"
        " slower"
    )
    return Finding(
        "NVLink", "warn", text, "keep tp, cp and ep within linked GPUs: nvidia-smi topo -m"
    )


def machine(on_gpu: bool) -> Iterator[Finding]:
    """Memory, disks, shared memory, limits."""
    import psutil

    memory = psutil.virtual_memory()
    yield amount(
        "memory",
        memory.available / 2**30,
        8,
        "an experiment of 8 processes takes up to 8 GiB",
        f" free of {memory.total / 2**30:.0f}; {os.cpu_count()} cores",
        "end other programs",
    )
    yield amount(
        "disk",
        shutil.disk_usage(ROOT).free / 2**30,
        10,
        "set-up and runs take up to 10 GiB",
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
            "ulimit -l unlimited, docker run --ulimit memlock=-1: RDMA between nodes wants it",
        )


def amount(topic: str, gib: float, enough_gib: float, why: str, rest: str, mend: str) -> Finding:
    """Whether there is enough of something that is counted in GiB."""
    text = f"{gib:.1f} GiB{rest}"
    if gib >= enough_gib:
        return Finding(topic, "ok", text)
    return Finding(topic, "warn", f"{text}; {why}", mend)


def limit(topic: str, which: int, enough: int, unit: str, mend: str) -> Finding:
    """Whether a resource limit of this process lets runs work."""
    soft, _ = resource.getrlimit(which)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft:,}{unit}"
    enough_given = soft == resource.RLIM_INFINITY or soft >= enough
    return Finding(topic, "ok", text) if enough_given else Finding(topic, "warn", text, mend)


def around() -> Iterator[Finding]:
    """What single targets use: data sets, a C++ compiler, containers, Slurm."""
    yield prepared_data()
    yield compiler()
    yield containers()
    yield slurm()


def prepared_data() -> Finding:
    """Prepared data sets, their headers, sizes and tokenizers checked; not their tokens, which make
    data-check reads."""
    sets = data_sets.prepared()
    damaged = [name for name in sets if not _sound(name)]
    if damaged:
        return Finding(
            "data sets",
            "warn",
            f"damaged: {', '.join(damaged)}",
            f"make data-check NAME={damaged[0]}",
        )
    return Finding(
        "data sets",
        "ok" if sets else "note",
        ", ".join(sets) or "none prepared; experiments run on mock data, and tables say so",
    )


def _sound(name: str) -> bool:
    try:
        data_sets.find(name)
    except (UserError, OSError):
        return False
    return True


def compiler() -> Finding:
    """A C++ compiler that compiles."""
    path, use = shutil.which("c++"), "compiles upstream's index helpers and Transformer Engine"
    if path is None:
        return Finding("c++", "note", f"not here; {use}", "sudo apt install g++")
    said = _answer(
        [path, "-x", "c++", "-fsyntax-only", "-"], "#include <vector>\nint main() { return 0; }\n"
    )
    if said is None:
        return Finding("c++", "ok", path)
    return Finding("c++", "warn", f"{path} does not compile: {said}", "sudo apt install g++")


def containers() -> Finding:
    """The container tool that docker/engine.sh takes, and whether it answers."""
    usual = "podman" if shutil.which("podman") and not shutil.which("docker") else "docker"
    words = os.environ.get("DOCKER", "").split() or [usual]
    path = shutil.which(words[0])
    if path is None:
        return Finding(
            words[0],
            "note",
            "not here; make docker-build, make docker-run",
            "https://docs.docker.com/engine/install",
        )
    said = _answer([*words, "info"])
    if said is None:
        return Finding(words[0], "ok", f"{path}, and it answers")
    return Finding(
        words[0],
        "warn",
        f"{path} does not answer: {said}",
        "start its service (sudo systemctl start docker), join its group, or DOCKER='sudo docker'",
    )


def slurm() -> Finding:
    """sbatch, and whether its controller answers."""
    path, use = (
        shutil.which("sbatch"),
        "submits what SLURM=1 renders; without it, the script is printed",
    )
    if path is None:
        return Finding("sbatch", "note", f"not here; {use}")
    said = _answer(["scontrol", "ping"])
    if said is None:
        return Finding("sbatch", "ok", path)
    return Finding("sbatch", "warn", f"{path}, but its controller does not answer: {said}")


def _answer(command: list[str], given: str = "") -> str | None:
    """None where ``command`` succeeds within ANSWERS_WITHIN_S; else why not, in a line."""
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWERS_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWERS_WITHIN_S} s"
    except OSError as error:
        return str(error.strerror)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return (
        None if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")
    )
