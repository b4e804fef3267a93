"""Rules that compare all documents: equal ones, and nearly equal ones by MinHash.

A document's words, or characters, without case and punctuation make shingles of a few in a row.
Each shingle is hashed once, into one of bands x rows bins; each bin keeps its smallest value
(one-permutation hashing; Li, Owen, Zhang 2012), an empty bin takes that of another one, chosen by
its own number (Shrivastava 2017, "Optimal Densification"). Of each value 8 bits are kept (Li and
König 2010), so a document costs bands x rows bytes. Two documents with Jaccard similarity s agree
in a bin with probability s + (1 - s) / 256; they are compared where they agree in all rows of a
band.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from harness.data.clean.documents import Rule
from harness.data.clean.words import Words, characters, mix, split

_PUNCTUATION = bytes(byte for byte in range(128) if not chr(byte).isalnum())
_UPPER = bytes((*range(ord("A"), ord("Z") + 1), *range(0x80, 0xA0)))
_FOLD = bytes.maketrans(
    _PUNCTUATION + _UPPER, b" " * len(_PUNCTUATION) + bytes(byte + 0x20 for byte in _UPPER)
)
"""Lower case and no ASCII punctuation, byte by byte. In UTF-8, 0x20 in the last byte tells the
cases of most Latin, Greek and Cyrillic letters apart; that it also makes some other characters
alike does no harm to a comparison."""
_PAIRS_AT_ONCE = 1 << 18


class ExactDuplicates(Rule):
    """Of equal documents the first stays."""

    key = "exact-duplicates"


class NearDuplicates(Rule):
    """A document goes where an earlier one is at least ``similarity`` like it: Jaccard of their
    sets of shingles."""

    key = "near-duplicates"
    similarity: Annotated[float, Field(gt=0, le=1, strict=False)]
    shingle: Annotated[int, Field(ge=1, le=64)]
    of: Literal["words", "characters"]
    bands: Annotated[int, Field(ge=1, le=256)]
    rows: Annotated[int, Field(ge=1, le=64)]

    def signatures(self, documents: Sequence[bytes]) -> np.ndarray:
        """The MinHash signature of each document (UTF-8): [document, bands x rows], uint8."""
        bins = self.bands * self.rows
        # So many words that no text has end each document, and the window of them alone is its last
        # shingle.
        separator = b" " + b"\1 " * self.shingle
        pieces = (split if self.of == "words" else characters)(
            [d.translate(_FOLD) for d in documents], separator
        )
        document, shingles = _shingles(pieces, self.shingle)
        bin_of = (((shingles >> np.uint64(32)) * np.uint64(bins)) >> np.uint64(32)).astype(np.int64)
        empty = np.uint32(0xFFFFFFFF)
        least = np.full(len(documents) * bins, empty, np.uint32)
        np.minimum.at(least, document * bins + bin_of, shingles.astype(np.uint32))
        least = least.reshape(len(documents), bins)
        _densify(least, least == empty)
        return least.astype(np.uint8)

    def likeness(self, signatures: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The estimated Jaccard similarity of documents with those beside them: float32."""
        likeness = np.empty(len(some), np.float32)
        for start in range(0, len(some), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            agree = (signatures[some[part]] == signatures[others[part]]).mean(axis=1)
            likeness[part] = (256 * agree - 1) / 255
        return likeness


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each document the first one with its hash, or -1 where it is the first itself."""
    order = np.argsort(hashes, kind="stable")
    first = _first_of_group(hashes[order], order)
    twin = np.empty(len(hashes), np.int64)
    twin[order] = np.where(first == order, -1, first)
    return twin


def near_duplicates(
    rule: NearDuplicates,
    signatures: np.ndarray,
    candidates: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """For each document an earlier one that is nearly equal, or -1. ``candidates`` (ascending)
    alone are compared.

    In each band a document is compared with the first and with the previous one of those that share
    it: the cost grows with the number of documents, however many are alike.
    """
    twin = np.full(len(signatures), -1, np.int64)
    for band in range(rule.bands):
        keys = _keys(signatures, candidates, slice(band * rule.rows, (band + 1) * rule.rows))
        # Sorted by key, then by document.
        order = np.sort((keys & ~np.uint64(0xFFFFFFFF)) | np.arange(len(keys), dtype=np.uint64))
        key, document = (
            order >> np.uint64(32),
            candidates[(order & np.uint64(0xFFFFFFFF)).astype(np.int64)],
        )
        first = _first_of_group(key, document)
        previous = np.where(first == document, -1, np.roll(document, 1))
        for earlier in (first, previous):
            asked = np.flatnonzero((previous >= 0) & (twin[document] < 0))
            alike = asked[
                rule.likeness(signatures, earlier[asked], document[asked]) >= rule.similarity
            ]
            twin[document[alike]] = earlier[alike]
        progress(band + 1, rule.bands)
    return twin


def _first_of_group(key: np.ndarray, document: np.ndarray) -> np.ndarray:
    """The document at the start of each run of equal keys, for each element."""
    start = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))[: len(key)])
    return np.repeat(document[start], np.diff(start, append=len(key)))


def _keys(signatures: np.ndarray, candidates: np.ndarray, rows: slice) -> np.ndarray:
    keys = np.zeros(len(candidates), np.uint64)
    for column in range(rows.start, rows.stop):
        keys = mix(keys + signatures[candidates, column])
    return keys


def _shingles(pieces: Words, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Every run of ``width`` pieces of one document: the document and the run's hash."""
    runs = max(0, len(pieces.hash) - width + 1)
    hashes = np.zeros(runs, np.uint64)
    for i in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + pieces.hash[i : i + runs]
    inside = np.flatnonzero(pieces.document[:runs] == pieces.document[width - 1 :])
    return pieces.document[inside], mix(hashes[inside])


def _densify(values: np.ndarray, empty: np.ndarray) -> None:
    """Fill each empty bin with the first full one of a sequence that is its own; each row has
    one."""
    row, column = np.nonzero(empty)
    sequences = _sequences(values.shape[1])
    for attempt in sequences:
        source = attempt[column]
        full = ~empty[row, source]
        values[row[full], column[full]] = values[row[full], source[full]]
        row, column = row[~full], column[~full]
        if not len(row):
            return


@cache
def _sequences(bins: int) -> np.ndarray:
    """For each bin all bins in an order of its own: [attempt, bin]."""
    return np.argsort(
        mix(np.arange(1, bins * bins + 1, dtype=np.uint64)).reshape(bins, bins), axis=0
    )
