"""Puts a finished data set in its place: one writer a name, the manifest last."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.data.header import bin_path, idx_path
from harness.data.indexed import Pair
from harness.data.manifest import FILE as MANIFEST
from harness.data.manifest import Manifest, TokenizerUsed, Written, read_manifest
from harness.data.names import prefix_of
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.system.files import sync_tree


@contextlib.contextmanager
def only_one(home: Path, name: str) -> Iterator[None]:
    """Hold the lock of the data set ``name``; its folder ``home`` exists meanwhile.

    Raises:
        UserError: another process holds it.
    """
    path = home / ".lock"
    while True:
        home.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                other = lock.read().strip() or "?"
                raise UserError(
                    f"process {other} prepares {name} already\nwait for it, or give another NAME="
                ) from None
            # The holder before this one removes the file: its lock may be on a nameless file.
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                try:
                    yield
                finally:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        home.rmdir()
                return


@contextlib.contextmanager
def new_part(home: Path, name: str, kind: str) -> Iterator[Path]:
    """An empty folder work/<kind> to write the pair of ``name`` into, under the lock of the name.

    It is removed at the end, and with it what an incomplete ``publish`` left.

    Raises:
        UserError: see ``only_one``.
    """
    with only_one(home, name):
        part = home / "work" / kind
        shutil.rmtree(part, ignore_errors=True)
        (part / name).mkdir(parents=True)
        try:
            yield part
        finally:
            discard(part)
            if not idx_path(prefix_of(name, home.parent)).exists():
                shutil.rmtree(home / "tokenizer", ignore_errors=True)


def check_free(name: str, folder: Path) -> None:
    """Refuse a name that is in use.

    Raises:
        UserError: ``folder`` has a data set ``name``, a part of one, or its tokenizer.
    """
    home = folder / name
    parts = (idx_path(prefix_of(name, folder)), home / MANIFEST, home / "tokenizer")
    there = [path for path in parts if path.exists()]
    if not there:
        return
    try:
        manifest = read_manifest(home)
    except UserError:
        manifest = None
    if manifest is None:
        what = f"{there[0]} is there, without a manifest that says how it was made"
    else:
        what = (
            f"it has {manifest.counted.tokens:,} tokens, {manifest.origin}, tokenizer"
            f" {manifest.tokenizer.name}"
        )
    raise UserError(
        f"NAME={name} is prepared already, from other input or with other settings: {what}\n"
        "NAME=… prepares another data set; FORCE=1 replaces this one once the new one is whole"
    )


def publish(part: Path, home: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Move the finished pair from ``part`` to ``home``, where it replaces an older one.

    A process killed in between leaves no data set; the next call resumes. The .idx makes a data set
    a prepared one, so the old one goes first and the new one comes last.
    """
    old, new = prefix_of(manifest.name, part), prefix_of(manifest.name, home.parent)
    (home / MANIFEST).unlink(missing_ok=True)
    if bin_path(old).exists():
        idx_path(new).unlink(missing_ok=True)
    tokenizer.install(home / "tokenizer")
    for path in (bin_path, idx_path):
        if path(old).exists():
            path(old).replace(path(new))
    shutil.rmtree(home / "cache", ignore_errors=True)
    sync_tree(home / "tokenizer")
    manifest.write(home)


def discard(part: Path) -> None:
    """Remove ``part``, a folder in work/, and work/ itself once it is empty."""
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        part.parent.rmdir()


def tokenizer_used(tokenizer: Tokenizer, by: str) -> TokenizerUsed:
    """A manifest's record of ``tokenizer``; ``by`` is the package that made the ids."""
    return TokenizerUsed(
        type=tokenizer.kind,
        name=tokenizer.name,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        by=by,
    )


def written(prefix: Path, dtype: str, pair: Pair) -> Written:
    """A manifest's record of the finished ``pair`` at ``prefix``."""
    return Written(
        dtype=dtype,
        bin_bytes=bin_path(prefix).stat().st_size,
        bin_sha256=pair.bin_sha256,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=pair.idx_sha256,
    )
