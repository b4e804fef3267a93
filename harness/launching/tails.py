"""New lines of files that other processes append to."""

from __future__ import annotations

import os
from pathlib import Path

LOG_TAIL_BYTES = 64 * 2**20
"""Errors are looked for in so much of the end of a log."""


class Tail:
    """A file that grows while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        self._unfinished = b""

    def lines(self) -> list[str]:
        """Whole lines since the last call; none where there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read_bytes += len(new)
        *lines, self._unfinished = (self._unfinished + new).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def text(self) -> str:
        """The last ``LOG_TAIL_BYTES`` of the file; nothing where there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES, 0))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
