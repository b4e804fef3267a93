"""Reads, checks and writes Megatron's IndexedDataset: a ``.bin`` of token ids with an ``.idx``.

    .idx   magic "MMIDIDX\\0\\0", version 1 (uint64), dtype code (uint8),
           n = number of sequences (uint64), number of documents + 1 (uint64),
           n lengths (int32, tokens), n pointers (int64, bytes into .bin),
           documents + 1 indices (int64): document i has the sequences from indices[i] to
           indices[i + 1] - 1; the first index is 0, the last n
    .bin   the token ids of all sequences, one after another

All little-endian. Source: megatron/core/datasets/indexed_dataset.py of core_v0.19.0, whose builder
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness.data.header import (
    HEADER,
    MAGIC,
    FormatError,
    bin_path,
    check_ends,
    idx_path,
    read_head,
    sha256,
)
from harness.system.files import sync_folder

DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Upstream's code in the header -> dtype of .bin."""

_BLOCK = 1 << 20
"""Entries of an index that are in memory at once."""


def best_dtype(vocab_size: int | None) -> np.dtype:
    """The dtype of ids below ``vocab_size``: uint16 below 65500, else int32.

    Source: upstream's DType.optimal_dtype.
    """
    return DTYPES[8] if vocab_size is not None and vocab_size < 65500 else DTYPES[4]


@dataclass(frozen=True)
class Index:
    """A validated .idx; the arrays are views of the file on the disk.

    Attributes:
        lengths: (sequences,) int32, in tokens.
        pointers: (sequences,) int64, first byte in .bin.
        document_indices: (documents + 1,) int64, first sequence of each document.
    """

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray
    tokens: int

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def bin_bytes(self) -> int:
        """Size that the .bin must have."""
        return self.tokens * self.dtype.itemsize

    def document_tokens(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(
            np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))[self.document_indices]
        )


def check_pair(prefix: Path) -> Index:
    """The index ``prefix``.idx, checked completely. Reads no token.

    Raises:
        FormatError: see ``check_ends``; or lengths, pointers and documents contradict each other.
    """
    check_ends(prefix)
    path = idx_path(prefix)
    head = read_head(path)
    sequences = head.sequences
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    if raw.size != head.idx_bytes:
        raise FormatError(f"{path} changed while it was read")
    at = HEADER.size
    lengths = raw[at : at + 4 * sequences].view("<i4")
    at += 4 * sequences
    pointers = raw[at : at + 8 * sequences].view("<i8")
    document_indices = raw[at + 8 * sequences :].view("<i8")
    dtype = DTYPES[head.code]
    tokens = _check_sequences(path, lengths, pointers, dtype.itemsize)
    _check_documents(path, document_indices)
    return Index(dtype, lengths, pointers, document_indices, tokens)


@dataclass(frozen=True)
class Tokens:
    """The result of reading a whole .bin.

    Attributes:
        highest: the largest id.
        inner_ends: end-of-document tokens inside documents, whose text contains them.
    """

    highest: int
    inner_ends: int
    sha256: str


def check_tokens(
    prefix: Path,
    index: Index,
    vocab_size: int,
    eod: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Tokens:
    """Read every token of ``prefix``.bin.

    Args:
        vocab_size: ids must be below it.
        eod: the token that each document with tokens must end with; None: any.
        advance: called with the size of each block in bytes.

    Raises:
        FormatError: an id is outside the vocabulary, or a document does not end with ``eod``; the
            message names the first.
    """
    if index.dtype.kind not in "iu":
        raise FormatError(
            f"{idx_path(prefix)}: tokens are stored as {index.dtype.name}, not as integers"
        )
    sha = hashlib.sha256()
    highest, seen, ends, inner = -1, 0, _document_ends(index), 0
    pending = next(ends, None)
    with bin_path(prefix).open("rb") as file:
        while block := file.read(_BLOCK * index.dtype.itemsize):
            sha.update(block)
            ids = np.frombuffer(block, index.dtype, len(block) // index.dtype.itemsize)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                document, token = _place(index, seen + at)
                raise FormatError(
                    f"{bin_path(prefix)}: document {document:,} has id {ids[at]} as its token"
                    f" {token:,}; the vocabulary is 0 to {vocab_size - 1}"
                )
            highest = max(highest, high)
            if eod is not None:
                inner += int(np.count_nonzero(ids == eod))
                while pending is not None and len(pending):
                    here = pending[: np.searchsorted(pending, seen + len(ids))]
                    wrong = np.flatnonzero(ids[here - seen] != eod)
                    if len(wrong):
                        document, _ = _place(index, int(here[wrong[0]]))
                        raise FormatError(
                            f"{bin_path(prefix)}: document {document:,} ends with id"
                            f" {ids[here[wrong[0]] - seen]}, not with end-of-document {eod}"
                        )
                    inner -= len(here)
                    pending = pending[len(here) :]
                    if len(pending):
                        break
                    pending = next(ends, None)
            seen += len(ids)
            advance(len(block))
    if seen != index.tokens:
        raise FormatError(f"{bin_path(prefix)} changed while it was read")
    return Tokens(highest, inner, sha.hexdigest())


class PairWriter:
    """Writes a pair of any size in little memory; an interrupted one can be resumed.

    ``.bin.part``, ``.lengths.part`` and ``.documents.part`` grow; ``finish`` turns them into
    ``.bin`` and ``.idx``. Until then there is no pair.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, resume: Marks | None = None) -> None:
        """Start a pair, or continue one whose ``marks`` were ``resume``.

        Raises:
            FormatError: the parts are shorter than ``resume`` says.
        """
        self.prefix, self.dtype = prefix, dtype
        self.marks = resume or Marks(0, 0, 0)
        """The current size of the parts."""
        sizes = (
            self.marks.tokens * dtype.itemsize,
            4 * self.marks.sequences,
            8 * self.marks.documents,
        )
        self._files = [
            _open_part(path, size) for path, size in zip(self._parts(), sizes, strict=True)
        ]
        self._sha = sha256(self._parts()[0])

    def append(self, ids: np.ndarray, lengths: np.ndarray, document_ends: np.ndarray) -> None:
        """Add documents.

        Args:
            ids: (tokens,) of any integer dtype; must fit ``dtype``.
            lengths: (sequences,) tokens of each sequence; their sum is ``len(ids)``.
            document_ends: (documents,) cumulative number of these sequences at the end of each
                document; a document may have none.
        """
        block = np.ascontiguousarray(ids, self.dtype).view(np.uint8).data
        self._sha.update(block)
        _write(self._files[0], block)
        _write(self._files[1], np.ascontiguousarray(lengths, "<i4").view(np.uint8).data)
        _write(
            self._files[2],
            np.add(document_ends, self.marks.sequences, dtype="<i8").view(np.uint8).data,
        )
        self._count(len(ids), len(lengths), len(document_ends))

    def append_pair(self, prefix: Path) -> str:
        """Append another pair, as upstream's add_index; returns the SHA-256 of its .bin.

        Raises:
            FormatError: it is damaged or of another dtype.
        """
        index = check_pair(prefix)
        if index.dtype != self.dtype:
            raise FormatError(
                f"{idx_path(prefix)} stores {index.dtype.name}, {self.prefix.name}"
                f" {self.dtype.name}: they do not merge"
            )
        base, sha = self.marks.sequences, hashlib.sha256()
        with bin_path(prefix).open("rb") as file:
            while block := file.read(_BLOCK * 8):
                sha.update(block)
                self._sha.update(block)
                _write(self._files[0], block)
        for block in _blocks(index.lengths):
            _write(self._files[1], block.tobytes())
        for block in _blocks(index.document_indices[1:]):
            _write(self._files[2], (block + base).astype("<i8").tobytes())
        self._count(index.tokens, index.sequences, index.documents)
        return sha.hexdigest()

    def _count(self, tokens: int, sequences: int, documents: int) -> None:
        before = self.marks
        self.marks = Marks(
            before.tokens + tokens, before.sequences + sequences, before.documents + documents
        )

    def sync(self) -> None:
        """Return once everything that was appended is on the disk."""
        for file in self._files:
            os.fdatasync(file.fileno())

    def finish(self) -> Pair:
        """Write the index and rename both files, the .idx last, over an older pair."""
        self.close(sync=True)
        part = self.prefix.with_name(self.prefix.name + ".idx.part")
        with part.open("wb") as file:
            sha = _write_index(file, self.dtype, self._parts()[1], self._parts()[2], self.marks)
            file.flush()
            os.fsync(file.fileno())
        idx_path(self.prefix).unlink(missing_ok=True)
        self._parts()[0].replace(bin_path(self.prefix))
        part.replace(idx_path(self.prefix))
        sync_folder(self.prefix.parent)
        for leftover in self._parts()[1:]:
            leftover.unlink()
        return Pair(self.marks, self._sha.hexdigest(), sha)

    def close(self, sync: bool = False) -> None:
        """Close the parts, which remain for a later run."""
        if sync and self._files:
            self.sync()
        for file in self._files:
            file.close()
        self._files = []

    def discard(self) -> None:
        """Close the parts and remove them."""
        self.close()
        for path in self._parts():
            path.unlink(missing_ok=True)

    def _parts(self) -> tuple[Path, Path, Path]:
        name = self.prefix.name
        return tuple(
            self.prefix.with_name(f"{name}.{kind}.part") for kind in ("bin", "lengths", "documents")
        )


@dataclass(frozen=True)
class Marks:
    """Numbers of tokens, sequences and documents in a pair or its parts."""

    tokens: int
    sequences: int
    documents: int


@dataclass(frozen=True)
class Pair:
    """A finished pair: its size and the checksums of its files."""

    marks: Marks
    bin_sha256: str
    idx_sha256: str


def merge(prefixes: Sequence[Path], prefix: Path, bin_sha256: Sequence[str] = ()) -> Pair:
    """Join pairs, in order, into ``prefix``.bin and .idx, in little memory.

    Args:
        bin_sha256: expected checksums of the .bin files; by default they are not checked.

    Raises:
        FormatError: one of them is damaged, their dtypes differ, or a checksum is wrong.
    """
    writer = PairWriter(prefix, DTYPES[read_head(idx_path(prefixes[0])).code])
    try:
        for number, each in enumerate(prefixes):
            found = writer.append_pair(each)
            if bin_sha256 and found != bin_sha256[number]:
                raise FormatError(f"{bin_path(each)} changed since it was prepared")
        return writer.finish()
    finally:
        writer.close()


def _write_index(
    file: BinaryIO, dtype: np.dtype, lengths: Path, documents: Path, marks: Marks
) -> str:
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sha = hashlib.sha256()

    def put(block: bytes) -> None:
        sha.update(block)
        _write(file, block)

    put(HEADER.pack(MAGIC, 1, code, marks.sequences, marks.documents + 1))
    for block in _file_blocks(lengths):
        put(block)
    at = 0
    for block in _file_blocks(lengths):
        ends = at + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * dtype.itemsize
        put(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes())
        at = int(ends[-1])
    put(struct.pack("<q", 0))
    for block in _file_blocks(documents):
        put(block)
    return sha.hexdigest()


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    tokens = 0
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK]
        if block.min() < 0:
            at = start + int(np.argmax(block < 0))
            raise FormatError(f"{path}: sequence {at:,} has length {lengths[at]}")
        ends = tokens + np.cumsum(block, dtype=np.int64)
        wrong = pointers[start : start + _BLOCK] != np.concatenate(([tokens], ends[:-1])) * itemsize
        if wrong.any():
            at = start + int(np.argmax(wrong))
            raise FormatError(
                f"{path}: sequence {at:,} points to byte {pointers[at]:,}; the lengths before it"
                " add up to another"
            )
        tokens = int(ends[-1])
    return tokens


def _check_documents(path: Path, document_indices: np.ndarray) -> None:
    if document_indices[0] != 0:
        raise FormatError(
            f"{path}: the first document begins at sequence {document_indices[0]:,}, not 0"
        )
    for start in range(0, len(document_indices) - 1, _BLOCK):
        block = document_indices[start : start + _BLOCK + 1]
        step = np.flatnonzero(block[:-1] > block[1:])
        if len(step):
            raise FormatError(f"{path}: document {start + int(step[0]):,} ends before it begins")


def _document_ends(index: Index) -> Iterator[np.ndarray]:
    """Positions in .bin of the last token of each document with tokens, ascending, in blocks."""
    for start in range(0, index.documents, _BLOCK):
        ends = index.document_indices[start : start + _BLOCK + 1]
        if ends[-1] == ends[0]:
            continue
        lengths = np.cumsum(index.lengths[ends[0] : ends[-1]], dtype=np.int64)
        lengths = np.concatenate(([0], lengths)) + index.pointers[ends[0]] // index.dtype.itemsize
        first, last = lengths[ends[:-1] - ends[0]], lengths[ends[1:] - ends[0]]
        if (last > first).any():
            yield last[last > first] - 1


def _place(index: Index, token: int) -> tuple[int, int]:
    """Document, and position in it, of a token of .bin."""
    sequence = int(np.searchsorted(index.pointers, token * index.dtype.itemsize, "right")) - 1
    document = int(np.searchsorted(index.document_indices, sequence, "right")) - 1
    first = int(index.pointers[index.document_indices[document]]) // index.dtype.itemsize
    return document, token - first


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))


def _file_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(8 * _BLOCK):
            yield block


def _open_part(path: Path, size: int) -> BinaryIO:
    file = path.open("r+b" if size else "wb", buffering=0)
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        raise FormatError(f"{path} has fewer than the {size:,} bytes that were written before")
    file.truncate(size)
    file.seek(size)
    return file


def _write(file: BinaryIO, block: bytes | memoryview) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]
