"""Upstream's compiled index helpers, ready on every node before its ranks start.

Upstream compiles ``megatron/core/datasets/helpers.cpp`` on global rank 0 only, in its own tree, with whatever ``python3``
comes first on the PATH. Here the first rank of every node compiles it for the running interpreter, into a cache named by
what is compiled, while the node's other ranks wait; upstream's tree stays as it was checked out.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UserError

MODULE = "helpers_cpp"


def ensure_compiled() -> None:
    """Make ``megatron.core.datasets.helpers_cpp`` importable, compiling it once a node if need be.

    The wheel brings it compiled, and so may a container; then nothing happens. Upstream's own ``compile_helpers`` becomes
    a no-op, because everything it does is done.

    Raises:
        UserError: no C++ compiler, no Python headers, no writable cache, or the compiler failed.
    """
    import megatron.core.datasets as datasets
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None
    if find_spec(f"{datasets.__name__}.{MODULE}") is None:
        source = Path(datasets.__path__[0]) / "helpers.cpp"
        datasets.__path__.append(str(_compiled(source)))


def _compiled(source: Path) -> Path:
    """Return the cache folder that holds ``source`` compiled for this interpreter."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    digest = hashlib.sha256(source.read_bytes() + suffix.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-helpers" / digest
    library = cache / f"{MODULE}{suffix}"
    if library.exists():
        return cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {cache}: {error.strerror}\nset XDG_CACHE_HOME to a directory that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(source, library)
    return cache


def _compile(source: Path, library: Path) -> None:
    """Compile ``source`` into ``library``, which appears only when it is whole."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise UserError(
            "upstream's data set helpers must be compiled, and there is no C++ compiler\n"
            "install g++ (apt-get install g++), or use the megatron-core wheel, which brings them compiled"
        )
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        raise UserError(f"no Python headers in {include}\ninstall them (apt-get install python3-dev), or use uv's or pyenv's")
    import pybind11

    partial = library.with_name(f".{os.getpid()}.{library.name}")
    command = [compiler, "-O3", "-shared", "-std=c++17", "-fPIC", f"-I{include}", f"-I{pybind11.get_include()}"]
    done = subprocess.run([*command, str(source), "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise UserError(f"{compiler} could not compile {source}:\n{done.stderr[-2000:].strip()}")
    partial.replace(library)
