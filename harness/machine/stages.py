"""What must be installed, by stage, and whether it is. The stages are dependency groups of
pyproject.toml.

Standard library only: the set-up runs this before anything is installed.
"""

import csv
import platform
import re
import subprocess
import sys
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
    "megatron-core": "megatron.core",
    "nvidia-cuda-cccl": "nvidia.cu13",
    "nvidia-cuda-crt": "nvidia.cu13",
    "nvidia-cuda-nvcc": "nvidia.cu13",
    "nvidia-ml-py": "pynvml",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "transformer-engine-torch": "transformer_engine.pytorch",
}


def pins() -> str:
    """Return the text of pyproject.toml's ``[dependency-groups]``; scripts/setup.sh cuts out the
    same."""
    text = (ROOT / "pyproject.toml").read_text().rstrip("\n")
    return text.partition("[dependency-groups]")[2].partition("\n[")[0]


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


def distribution(requirement: str) -> str:
    """Return the normalised name in a requirement: ``cuda-toolkit`` of
    ``cuda-toolkit[nvcc]==13.0.2``."""
    return _normal(re.split(r"[\[=]", requirement)[0])


def version(requirement: str) -> str:
    """Return the pinned version: ``13.0.2`` of ``cuda-toolkit[nvcc]==13.0.2``."""
    return requirement.partition("==")[2]


def module(requirement: str) -> str:
    """Return the module that a requirement is imported as: ``pynvml`` of
    ``nvidia-ml-py==13.615.71``."""
    name = distribution(requirement)
    return MODULES.get(name, name.replace("-", "_"))


def missing(stage: str) -> tuple[str, ...]:
    """Return what ``stage`` pins and the running interpreter has in no version.

    Upstream's tree stands for megatron-core.
    """
    given = {"megatron-core"} if locate() else set()
    return tuple(
        r for r in requirements(stage) if distribution(r) not in given and not _found(module(r))
    )


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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
        return {_normal(name): (version, info) for name, version, info in infos}

    def lacking(self, stage: str) -> tuple[str, ...]:
        """Return the requirements of ``stage`` that are not installed in the pinned version."""
        have = {
            (name, version.partition("+")[0]) for name, (version, _) in self.installed().items()
        }
        return tuple(r for r in requirements(stage) if (distribution(r), version(r)) not in have)

    def stamp(self, stage: str) -> Path:
        """The file that says a stage was finished, and with what."""
        return self.path / f"setup-{stage}.stamp"

    def stamp_text(self, stage: str) -> str:
        """What the stamp of a finished ``stage`` says: files that must be there, an empty line, the
        pins."""
        have, pinned = self.installed(), requirements(stage)
        records = [have[distribution(r)][1] / "RECORD" for r in pinned]
        modules = [self.site / module(r).replace(".", "/") / "__init__.py" for r in pinned]
        files = [self.python, *records, *(m for m in modules if m.exists())]
        return "\n".join([*(str(f.relative_to(self.path)) for f in files), "", pins()])

    def ready(self, stage: str) -> bool:
        """Whether ``stage`` was finished with today's pins, and is still there."""
        stamp = self.stamp(stage)
        finished = self.python.exists() and stamp.exists() and not self.lacking(stage)
        return finished and stamp.read_text() == self.stamp_text(stage)

    def half_installed(self) -> list[Path]:
        """Return the .dist-info folders of distributions that lack a file they recorded, or the
        record."""
        return [info for _, info in self.installed().values() if not _whole(info)]

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run ``code`` with its interpreter, isolated from PYTHONPATH. Raises OSError where there
        is none."""
        return subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True)

    def made_with(self) -> str:
        """Return the interpreter it was made with, as `this_python` names the running one; "" if
        unknown."""
        config = self.path / "pyvenv.cfg"
        lines = config.read_text().splitlines() if config.exists() else []
        said = dict(line.split(" = ", 1) for line in lines if " = " in line)
        return f"{said.get('version')} ({said.get('home')})" if said else ""


def this_python() -> str:
    """Return ``3.12.1 (/usr/bin)``: the running interpreter, or the one behind its virtual
    environment."""
    return f"{platform.python_version()} ({Path(sys._base_executable).parent})"


def _whole(info: Path) -> bool:
    record = info / "RECORD"
    if not record.exists():
        return False
    with record.open(newline="") as file:
        paths = [row[0] for row in csv.reader(file) if row]
    return all((info.parent / path).exists() for path in paths if not path.endswith(".pyc"))
