"""Installs the Python packages that the image lacks, by the hashes of uv.lock.

usage: python3 docker/packages.py     while the image is built; needs pip and a network

Standard library only: this runs before anything is installed.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.errors import UserError  # noqa: E402
from harness.machine import setup, stages  # noqa: E402

# What every command inside needs but those of developers (test, docs).
STAGES = ("heavy", "data", "calibrate", "search", "tracking")
LOCK = ROOT / "uv.lock"


def install() -> None:
    """Install what this interpreter lacks; what it has stays, above all its PyTorch.

    Raises:
        UserError: pip or uv fails, a package is needed that uv.lock does not have, or something is
        still lacking.
    """
    lacking = list(dict.fromkeys(r for stage in STAGES for r in stages.missing(stage)))
    if lacking:
        with tempfile.TemporaryDirectory() as folder:
            uv = fetch_uv(Path(folder))
            groups = [word for stage in STAGES for word in ("--only-group", stage)]
            locked = entries(run(uv, *setup.EXPORT, *groups))
            wanted = resolve(lacking, locked, uv, Path(folder, "constraints.txt"))
            if unknown := [name for name in wanted if name not in locked]:
                raise UserError(f"uv.lock lacks {', '.join(unknown)}, which this base needs")
            chosen = Path(folder, "requirements.txt")
            chosen.write_text("".join(locked[name] for name in wanted))
            here = ["--python", sys.executable, "--break-system-packages", "--no-cache"]
            by_hash = ["--no-deps", "--require-hashes", "--requirements", str(chosen)]
            run(uv, "pip", "install", *here, *by_hash)
    setup.check(list(STAGES))


def fetch_uv(folder: Path) -> str:
    """Install uv below ``folder``, by the hashes of uv.lock; returns its path."""
    packages = tomllib.loads(LOCK.read_text())["package"]
    package = next(package for package in packages if package["name"] == "uv")
    hashes = " ".join(f"--hash={wheel['hash']}" for wheel in package["wheels"])
    wanted = folder / "uv.txt"
    wanted.write_text(f"uv=={package['version']} {hashes}\n")
    options = ["--quiet", "--no-input", "--no-cache-dir", "--no-deps", "--require-hashes"]
    target = ["--target", str(folder), "--requirement", str(wanted)]
    run(sys.executable, "-m", "pip", "install", *options, *target)
    return str(folder / "bin" / "uv")


def entries(exported: str) -> dict[str, str]:
    """Return normalised name -> its requirement with hashes, of what ``uv export`` prints."""
    parts = re.split(r"^(?=\S)", exported, flags=re.MULTILINE)
    return {stages.distribution(part.split(" ")[0]): part for part in parts if part.strip()}


def resolve(
    lacking: Sequence[str], locked: dict[str, str], uv: str, constraints: Path
) -> list[str]:
    """Return the normalised names of what uv would install for ``lacking``, leaving what fits as
    it is.

    Raises UserError where nothing fits the PyTorch that is there.
    """
    present = {stages.distribution(d.name): d.version for d in metadata.distributions() if d.name}
    pins = [
        entry.partition("\\")[0].strip() for name, entry in locked.items() if name not in present
    ]
    # The base's own PyTorch fits its CUDA, its NCCL and its Transformer Engine: no dependency may
    # replace it.
    pins += [f"torch=={present['torch']}"] if "torch" in present else []
    constraints.write_text("\n".join(pins) + "\n")
    here = ["--dry-run", "--python", sys.executable, "--break-system-packages", "--no-cache"]
    printed = run(uv, "pip", "install", *here, "--constraints", str(constraints), *lacking)
    names = [stages.distribution(name) for name in re.findall(r"^ \+ ([\w.-]+)==", printed, re.M)]
    for name in names:
        if name in present:
            print(f"packages: {name} {present[name]} does not fit what is added; replaced")
    return names


def run(*command: str) -> str:
    """Run pip or uv and return all that it prints. Raises UserError with that where it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=setup.uv_environment(),
    )
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} failed:\n{done.stdout.strip()}")
    return done.stdout


if __name__ == "__main__":
    try:
        install()
    except UserError as error:
        sys.exit(f"error: {error}")
