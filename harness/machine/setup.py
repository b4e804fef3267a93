"""Brings a virtual environment to the set-up stages, where scripts/setup.sh finds them out of date.

Standard library only: this runs before anything is installed.
"""

import argparse
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    this_python,
)
from harness.system.streams import lasting_output

Device = Literal["cpu", "cuda"]

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Free disk that a set-up takes, by the build of PyTorch it brings: the environment, the wheels it
# is unpacked from, and pip's cache. Measured (Python 3.12, x86-64): 6.7 GiB at the height with
# CUDA's, 36 MiB with none.
DISK_MIB = {"none": 300, "cpu": 3000, "cuda": 9500}
# What a set-up with PyTorch downloads and what it then takes, in MiB: (download, installed). CUDA's
# build, from PyPI: summed over wheels and files of the heavy stage (torch 2.11.0, Python 3.12,
# x86-64); 3,376 MiB of 4,741 are CUDA's packages and Triton. PyPI's PyTorch does not import without
# CUDA's: libtorch_cpu.so needs libcudart. The CPU's build: computed, the same less those packages
# and less libtorch_cuda; its wheel has about 190 MiB.
SIZES_MIB = {"cpu": (260, 950), "cuda": (2700, 4750)}
# What the other stages download.
DOWNLOADS_MIB = {"light": 8, "test": 65, "data": 145, "calibrate": 50, "tracking": 45, "peft": 2}
# What a stage must be able to do beyond importing what it pins.
PROOFS = {
    "heavy": (
        """
import torch.distributed, megatron.training.training
assert torch.distributed.is_gloo_available(), "this torch has no gloo"
"""
    ),
    "gpu": (
        """
if torch.cuda.is_available():
    layer = transformer_engine.pytorch.LayerNormLinear(64, 64, params_dtype=torch.bfloat16)
    assert layer(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")).isfinite().all()
"""
    ),
}


class Unproven(UserError):
    """All was installed, and yet the stage does not work."""


def set_up(env: Venv, stages: list[str], device: Device, *, exact: bool = False) -> None:
    """Bring ``env`` to ``stages``; what is there and whole is kept.

    Args:
        device: whose PyTorch build.
        exact: make it anew if it was made with another interpreter than the running one.

    Raises:
        UserError: the path is something else, the disk is full, pip failed, or the result does not
        work.
    """
    with locked(env) as lock:
        new = not works(env) or (exact and env.made_with() != this_python())
        if new:
            create(env)
        try:
            bring(env, stages, device, lock)
        except Unproven as broken:
            if new:
                raise
            say(f"{broken}; making {env.path} anew")
            create(env)
            bring(env, stages, device, lock)


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
    """Whether its interpreter starts and has pip."""
    try:
        return env.run("import pip").returncode == 0
    except OSError:
        return False


def create(env: Venv) -> None:
    """Make ``env`` anew with the running interpreter. Raises UserError where its folder is
    something else."""
    content = [entry for entry in env.path.iterdir() if entry.name != "lock"]
    if content and not (env.path / "pyvenv.cfg").exists():
        raise UserError(
            f"{env.path} holds files but is no virtual environment\nname another place: VENV=dir"
        )
    check_disk(env, "none")
    say(f"making {env.path} with Python {this_python()}")
    for entry in content:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    import venv

    venv.EnvBuilder(symlinks=True, with_pip=True, prompt="megatron-harness").create(env.path)


def bring(env: Venv, stages: list[str], device: Device, lock: int) -> None:
    """Install the stages that are not ready, prove each, and stamp it last.

    Raises:
        Unproven: a stage cannot be imported though pip installed it.
        UserError: the disk is full, or pip failed.
    """
    if device == "cuda":
        forget_cpu_torch(env)
    for stage in stages:
        if env.ready(stage):
            continue
        started = time.monotonic()
        env.stamp(stage).unlink(missing_ok=True)
        for info in env.half_installed():  # by an interrupted pip, or with files deleted since
            shutil.rmtree(info)
        if env.lacking(stage):
            install(env, stage, device, lock)
        if lacking := env.lacking(stage):
            raise Unproven(f"pip left {', '.join(lacking)} out of {stage}")
        say(f"{stage}: proving that it imports")
        imports = "".join(f"import {module(r)}\n" for r in requirements(stage))
        proof = env.run(imports + PROOFS.get(stage, ""))
        if proof.returncode:
            reason = (proof.stderr.strip() or "killed").splitlines()[-1]
            raise Unproven(f"{stage} is installed, but does not work: {reason}")
        half = env.stamp(stage).with_suffix(".half")
        half.write_text(env.stamp_text(stage))
        half.replace(env.stamp(stage))
        say(f"{stage}: ready after {time.monotonic() - started:.0f} s")


def forget_cpu_torch(env: Venv) -> None:
    """If PyTorch's CPU build is there, make pip install the one for CUDA over it."""
    build, info = env.installed().get("torch", ("", env.site))
    if build.endswith("+cpu"):
        say("replacing PyTorch's CPU build by the one for CUDA")
        shutil.rmtree(info)


def install(env: Venv, stage: str, device: Device, lock: int) -> None:
    """Have pip install what ``stage`` pins; PyTorch first from its CPU index, or from TORCH_INDEX.

    Raises:
        UserError: the disk is full, or pip failed.
    """
    torch = next((r for r in env.lacking(stage) if distribution(r) == "torch"), None)
    index = os.environ.get("TORCH_INDEX") if torch else None
    if torch and not index and device == "cpu" and sys.platform == "linux":
        if reason := unreachable(CPU_INDEX):
            say(
                f"{CPU_INDEX} cannot be reached ({reason}): taking PyPI's PyTorch, which cannot do"
                " without CUDA's libraries"
            )
        else:
            index = CPU_INDEX
    build = "none" if not torch else "cpu" if index == CPU_INDEX else "cuda"
    check_disk(env, build)
    pip = Pip(env, stage, lock, announce(env, stage, build))
    if torch and index and not pip.install(torch, "--no-deps", "--index-url", index):
        say(
            f"{index} did not give {torch}: taking PyPI's, which cannot do without CUDA's libraries"
        )
        check_disk(env, "cuda")
        pip.total_mib = announce(env, stage, "cuda")
    # scripts/setup-gpu.sh builds its wheel; pip alone would do so for the wrong torch.
    options = [
        "--constraint",
        str(ROOT / "scripts/constraints.txt"),
        "--only-binary",
        "transformer-engine-torch",
    ]
    if not pip.install(*requirements(stage), *options):
        raise UserError(pip.advice())


def announce(env: Venv, stage: str, build: str) -> int | None:
    """Say what ``stage`` will download and take, and return the download in MiB; None where that is
    not known."""
    if build == "none":
        return DOWNLOADS_MIB.get(stage)
    download, installed = SIZES_MIB[build]
    say(
        f"{stage}: with PyTorch for {'the CPU' if build == 'cpu' else 'CUDA'}, about {download:,}"
        f" MiB to download, {installed:,} MiB in {env.path}; once, minutes"
    )
    return download


def check_disk(env: Venv, build: str) -> None:
    """Raises UserError if there is less room than a set-up with this ``build`` of PyTorch takes."""
    free_mib = shutil.disk_usage(env.path).free >> 20
    if free_mib < DISK_MIB[build]:
        raise UserError(
            f"{env.path} has {free_mib:,} MiB free, this set-up takes {DISK_MIB[build]:,} MiB\n"
            "make room, or put it on another disk: VENV=/big/disk/venv PIP_CACHE_DIR=/big/disk/pip"
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

# What pip's words mean, the cause before what follows from it.
CAUSES = {
    "No space left on device|Disk quota exceeded": (
        "the disk or a quota is full: make room, or VENV=/big/disk/venv PIP_CACHE_DIR=/big/disk/pip"
    ),
    "ConnectionError|NameResolution|Max retries|[Tt]imed? ?out|ProxyError|SSLError|Network is unreachable": (  # noqa: E501
        "the package index cannot be reached: look at the network, https_proxy and `pip config"
        " list`\na mirror: PIP_INDEX_URL=…; without a network, use packages that are there: VENV=0"
    ),
    "No matching distribution found for transformer-engine-torch": "it is built by make setup-gpu",
    "No matching distribution|Could not find a version|ResolutionImpossible": (
        "the package index lacks a pinned version for this machine: look at `pip config list`\n"
        "another index: PIP_INDEX_URL=…"
    ),
}


@dataclass
class Pip:
    """pip inside ``env``: its words go to a log, what it does shows as one line."""

    env: Venv
    stage: str
    lock: int
    total_mib: int | None = None
    """About how much this stage downloads, where that is known."""

    def __post_init__(self) -> None:
        self.log = self.env.path / f"setup-{self.stage}.log"
        self.log.write_text("")

    def install(self, *arguments: str) -> bool:
        """Run ``pip install``; returns whether it succeeded. What interrupts this ends pip too."""
        self.doing, self.packages = "starting pip", 0
        temporary = self.env.path / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # Not compiled here: the first import compiles what is used, and most is not.
        options = [
            "--no-input",
            "--disable-pip-version-check",
            "--no-compile",
            "--progress-bar",
            "off",
        ]
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(temporary, done))
        with (
            self.log.open("a") as log,
            subprocess.Popen(
                [self.env.python, "-I", "-m", "pip", "install", *options, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"PIP_USER": "0", "TMPDIR": str(temporary.resolve())},
                pass_fds=[self.lock],  # should a set-up be killed, the next one waits for its pip
            ) as pip,
        ):
            ticker.start()
            try:
                for line in pip.stdout:
                    log.write(line)
                    self._see(line)
            except BaseException:
                pip.terminate()
                raise
            finally:
                done.set()
                ticker.join()
                shutil.rmtree(temporary, ignore_errors=True)
        return pip.returncode == 0

    def _see(self, line: str) -> None:
        """Learn from a line of pip's what it does."""
        match line.split():
            case ["Installing", "collected", "packages:", *packages]:
                self.packages = len(packages)
            case ["Collecting" | "Downloading" as verb, what, *_]:
                self.doing = f"{verb.lower()} {'-'.join(what.rsplit('/')[-1].split('-')[:2])}"
            case ["Building", "wheel", "for", what, *_]:
                self.doing = f"building {what}"

    def _tick(self, temporary: Path, done: threading.Event) -> None:
        """Show what pip does: twice a second on a terminal, every ten seconds elsewhere."""
        started, before = time.monotonic(), len(self.env.installed())
        while not done.wait(0.5 if TERMINAL else 10):
            if self.packages:
                doing = (
                    f"installed {len(self.env.installed()) - before} of {self.packages} packages"
                )
            else:
                doing = f"{self.doing}, {self._downloaded(size_mib(temporary))}"
            line = f"setup: {self.stage}: {doing}, {time.monotonic() - started:.0f} s"
            if TERMINAL:
                line = ERASE + line[: shutil.get_terminal_size().columns - 1]
            print(line, end="" if TERMINAL else "\n", file=sys.stderr, flush=True)

    def _downloaded(self, mib: float) -> str:
        """``530 of about 2,700 MiB``; without the total where that is unknown, or was too low."""
        total = f"of about {self.total_mib:,} " if self.total_mib and mib <= self.total_mib else ""
        return f"{mib:,.0f} {total}MiB"

    def advice(self) -> str:
        """Say why pip failed, from its log, and what to do."""
        lines = self.log.read_text().splitlines()
        words = "\n".join(lines[-60:])
        cause = [advice for pattern, advice in CAUSES.items() if re.search(pattern, words)][:1]
        errors = [line for line in lines if line.startswith("ERROR")][-2:] or lines[-3:]
        return "\n".join(
            [f"pip could not install {self.stage}; its words: {self.log}", *errors, *cause]
        )


def size_mib(folder: Path) -> float:
    """Return the size of the files below ``folder``, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total / 2**20


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


def main(arguments: list[str]) -> int:
    """The command line that scripts/setup.sh uses; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.machine.setup", description="Bring what runs need."
    )
    parser.add_argument("what", choices=["install", "check", "missing"])
    parser.add_argument("stages", nargs="+", metavar="STAGE")
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--exact", action="store_true", help="insist on this interpreter")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        match given.what:
            case "install":
                set_up(Venv(given.venv), given.stages, given.device, exact=given.exact)
            case "check":
                check(given.stages)
            case "missing":
                print(*dict.fromkeys(r for stage in given.stages for r in missing(stage)), sep="\n")
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
