"""The Python packages of the image, each pinned by version and hash in docker/requirements.txt.

usage: python3 docker/packages.py install    in the image: what it lacks, and nothing that it has
       python3 docker/packages.py lock       on a development machine with uv: write
                                             docker/requirements.txt anew

Standard library only: this runs before anything is installed.
"""

import argparse
import json
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
STAGES = ("heavy", "data", "calibrate", "tracking")
LOCK = ROOT / "docker" / "requirements.txt"
HEADER = """\
# The image's packages: their versions and the hashes of their files for Linux and Python 3.12 or 3.13.
# Written by: python3 docker/packages.py lock
"""  # noqa: E501
# Wheels that a Linux image with one of these Pythons can use; ABI tags follow in the name.
USABLE = re.compile(
    r"-(?:(?:py3|py2\.py3|py312|py313)-none|cp31[23]-(?:cp31[23]|abi3|none)|cp3\d*-abi3)"
    r"-(?:any|(?:.*\.)?(?:manylinux|linux_)\w*(?:x86_64|aarch64).*)\.whl$"
)
# Markers of packages for other systems and Pythons.
ELSEWHERE = re.compile(r"== '(?:win32|darwin|emscripten)'|python_full_version >= '3\.14'")


def read_lock(text: str) -> dict[str, str]:
    """Return normalised name -> its requirement with hashes, as pip reads it, of the text of a lock
    file."""
    entries = re.split(
        r"^(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE
    )
    return {stages.distribution(entry.split(" ")[0]): entry for entry in entries if entry.strip()}


def render_lock(pylock: str) -> str:
    """Return the text of docker/requirements.txt for a ``pylock.toml`` (PEP 751).

    Raises:
        UserError: a package has no wheel that the image could use.
    """
    lines = [HEADER]
    for package in sorted(tomllib.loads(pylock)["packages"], key=lambda p: p["name"]):
        if ELSEWHERE.search(package.get("marker", "")):
            continue
        files = {
            w.get("name") or w["url"].rsplit("/", 1)[1]: w["hashes"]["sha256"]
            for w in package.get("wheels", ())
        }
        hashes = sorted(value for name, value in files.items() if USABLE.search(name))
        if not hashes:
            raise UserError(
                f"{package['name']} {package['version']} has no wheel for Linux and Python 3.12 or"
                " 3.13"
            )
        marker = f" ; {package['marker']}" if "marker" in package else ""
        lines.append(f"{package['name']}=={package['version']}{marker}")
        lines[-1] += "".join(f" \\\n    --hash=sha256:{value}" for value in hashes) + "\n"
    return "".join(lines)


def lock() -> None:
    """Write docker/requirements.txt: what the stages of pyproject.toml pin and pull in. Raises
    UserError where uv fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "pylock.toml")
        groups = [word for stage in STAGES for word in ("--group", stage)]
        command = [
            "uv",
            "pip",
            "compile",
            "pyproject.toml",
            *groups,
            "--constraint",
            "scripts/constraints.txt",
        ]
        # PyPI alone: an index or a folder of this machine's configuration would bring files that
        # others do not have.
        command += ["--no-config", "--default-index", "https://pypi.org/simple", "--quiet"]
        command += [
            "--python-version",
            "3.12",
            "--universal",
            "--format",
            "pylock.toml",
            "--output-file",
            str(output),
        ]
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        except FileNotFoundError:
            raise UserError("docker/packages.py lock needs uv: pip install uv") from None
        if done.returncode:
            raise UserError(f"uv could not resolve the packages:\n{done.stderr.strip()}")
        LOCK.write_text(render_lock(output.read_text()))


def install() -> None:
    """Install, by hash, what this interpreter lacks; what it has stays, above all its PyTorch.

    Raises:
        UserError: pip fails, a package is needed that the lock does not have, or something is still
        lacking.
    """
    lacking = list(dict.fromkeys(r for stage in STAGES for r in stages.missing(stage)))
    if lacking:
        locked = read_lock(LOCK.read_text())
        wanted = resolve(lacking, locked)
        if unknown := [name for name in wanted if name not in locked]:
            raise UserError(
                f"docker/requirements.txt lacks {', '.join(unknown)}, which this base needs"
            )
        with tempfile.TemporaryDirectory() as folder:
            chosen = Path(folder, "requirements.txt")
            chosen.write_text("".join(locked[name] for name in wanted))
            pip("install", "--no-deps", "--require-hashes", "--requirement", str(chosen))
    setup.check(list(STAGES))


def resolve(lacking: Sequence[str], locked: dict[str, str]) -> list[str]:
    """Return the normalised names of what pip would install for ``lacking``, leaving what fits as
    it is.

    pip downloads what it looks at; the installation takes it from pip's cache where the index
    allows one. Raises UserError where nothing fits beside the PyTorch that is there.
    """
    present = {stages.distribution(d.name): d.version for d in metadata.distributions() if d.name}
    pins = [
        entry.partition("\\")[0].strip() for name, entry in locked.items() if name not in present
    ]
    # The base's own PyTorch fits its CUDA, its NCCL and its Transformer Engine: no dependency may
    # replace it.
    pins += [f"torch=={present['torch']}"] if "torch" in present else []
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(pins) + "\n")
        pip(
            "install",
            "--dry-run",
            "--quiet",
            "--report",
            str(report),
            "--constraint",
            str(constraints),
            *lacking,
        )
        chosen = json.loads(report.read_text())["install"]
    names = [stages.distribution(item["metadata"]["name"]) for item in chosen]
    for name in names:
        if name in present:
            print(
                f"packages: {name} {present[name]} is too old or too new for what is added;"
                " replaced"
            )
    return names


def pip(*arguments: str) -> None:
    """Run pip of this interpreter. Raises UserError where it fails; its own words stand on
    stderr."""
    if subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    ).returncode:
        raise UserError(f"pip {arguments[0]} failed")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="docker/packages.py", description="The packages of the image, by hash."
    )
    parser.add_argument("what", choices=["install", "lock"])
    try:
        {"install": install, "lock": lock}[parser.parse_args(arguments).what]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
