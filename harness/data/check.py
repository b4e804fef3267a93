"""All that can be checked of a prepared data set: make data-check NAME=…"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.data import indexed
from harness.data.data_sets import DATA, find, prefix_of
from harness.data.header import FormatError, idx_path
from harness.data.manifest import Manifest, read_manifest
from harness.errors import UserError, first_line


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, whether it is as it should be, and what was seen."""

    what: str
    right: bool
    seen: str


def check(
    name: str, folder: Path = DATA, watch: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Finding]:
    """Look at everything, the cheap first; ends with the first thing that makes the rest
    unreadable.

    Args:
        watch: told how many bytes of .bin are read, of how many.
    """
    prefix = prefix_of(name, folder)
    try:
        manifest = read_manifest(folder / name)
    except UserError as error:
        manifest = None
        yield Finding("manifest", False, first_line(error))
    else:
        yield Finding(
            "manifest",
            True,
            "is there" if manifest else "none: made elsewhere, so its checksums are unknown",
        )
    try:
        index = indexed.check_pair(prefix)
    except FormatError as error:
        yield Finding("index", False, str(error))
        return
    yield Finding(
        "index",
        True,
        f"{index.documents:,} documents, {index.sequences:,} sequences, {index.tokens:,} tokens of"
        f" {index.dtype.name}",
    )
    yield from _against_manifest(prefix, index, manifest)
    try:
        chosen = find(name, folder)
    except UserError as error:
        yield Finding("tokenizer", False, first_line(error))
        return
    yield Finding("tokenizer", True, f"{chosen.tokenizer_type}, {chosen.tokenizer_sha256[:12]}")
    yield from _tokens(prefix, index, manifest, chosen.vocab_size, watch)


def _against_manifest(
    prefix: Path, index: indexed.Index, manifest: Manifest | None
) -> Iterator[Finding]:
    if manifest is None:
        return
    counted = manifest.counted
    same = (counted.documents, counted.sequences, counted.tokens) == (
        index.documents,
        index.sequences,
        index.tokens,
    )
    expected = (
        f"{counted.documents:,} documents, {counted.sequences:,} sequences, {counted.tokens:,}"
        " tokens"
    )
    yield Finding("counts", same, "as in the manifest" if same else f"the manifest says {expected}")
    with idx_path(prefix).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    yield _digest(".idx checksum", digest, manifest.written.idx_sha256)


def _tokens(
    prefix: Path,
    index: indexed.Index,
    manifest: Manifest | None,
    vocab_size: int,
    watch: Callable[[int, int], None],
) -> Iterator[Finding]:
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        watch(done, index.bin_bytes)

    eod = manifest.tokenizer.eod if manifest and manifest.append_eod else None
    try:
        found = indexed.check_tokens(prefix, index, vocab_size, eod, advance)
    except FormatError as error:
        yield Finding("tokens", False, str(error))
        return
    ends = (
        ""
        if eod is None
        else (
            f"; every document ends with {eod}, which stands within documents {found.inner_ends:,}"
            " times"
        )
    )
    yield Finding("tokens", True, f"ids up to {found.highest:,} of {vocab_size:,}{ends}")
    if manifest:
        yield _digest(".bin checksum", found.sha256, manifest.written.bin_sha256)


def _digest(what: str, found: str, expected: str) -> Finding:
    return Finding(
        what,
        found == expected,
        found[:12] if found == expected else f"{found[:12]}, the manifest says {expected[:12]}",
    )
