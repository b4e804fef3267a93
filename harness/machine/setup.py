"""Installs set-up stages into a virtual environment with uv; scripts/setup.sh calls it.

Standard library only: this runs before anything is installed.
"""

import argparse
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from harness.errors import UserError
from harness.machine.stages import (
    ROOT,
    Venv,
    distribution,
    missing,
    module,
    requirements,
)
from harness.system.streams import lasting_output

Device = Literal["cpu", "cuda"]
BASE = Path(sys._base_executable).resolve()
"""The running interpreter, or the one that its virtual environment was made with."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Free disk that a set-up needs, by the build of PyTorch it brings: what is installed, and a margin.
# uv unpacks downloads into its cache and links them from there, so a file takes its room once.
DISK_MIB = {"none": 300, "cpu": 1500, "cuda": 6000}
# What a set-up with PyTorch downloads and what it then takes, in MiB: (download, installed). CUDA's
# build, from PyPI: summed over wheels and files of the heavy stage (torch 2.11.0, Python 3.12,
# x86-64); 3,376 MiB of 4,741 are CUDA's packages and Triton. PyPI's PyTorch does not import without
# CUDA's: libtorch_cpu.so needs libcudart. The CPU's build: computed, the same less those packages
# and less libtorch_cuda; its wheel has about 190 MiB.
SIZES_MIB = {"cpu": (260, 950), "cuda": (2700, 4750)}
# A compiler builds this package here, so uv.lock cannot know the hash of its wheel.
BUILT_HERE = "transformer-engine-torch"
# What a stage must be able to do besides importing what it pins.
PROOFS = {
    "heavy": """
import torch.distributed
assert torch.distributed.is_gloo_available(), "this torch has no gloo"
""",
    "gpu": """
import torch, transformer_engine.pytorch
if torch.cuda.is_available():
    layer = transformer_engine.pytorch.LayerNormLinear(64, 64, params_dtype=torch.bfloat16)
    assert layer(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")).isfinite().all()
""",
}


class Unproven(UserError):
    """Everything was installed, and yet the stage does not work."""


def set_up(env: Venv, stages: list[str], device: Device, uv: str, *, exact: bool = False) -> None:
    """Bring ``env`` to ``stages``; what is there and whole is kept.

    Args:
        device: whose PyTorch build.
        uv: path of the executable.
        exact: make it anew if it was made with another interpreter than the running one.

    Raises:
        UserError: the disk is full, uv failed, or the result does not work.
    """
    with locked(env) as lock:
        tool = Uv(uv, env, lock)
        new = not works(env) or (exact and not env.python.samefile(BASE))
        if new:
            create(env, tool)
        try:
            bring(env, stages, device, tool)
        except Unproven as broken:
            if new:
                raise
            say(f"{broken}; making {env.path} anew")
            create(env, tool)
            bring(env, stages, device, tool)


def check(stages: list[str]) -> None:
    """Raises UserError naming what the running interpreter lacks for ``stages`` (VENV=0), in any
    version."""
    needed = ["core" if stage == "heavy" else stage for stage in stages]
    lacking = dict.fromkeys(r for stage in needed for r in missing(stage))
    if lacking:
        raise UserError(
            f"VENV=0 uses {sys.executable}, which lacks {', '.join(map(distribution, lacking))}\n"
            f"install:  {sys.executable} -m pip install {' '.join(lacking)}\n"
            "or leave VENV=0 away, and .venv is made"
        )


@contextmanager
def locked(env: Venv) -> Iterator[int]:
    """Hold ``env`` for one set-up at a time; yields the lock's file descriptor."""
    env.path.mkdir(parents=True, exist_ok=True)
    with (env.path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up of {env.path} is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield file.fileno()


def works(env: Venv) -> bool:
    """Whether its interpreter starts."""
    try:
        return env.run("").returncode == 0
    except OSError:
        return False


def create(env: Venv, uv: "Uv") -> None:
    """Make ``env`` anew with the running interpreter; the lock and uv stay."""
    say(f"making {env.path} with Python {platform.python_version()} ({BASE.parent})")
    for entry in env.path.iterdir():
        if entry.name in ("lock", "uv"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    options = ["--quiet", "--allow-existing", "--prompt", "megatron-harness", "--python", str(BASE)]
    if not uv.run("venv", *options, str(env.path.resolve())):
        raise UserError(uv.advice())


def bring(env: Venv, stages: list[str], device: Device, uv: "Uv") -> None:
    """Install the stages that are not ready, prove each, and stamp it last.

    Raises:
        Unproven: a stage does not work though uv installed it.
        UserError: the disk is full, or uv failed.
    """
    if device == "cuda":
        forget_cpu_torch(env)
    due = [stage for stage in stages if not env.ready(stage)]
    if not due:
        return
    started = time.monotonic()
    for stage in due:
        env.stamp(stage).unlink(missing_ok=True)
    # uv takes a distribution for installed once its .dist-info folder is there.
    for info in env.damaged():
        shutil.rmtree(info)
        for stamp in env.path.glob("stage-*.stamp"):
            stamp.unlink()
    install(env, due, device, uv)
    for stage in due:
        if lacking := env.lacking(stage):
            raise UserError(
                f"uv.lock has other versions than pyproject.toml pins: {', '.join(lacking)}\n"
                "write it anew: uv lock"
            )
        proof = env.run(proof_of(stage))
        if proof.returncode:
            reason = (proof.stderr.strip() or "killed").splitlines()[-1]
            raise Unproven(f"{stage} is installed, but does not work: {reason}")
        half = env.stamp(stage).with_suffix(".half")
        half.write_text(env.stamp_text(stage))
        half.replace(env.stamp(stage))
    say(f"{', '.join(due)}: ready after {time.monotonic() - started:.0f} s")


def proof_of(stage: str) -> str:
    """Python code that fails unless ``stage`` works.

    The packages of the heavy stage are left to the run: importing them takes longer than installing
    them from the cache.
    """
    left_out = set(requirements("heavy")) - set(requirements("light"))
    pins = [r for r in requirements(stage) if r not in left_out]
    return "".join(f"import {module(r)}\n" for r in pins) + PROOFS.get(stage, "")


def forget_cpu_torch(env: Venv) -> None:
    """If PyTorch's CPU build is there, make uv install the one for CUDA over it."""
    build, info = env.installed().get("torch", ("", env.site))
    if build.endswith("+cpu"):
        say("replacing PyTorch's CPU build by the one for CUDA")
        shutil.rmtree(info)


def install(env: Venv, stages: list[str], device: Device, uv: "Uv") -> None:
    """Install what uv.lock has for ``stages``, by hash.

    Two packages may come without one: PyTorch from its CPU index or TORCH_INDEX, and the extension
    of Transformer Engine that scripts/setup-gpu.sh builds.

    Raises:
        UserError: the disk is full, or uv failed.
    """
    pins = {distribution(r): r for stage in stages for r in requirements(stage)}
    lacking = {distribution(r) for stage in stages for r in env.lacking(stage)}
    if "torch" in lacking:
        install_torch(pins["torch"], device, env, uv)
    check_disk(env, "none")
    options = [word for stage in stages for word in ("--only-group", stage)]
    if BUILT_HERE in pins:
        options += ["--no-emit-package", BUILT_HERE]
    locked = str(env.path / "setup-locked.txt")
    done = True
    if "torch" in pins and "+" in env.installed().get("torch", ("",))[0]:
        # Another build than PyPI's: it names its own packages for CUDA.
        options += ["--no-emit-package", "torch", *without_cuda()]
        done = uv.run(*EXPORT, "--no-hashes", *options, "--output-file", locked)
        done = done and uv.install(pins["torch"], "--constraints", locked)
    done = done and uv.run(*EXPORT, *options, "--output-file", locked)
    done = done and uv.install("--no-deps", "--require-hashes", "--requirements", locked)
    if done and BUILT_HERE in lacking:
        done = uv.install("--no-deps", "--no-build", pins[BUILT_HERE])
    if not done:
        raise UserError(uv.advice())


def install_torch(pin: str, device: Device, env: Venv, uv: "Uv") -> None:
    """Install PyTorch alone from an index of its own, where there is one; else only say how much
    PyPI's takes.

    Raises:
        UserError: the disk is full.
    """
    if index := torch_index(device):
        announce(env, "cpu" if index == CPU_INDEX else "cuda")
        if uv.install("--no-deps", pin, "--default-index", index):
            return
        say(f"{index} did not give {pin}: taking PyPI's PyTorch for CUDA")
    announce(env, "cuda")


def torch_index(device: Device) -> str | None:
    """The index that PyTorch comes from; None: the one that all packages come from."""
    if given := os.environ.get("TORCH_INDEX"):
        return given
    if device != "cpu" or sys.platform != "linux":
        return None
    if reason := unreachable(CPU_INDEX):
        say(f"{CPU_INDEX} cannot be reached ({reason}): taking PyPI's PyTorch for CUDA")
        return None
    return CPU_INDEX


def without_cuda() -> list[str]:
    """Options of ``uv export`` that leave out the CUDA packages of PyPI's PyTorch."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    torch = next(package for package in packages if package["name"] == "torch")
    # PyPI's PyTorch is built for CUDA on Linux alone.
    cuda = [d["name"] for d in torch.get("dependencies", ()) if "linux" in d.get("marker", "")]
    return [word for name in cuda for word in ("--prune", name)]


def announce(env: Venv, build: str) -> None:
    """Say what a set-up with this ``build`` of PyTorch downloads and takes. Raises UserError where
    the disk has less."""
    check_disk(env, build)
    download, installed = SIZES_MIB[build]
    say(
        f"PyTorch for {'the CPU' if build == 'cpu' else 'CUDA'}: download up to {download:,} MiB,"
        f" {installed:,} MiB in {env.path}; once"
    )


def check_disk(env: Venv, build: str) -> None:
    """Raises UserError if there is less room than a set-up with this ``build`` of PyTorch takes."""
    free_mib = shutil.disk_usage(env.path).free >> 20
    if free_mib < DISK_MIB[build]:
        raise UserError(
            f"{env.path} has {free_mib:,} MiB free, this set-up takes {DISK_MIB[build]:,} MiB\n"
            "make room, or put it on another disk: VENV=/big/disk/venv UV_CACHE_DIR=/big/disk/uv"
        )


def unreachable(index: str, timeout_s: float = 3.0) -> str | None:
    """Why a package index does not answer; None where it does."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        return str(error)
    except OSError as error:
        cause = getattr(error, "reason", error)
        return getattr(cause, "strerror", None) or str(cause)
    return None


def say(text: str) -> None:
    """One line for people, over the progress line; stdout stays the command's own."""
    print(f"{ERASE}setup: {text}", file=sys.stderr, flush=True)


TERMINAL = sys.stderr.isatty()
ERASE = "\r\033[K" if TERMINAL else ""
EXPORT = ("export", "--quiet", "--frozen", "--no-emit-project", "--no-header", "--no-annotate")

# Why uv fails, by what it prints; the cause comes before what follows from it.
CAUSES = {
    "No space left on device|Disk quota exceeded": (
        "the disk or a quota is full: make room, or VENV=/big/disk/venv UV_CACHE_DIR=/big/disk/uv"
    ),
    "Failed to fetch|error sending request|dns error|timed out": (
        "the package index cannot be reached: look at the network and https_proxy\n"
        "a mirror: UV_DEFAULT_INDEX=…; without a network, use packages that are there: VENV=0"
    ),
    f"{BUILT_HERE}.*no wheels|Building source distributions.*disabled": (
        f"{BUILT_HERE} is built by make setup-gpu"
    ),
    "Hash mismatch": "the package index has another file than uv.lock; another: UV_DEFAULT_INDEX=…",
    "No solution found|not found in the package registry": (
        "the package index lacks a pinned version for this machine; another: UV_DEFAULT_INDEX=…"
    ),
}


@dataclass
class Uv:
    """uv for one environment: its output goes to a log, its downloads show as one line."""

    executable: str
    env: Venv
    lock: int
    """Descriptor of the set-up's lock."""
    downloads_mib: dict[str, float] = field(default_factory=dict)
    """Distribution -> size, of the larger ones."""
    downloaded: set[str] = field(default_factory=set)
    shown_s: float = field(default_factory=time.monotonic)
    """When progress was printed last, on the monotonic clock."""

    @property
    def log(self) -> Path:
        return self.env.path / "setup.log"

    def install(self, *arguments: str) -> bool:
        """Run ``uv pip install``; returns whether it succeeded."""
        return self.run("pip", "install", "--python", str(self.env.python), *arguments)

    def run(self, *arguments: str) -> bool:
        """Run uv; returns whether it succeeded. What interrupts this ends uv too."""
        with (
            self.log.open("w") as log,
            subprocess.Popen(
                [self.executable, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=uv_environment(),
                pass_fds=[self.lock],  # should a set-up be killed, the next one waits for its uv
            ) as uv,
        ):
            try:
                for line in uv.stdout:
                    log.write(line)
                    self._see(line)
            except BaseException:
                uv.terminate()
                raise
        return uv.returncode == 0

    def _see(self, line: str) -> None:
        """Learn from a line of uv's what it downloads: ``Downloading torch (506.1MiB)``."""
        match re.split(r"[ ()]+", line.strip()):
            case ["Downloading", name, size, *_]:
                number, unit = float(size[:-3]), size[-3:]
                self.downloads_mib[name] = number * {"KiB": 2**-10, "GiB": 2**10}.get(unit, 1)
            case ["Downloaded", name]:
                self.downloaded.add(name)
            case _:
                return
        if TERMINAL:
            columns = shutil.get_terminal_size().columns
            print(f"{ERASE}{self.progress()[: columns - 1]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.shown_s > 10:
            self.shown_s = time.monotonic()
            print(self.progress(), file=sys.stderr, flush=True)

    def progress(self) -> str:
        """What is downloaded, of how much, and which large packages are not."""
        waiting = {n: mib for n, mib in self.downloads_mib.items() if n not in self.downloaded}
        total = sum(self.downloads_mib.values())
        line = f"setup: downloaded {total - sum(waiting.values()):,.0f} of {total:,.0f} MiB"
        largest = sorted(waiting, key=waiting.get, reverse=True)[:3]
        return f"{line}, waiting for {', '.join(largest)}" if largest else f"{line}, installing"

    def advice(self) -> str:
        """Say why uv failed, from its log, and what to do."""
        text = self.log.read_text()
        causes = [advice for pattern, advice in CAUSES.items() if re.search(pattern, text)][:1]
        errors = re.findall(r"^(?:error: |  cause: )(.*)", text, re.MULTILINE)
        lines = [errors[0], *errors[-1:]] if errors[1:] else errors or text.splitlines()[-3:]
        return "\n".join([f"uv failed; all it printed: {self.log}", *lines, *causes])


def uv_environment() -> dict[str, str]:
    """The environment that uv gets: certificates of the system, as a proxy may have its own."""
    return {"UV_SYSTEM_CERTS": "1", **pip_index(), **os.environ, "NO_COLOR": "1"}


@cache
def pip_index() -> dict[str, str]:
    """The index that pip's settings name, as the variable that uv reads; pip's own it ignores."""
    if "UV_DEFAULT_INDEX" in os.environ or "UV_INDEX_URL" in os.environ:
        return {}
    command = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(command, capture_output=True, text=True).stdout
    named = re.findall(r"^(?::env:|install|global)\.index-url='(.*)'$", settings, re.MULTILINE)
    return {"UV_DEFAULT_INDEX": named[0]} if named else {}


def main(arguments: list[str]) -> int:
    """The command line that scripts/setup.sh uses; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.machine.setup", description="Bring what runs need."
    )
    parser.add_argument("what", choices=["install", "check"])
    parser.add_argument("stages", nargs="+", metavar="STAGE")
    parser.add_argument("--uv", metavar="PATH")
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--exact", action="store_true", help="insist on this interpreter")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if given.what == "check":
            check(given.stages)
        else:
            set_up(Venv(given.venv), given.stages, given.device, given.uv, exact=given.exact)
    except (UserError, OSError) as error:
        print(f"{ERASE}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted; the next make takes it up again")
        return 130
    return 0


if __name__ == "__main__":
    with lasting_output():
        sys.exit(main(sys.argv[1:]))
