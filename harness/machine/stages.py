"""Which packages each set-up stage needs, and which of them are installed.

A stage is a dependency group of pyproject.toml. Standard library only: the set-up runs this before
anything is installed.
"""

import csv
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harness import ROOT
from harness.errors import UserError, nearest
from harness.machine.upstream import locate

# Where the imported name is not the distribution's with underscores.
MODULES = {
    "fasttext-predict": "fasttext",
    "megatron-core": "megatron.core",
    "nvidia-cuda-cccl": "nvidia.cu13",
    "nvidia-cuda-crt": "nvidia.cu13",
    "nvidia-cuda-nvcc": "nvidia.cu13",
    "nvidia-ml-py": "pynvml",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "transformer-engine-torch": "transformer_engine.pytorch",
}


def requirements(stage: str) -> tuple[str, ...]:
    """Return what ``stage`` pins, included groups resolved: ``("psutil==7.2.2", …)``.

    Raises:
        UserError: pyproject.toml has no such group.
    """
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    if stage not in groups:
        raise UserError(f"no set-up stage {stage!r}; {nearest(stage, groups)}")

    def expand(name: str) -> Iterator[str]:
        for entry in groups[name]:
            if isinstance(entry, str):
                yield entry
            else:
                yield from expand(entry["include-group"])

    return tuple(expand(stage))


def missing(stage: str) -> tuple[str, ...]:
    """Return what ``stage`` pins and the running interpreter has in no version.

    Upstream's source tree replaces megatron-core.
    """
    given = {"megatron-core"} if locate() else set()
    return tuple(
        r for r in requirements(stage) if distribution(r) not in given and not _found(module(r))
    )


def distribution(requirement: str) -> str:
    """Return the normalised name in a requirement: ``nvidia-ml-py`` of
    ``nvidia_ml_py==13.615.71``."""
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def version(requirement: str) -> str:
    """Return the pinned version: ``13.615.71`` of ``nvidia-ml-py==13.615.71``."""
    return requirement.partition("==")[2]


def module(requirement: str) -> str:
    """Return the module that a requirement is imported as: ``pynvml`` of
    ``nvidia-ml-py==13.615.71``."""
    name = distribution(requirement)
    return MODULES.get(name, name.replace("-", "_"))


@dataclass(frozen=True)
class Venv:
    """A virtual environment at ``path``, which need not exist."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin/python"

    @property
    def site(self) -> Path:
        """Its site-packages; a folder that does not exist where the environment does not."""
        return next(self.path.glob("lib/python3*/site-packages"), self.path / "lib/none")

    def installed(self) -> dict[str, tuple[str, Path]]:
        """Return normalised name -> (version, its .dist-info folder), of every distribution."""
        infos = [(*info.stem.split("-", 1), info) for info in self.site.glob("*-*.dist-info")]
        return {distribution(name): (version, info) for name, version, info in infos}

    def lacking(self, stage: str) -> tuple[str, ...]:
        """Return the requirements of ``stage`` that are not installed in the pinned version."""
        have = {name: version.partition("+")[0] for name, (version, _) in self.installed().items()}
        return tuple(r for r in requirements(stage) if have.get(distribution(r)) != version(r))

    def stamp(self, stage: str) -> Path:
        """The file that is written last, once ``stage`` is installed and works."""
        return self.path / f"stage-{stage}.stamp"

    def stamp_text(self, stage: str) -> str:
        """What the stamp of ``stage`` says, for scripts/setup.sh to compare: files that must be
        there, an empty line, the checksum of uv.lock."""
        have, pinned = self.installed(), requirements(stage)
        records = [have[distribution(r)][1] / "RECORD" for r in pinned]
        modules = [self.site / module(r).replace(".", "/") / "__init__.py" for r in pinned]
        files = [self.python, *records, *(m for m in modules if m.exists())]
        return "\n".join([*(str(f.relative_to(self.path)) for f in files), "", lock_checksum()])

    def ready(self, stage: str) -> bool:
        """Whether ``stage`` was finished with today's uv.lock, and is still there."""
        stamp = self.stamp(stage)
        finished = self.python.exists() and stamp.exists() and not self.lacking(stage)
        return finished and stamp.read_text() == self.stamp_text(stage)

    def damaged(self) -> list[Path]:
        """Return the .dist-info folders of distributions without their RECORD, or without a file
        that it lists, as an interrupted installation leaves them."""
        return [info for _, info in self.installed().values() if not _whole(info)]

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run ``code`` with its interpreter, isolated from PYTHONPATH. Raises OSError where there
        is none."""
        return subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True)


def lock_checksum() -> str:
    """Return what ``cksum <uv.lock`` prints, as in scripts/setup.sh."""
    with (ROOT / "uv.lock").open("rb") as lock:
        return subprocess.run(["cksum"], stdin=lock, stdout=subprocess.PIPE, text=True).stdout


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def _whole(info: Path) -> bool:
    try:
        with (info / "RECORD").open(newline="") as record:
            rows = [row for row in csv.reader(record) if row and not row[0].endswith(".pyc")]
        sizes = [((info.parent / path).stat().st_size, recorded) for path, _, recorded in rows]
    except OSError:
        return False
    return all(not recorded or size == int(recorded) for size, recorded in sizes)
