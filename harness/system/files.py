"""Atomic writes that survive a power cut, and readers of files that a killed process left."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from harness.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError


MAKE_ROOM = "make room there (make clean removes failed runs that cannot be resumed)"
"""Advice for a full disk that loses no work."""


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write: readers see the old or the complete new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def expanded(text: str) -> Path:
    """The path ``text`` with its ~ expanded; like a shell, leave that of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``, and delete a folder of that name only then.

    A process killed between the two renames leaves the old folder complete, next to ``target`` as
    ``.<name>.<pid>.old``.
    """
    sync_tree(new)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in ``folder`` to disk: a synced file can lose its name in a power cut.

    File systems that cannot sync folders (some network and overlay ones) are ignored.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Sync the bytes of ``path`` to disk, whoever wrote them; it may be missing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync every file in ``folder`` and all names, that of ``folder`` too, to disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(inner, name))
        sync_folder(Path(inner))
    sync_folder(folder.parent)


def make_folder(folder: Path) -> list[Path]:
    """Make ``folder`` and missing parents, and sync their names to disk; what was made, the
    innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)
    return missing


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically. NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def told_if_unwritable(directory: Path, setting: str = "OUTDIR") -> Iterator[None]:
    """Turn an OSError such as a full disk into a UserError with advice.

    ``setting`` is the one that names ``directory``.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = MAKE_ROOM if full else "make it a writable directory"
        raise UserError(
            f"cannot write to {directory}: {error.strerror}\n{way_out}, or set {setting}= to"
            " another"
        ) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and lock it; remove incomplete files that a killed process left.

    Raises:
        UserError: another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {folder}\nwait for it, or give another NAME="
            ) from None
        for left in folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ValueError where it holds none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from None
    value = json_object(text)
    if value is None:
        raise ValueError(f"{path.name} is not a JSON object ({len(text)} characters)")
    return value


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in ``text``, or None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def complaint(path: Path, error: ValidationError) -> str:
    """The first error in ``path``: its key and the reason."""
    first = error.errors()[0]
    return f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"


def text_lines(path: Path) -> list[str]:
    """Lines of a file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
