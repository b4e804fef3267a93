"""What environment.json says of a run: hardware, versions of packages, commits.

No package is imported to read its version.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.machine import gpus
from harness.run.schema import Upstream

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "triton", "numpy")
CUDA_LIBRARIES = {
    "nccl": (("nvidia-nccl-cu13", "nvidia-nccl-cu12"), "NCCL_VERSION"),
    "cublas": (("nvidia-cublas", "nvidia-cublas-cu12"), "CUBLAS_VERSION"),
}
"""The packages that bring each, and the variable in which NVIDIA's images name its version."""
_VERSION_PARTS = ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE")


def describe_environment(device: str, gpu_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The content of environment.json.

    Args:
        device: ``cpu`` or ``cuda``.
        gpu_ids: the GPUs that the run uses.

    Raises:
        UserError: upstream is checked out in part.
    """
    import psutil

    listed = [gpu for gpu in gpus.list_gpus() if device == "cuda" and gpu.index in gpu_ids]
    used = [gpu.name for gpu in listed]
    driver, cuda = gpus.driver_versions() if used else (None, None)
    commit, dirty = source_commit(ROOT)
    return {
        "host": socket.gethostname(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "executable": sys.executable,
        **{name: package_version(name) for name in PACKAGES},
        **{name: library_version(name) for name in CUDA_LIBRARIES},
        "device": device,
        "gpu": used[0] if used else None,
        "gpus": used,
        "gpu_uuids": [gpu.uuid for gpu in listed],
        "driver": driver,
        "cuda_of_driver": cuda,
        "commit": commit,
        "dirty": dirty,
        "upstream": describe_upstream().model_dump(),
    }


def describe_upstream() -> Upstream:
    """The Megatron-LM that runs here. Raises UserError where it is checked out in part."""
    from harness.machine.upstream import locate

    tree = locate()
    if tree is None:
        return Upstream(version=package_version("megatron-core"), source="package")
    info = (tree / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    major, minor, patch, suffix = (_assigned(name, info) for name in _VERSION_PARTS)
    return Upstream(
        version=f"{major}.{minor}.{patch}{suffix}",
        commit=source_commit(tree)[0],
        source="submodule",
    )


def source_commit(tree: Path) -> tuple[str | None, bool | None]:
    """The commit of ``tree``, and whether its files differ from it; None where that is unknown.

    An image has no .git: docker/build.sh writes the file COMMIT there.
    """
    top, head = (
        git(tree, "rev-parse", "--show-toplevel"),
        git(tree, "rev-parse", "--verify", "--quiet", "HEAD"),
    )
    if head and top and Path(top) == tree.resolve():
        changes = git(tree, "status", "--porcelain", "--ignore-submodules", "--untracked-files=no")
        return head, None if changes is None else bool(changes)
    try:
        commit, *rest = (tree / "COMMIT").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None, None
    return commit, "dirty" in rest


def git(tree: Path, *arguments: str) -> str | None:
    """The output of git for a checkout; None if git is missing, fails, or takes ten seconds."""
    try:
        done = subprocess.run(
            ["git", "-C", tree, *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _assigned(name: str, source: str) -> str:
    found = re.search(rf"^{name} = ['\"]?([\w.]*)", source, re.MULTILINE)
    return found[1] if found else ""


def package_version(package: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def library_version(library: str) -> str | None:
    """The version of one of ``CUDA_LIBRARIES``; None where that is unknown."""
    packages, variable = CUDA_LIBRARIES[library]
    return next(filter(None, map(package_version, packages)), os.environ.get(variable))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.machine(),
    )
