"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.system.files import sync_folder, sync_tree


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to ``target`` unless an error ends the block.

    ``target`` must be missing or empty.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_tree(unfinished)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
