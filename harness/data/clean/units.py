"""Units of work: parts of JSON Lines files, each from the beginning of a line to the end of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

UNIT_BYTES = 32 << 20
LONGEST_LINE_BYTES = 256 << 20


@dataclass(frozen=True)
class Unit:
    """The lines of ``path`` whose first byte lies in ``start`` … ``end - 1``."""

    number: int
    path: Path
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.number:05}"

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line that is not blank, with the offset of its first byte.

        Of a line above LONGEST_LINE_BYTES only the beginning.
        """
        with self.path.open("rb") as file:
            offset = self.start
            if offset:
                file.seek(offset - 1)
                offset += _skip_line(file, self.end) - 1
            while offset < self.end and (line := file.readline(LONGEST_LINE_BYTES + 1)):
                at = offset
                offset += len(line)
                if len(line) > LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                    offset += _skip_line(file, self.end)
                if not line.isspace():
                    yield at, line


def _skip_line(file, end: int) -> int:
    """Read past the next line break, or to about ``end`` if there is none; returns bytes read."""
    read = 0
    while piece := file.readline(1 << 20):
        read += len(piece)
        if piece.endswith(b"\n") or file.tell() >= end:
            break
    return read


def cut(paths: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> tuple[Unit, ...]:
    """All lines of ``paths``, in order, in units of at most ``unit_bytes``."""
    spans = [
        (path, start, min(start + unit_bytes, size))
        for path in paths
        for size in [path.stat().st_size]
        for start in range(0, size, unit_bytes)
    ]
    return tuple(Unit(number, *span) for number, span in enumerate(spans))
