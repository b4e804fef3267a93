"""Upstream's compiled data set helpers, built once on each node.

Upstream compiles ``megatron/core/datasets/helpers.cpp`` on global rank 0 only, into its own tree,
for the ``python3-config`` that comes first on the PATH (``compile_helpers`` in
megatron/core/datasets/utils.py). Here the first rank of every node compiles it for the running
interpreter into a cache, while the other ranks of the node wait. Upstream's tree is not changed.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UserError

MODULE = "helpers_cpp"


def ensure_compiled() -> None:
    """Make ``megatron.core.datasets.helpers_cpp`` importable, and upstream's ``compile_helpers`` a
    no-op.

    The wheel has it compiled, and a source tree may; else it is compiled once a node.

    Raises:
        UserError: there is no C++ compiler, no Python headers or no writable cache, or compiling
            failed.
    """
    from megatron.core import datasets
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None
    if find_spec(f"{datasets.__name__}.{MODULE}") is None:
        source = Path(datasets.__path__[0]) / "helpers.cpp"
        datasets.__path__.append(str(compiled(source)))


def library_name() -> str:
    """The file name under which this interpreter imports the helpers."""
    return MODULE + sysconfig.get_config_var("EXT_SUFFIX")


def compiled(source: Path) -> Path:
    """The cache folder with ``source`` compiled for this interpreter. Raises UserError."""
    digest = hashlib.sha256(source.read_bytes() + library_name().encode()).hexdigest()[:12]
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "megatron-helpers"
        / digest
    )
    library = cache / library_name()
    if library.exists():
        return cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {cache}: {error.strerror}\nset XDG_CACHE_HOME to a directory you own"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(source, library)
    return cache


def _compile(source: Path, library: Path) -> None:
    """Compile ``source`` into ``library``, which appears only once it is complete."""
    compiler = shlex.split(
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    )
    if not compiler:
        raise UserError(
            "upstream's data set helpers must be compiled, and there is no C++ compiler\ninstall"
            " g++ (apt-get install g++), or use the megatron-core wheel, which has them compiled"
        )
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        raise UserError(
            f"no Python headers in {include}\ninstall them (apt-get install python3-dev)"
        )
    import pybind11

    partial = library.with_name(f".{os.getpid()}.{library.name}")
    command = [
        *compiler,
        "-O3",
        "-shared",
        "-std=c++17",
        "-fPIC",
        f"-I{include}",
        f"-I{pybind11.get_include()}",
    ]
    done = subprocess.run(
        [*command, str(source), "-o", str(partial)], capture_output=True, text=True
    )
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise UserError(f"{compiler[0]} could not compile {source}:\n{done.stderr[-2000:].strip()}")
    partial.replace(library)
