"""Folders that appear complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.system.files import replace_folder


@contextmanager
def complete_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which is renamed to ``target`` unless an error ends the block.

    ``target`` must be missing or empty, unless ``replace`` allows to replace it. What a killed
    process left is removed by the next one with the same target.
    """
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if target.exists() and not replace:
            target.rmdir()
        replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
