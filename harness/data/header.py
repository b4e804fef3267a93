"""Header of an .idx, checked against the sizes of both files: fast, and without numpy.

A launcher does this before every run. Module ``indexed`` describes and reads the whole format.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Upstream's code of the dtype in .bin -> bytes a token."""


class FormatError(ValueError):
    """A pair of files that is not a complete IndexedDataset; the message says why."""


@dataclass(frozen=True)
class Head:
    """Header of an .idx: upstream's dtype ``code``, and numbers of sequences and documents."""

    code: int
    sequences: int
    documents: int

    @property
    def idx_bytes(self) -> int:
        """Size that the .idx must have."""
        return HEADER.size + 12 * self.sequences + 8 * (self.documents + 1)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def sha256(path: Path) -> hashlib._Hash:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def read_head(path: Path) -> Head:
    """The header of an .idx, whose size must agree with it.

    Raises:
        FormatError: it is no .idx, or truncated, or too long.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise FormatError(
            f"{path} does not begin with {MAGIC!r}: no index" if head else f"{path} is empty"
        )
    if len(head) < HEADER.size:
        raise FormatError(
            f"{path} ends after {len(head)} bytes, within its header of {HEADER.size}"
        )
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != 1:
        raise FormatError(f"{path} is of version {version}, not 1")
    if code not in ITEM_BYTES:
        raise FormatError(f"{path} names dtype {code}; known are {', '.join(map(str, ITEM_BYTES))}")
    if not entries:
        raise FormatError(f"{path} has no document indices; there are documents + 1 of them")
    found = Head(code, sequences, entries - 1)
    if size != found.idx_bytes:
        raise FormatError(
            f"{path}: {sequences:,} sequences and {entries - 1:,} documents take {HEADER.size} + 12"
            f" x {sequences} + 8 x {entries} = {found.idx_bytes:,} bytes, the file has {size:,}:"
            f" {_too(size, found.idx_bytes)}"
        )
    return found


def check_ends(prefix: Path) -> int:
    """The number of tokens in the pair.

    The last sequence must end where .bin ends, the last document with the last sequence.

    Raises:
        FormatError: see ``read_head``; or a file is missing, or one of the ends differs.
    """
    try:
        path = idx_path(prefix)
        head = read_head(path)
        held = bin_path(prefix).stat().st_size
        with path.open("rb") as file:
            length = pointer = 0
            if head.sequences:
                length = _number(file, HEADER.size + 4 * head.sequences - 4, "<i")
                pointer = _number(file, HEADER.size + 12 * head.sequences - 8, "<q")
            last = _number(file, HEADER.size + 12 * head.sequences + 8 * head.documents, "<q")
    except OSError as error:
        raise FormatError(f"{error.filename}: {error.strerror}") from None
    expected = pointer + length * ITEM_BYTES[head.code]
    if held != expected:
        raise FormatError(
            f"{bin_path(prefix)} has {held:,} bytes, the index says {expected:,}:"
            f" {_too(held, expected)}"
        )
    if last != head.sequences:
        raise FormatError(
            f"{path}: the documents end at sequence {last:,} of {head.sequences:,}: an end is"
            " missing"
        )
    return held // ITEM_BYTES[head.code]


def _number(file, offset: int, form: str) -> int:
    file.seek(offset)
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise FormatError(f"{file.name} changed while it was read")
    return struct.unpack(form, data)[0]


def _too(held: int, expected: int) -> str:
    return "truncated" if held < expected else "too long"
