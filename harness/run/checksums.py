"""Checksums of a folder's files, in upstream's format: ``integrity.json`` holds their SHA-256.

Upstream writes the same file under ``--verify-integrity``
(megatron/core/dist_checkpointing/validation.py), one file after another on rank 0, while training
waits. Here several threads read while training continues (benchmarks/checksums.py measures both).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.system.files import read_object, write_json

NAME, ALGORITHM = "integrity.json", "sha256"
MOST_READERS = 16
"""More threads gain nothing on the measured disks."""
READERS_DURING_TRAINING = 2


def write(folder: Path, readers: int | None = None, *, nice: int = 0) -> None:
    """Write the checksums of every file in ``folder``, atomically.

    Args:
        readers: threads that read files at the same time; by default one per core.
        nice: added to the niceness of these threads, 0 to 19.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != NAME)
    if names:
        write_json(
            folder / NAME, {"algorithm": ALGORITHM, "files": _digests(folder, names, readers, nice)}
        )


def read(folder: Path) -> dict[str, str] | None:
    """The checksums in ``folder`` by file name; None where there are none.

    Raises:
        ValueError: ``integrity.json`` is damaged, or of an unknown algorithm.
    """
    if not (folder / NAME).exists():
        return None
    content = read_object(folder / NAME)
    files = content.get("files")
    if content.get("algorithm") != ALGORITHM or not isinstance(files, dict) or not files:
        raise ValueError(f"{NAME} is damaged")
    if not all(
        Path(name).name == name and isinstance(digest, str) for name, digest in files.items()
    ):
        raise ValueError(f"{NAME} is damaged")
    return files


def differing(folder: Path, known: dict[str, str]) -> list[str]:
    """Files in ``folder`` that are missing, or whose checksum is not the ``known`` one."""
    found = _digests(folder, list(known), None, 0)
    return [name for name, digest in known.items() if found[name] != digest]


def _digests(
    folder: Path, names: Sequence[str], readers: int | None, nice: int
) -> dict[str, str | None]:
    readers = min(readers or len(os.sched_getaffinity(0)), MOST_READERS, len(names) or 1)

    def lower_priority() -> None:
        if nice:  # Linux has a niceness for each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)

    with ThreadPoolExecutor(readers, initializer=lower_priority) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, ALGORITHM).hexdigest()
    except OSError:
        return None
