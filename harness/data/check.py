"""Checks everything that can be checked of a prepared data set: make data-check NAME=…"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.data import indexed
from harness.data.data_sets import find
from harness.data.header import FormatError, idx_path, sha256
from harness.data.manifest import Manifest, read_manifest
from harness.data.names import DATA, prefix_of
from harness.errors import UserError, first_line


@dataclass(frozen=True)
class DataFinding:
    """The result of one check: what was checked, whether it is right, and what was found."""

    what: str
    right: bool
    seen: str


def check(
    name: str, folder: Path = DATA, watch: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[DataFinding]:
    """Check the data set ``name``, the cheap things first.

    Stops after the first finding that makes the rest unreadable.

    Args:
        watch: called with the bytes of .bin that are read, and its size.
    """
    prefix = prefix_of(name, folder)
    manifest = None
    try:
        manifest = read_manifest(folder / name)
    except UserError as error:
        yield DataFinding("manifest", False, first_line(error))
    else:
        missing = "none: not prepared by this harness, so its checksums are unknown"
        yield DataFinding("manifest", True, "is there" if manifest else missing)
    try:
        index = indexed.check_pair(prefix)
    except FormatError as error:
        yield DataFinding("index", False, str(error))
        return
    yield DataFinding("index", True, f"{_counts(index)} of {index.dtype.name}")
    if manifest:
        yield from _against_manifest(prefix, index, manifest)
    try:
        chosen = find(name, folder)
    except UserError as error:
        yield DataFinding("tokenizer", False, first_line(error))
        return
    yield DataFinding("tokenizer", True, f"{chosen.tokenizer_type}, {chosen.tokenizer_sha256[:12]}")
    yield from _tokens(prefix, index, manifest, chosen.vocab_size, watch)


def _against_manifest(
    prefix: Path, index: indexed.Index, manifest: Manifest
) -> Iterator[DataFinding]:
    seen, expected = _counts(index), _counts(manifest.counted)
    same = seen == expected
    yield DataFinding(
        "counts", same, "as in the manifest" if same else f"the manifest says {expected}"
    )
    digest = sha256(idx_path(prefix)).hexdigest()
    yield _digest(".idx checksum", digest, manifest.written.idx_sha256)


def _tokens(
    prefix: Path,
    index: indexed.Index,
    manifest: Manifest | None,
    vocab_size: int,
    watch: Callable[[int, int], None],
) -> Iterator[DataFinding]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        watch(done, index.bin_bytes)

    eod = manifest.tokenizer.eod if manifest and manifest.append_eod else None
    try:
        found = indexed.check_tokens(prefix, index, vocab_size, eod, advance)
    except FormatError as error:
        yield DataFinding("tokens", False, str(error))
        return
    seen = f"ids up to {found.highest:,} of {vocab_size:,}"
    if eod is not None:
        seen += (
            f"; every document ends with {eod}, which occurs {found.inner_ends:,} times inside"
            " documents"
        )
    yield DataFinding("tokens", True, seen)
    if manifest:
        yield _digest(".bin checksum", found.sha256, manifest.written.bin_sha256)


def _counts(counted) -> str:
    return (
        f"{counted.documents:,} documents, {counted.sequences:,} sequences, {counted.tokens:,}"
        " tokens"
    )


def _digest(what: str, found: str, expected: str) -> DataFinding:
    same = found == expected
    seen = found[:12] if same else f"{found[:12]}, the manifest says {expected[:12]}"
    return DataFinding(what, same, seen)
