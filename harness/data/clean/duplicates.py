"""Cleaning rules that compare all documents: exact duplicates, and near-duplicates by MinHash.

A shingle is a few consecutive words, or characters, of a document, without case and punctuation.
Each shingle is hashed once, into one of bands x rows bins, and each bin keeps its smallest value
(one-permutation hashing; Li, Owen, Zhang 2012). An empty bin takes the value of another bin, chosen
by its own number (Shrivastava 2017, "Optimal Densification"). Of each value 8 bits are kept (Li and
König 2010), so that a signature has bands x rows bytes. Two documents with Jaccard similarity s
agree in a bin with probability s + (1 - s) / 256. They are compared if they agree in all rows of a
band.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from harness.data.clean.documents import CleaningRule
from harness.data.clean.words import Words, characters, mix, split

_PUNCTUATION = bytes(byte for byte in range(128) if not chr(byte).isalnum())
_UPPER = bytes((*range(ord("A"), ord("Z") + 1), *range(0x80, 0xA0)))
_FOLD = bytes.maketrans(
    _PUNCTUATION + _UPPER, b" " * len(_PUNCTUATION) + bytes(byte + 0x20 for byte in _UPPER)
)
"""Maps bytes to lower case, and ASCII punctuation to spaces. In UTF-8, upper and lower case of most
Latin, Greek and Cyrillic letters differ by 0x20 in the last byte. This also merges some other
characters, which does not hurt a comparison."""
_PAIRS_AT_ONCE = 1 << 18


class ExactDuplicates(CleaningRule):
    """Drops documents that equal an earlier one."""

    key = "exact-duplicates"


class NearDuplicates(CleaningRule):
    """Drops documents whose Jaccard similarity with an earlier one is at least ``similarity``."""

    key = "near-duplicates"
    similarity: Annotated[float, Field(gt=0, le=1, strict=False)]
    shingle: Annotated[int, Field(ge=1, le=64)]
    of: Literal["words", "characters"]
    bands: Annotated[int, Field(ge=1, le=256)]
    rows: Annotated[int, Field(ge=1, le=64)]

    def signatures(self, documents: Sequence[bytes]) -> np.ndarray:
        """The MinHash signature of each document (UTF-8): [document, bands x rows], uint8."""
        bins = self.bands * self.rows
        # Each document ends with words that no text has, so that every shingle is of one document.
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
        """Estimated Jaccard similarity of each pair of ``some`` and ``others``, float32."""
        likeness = np.empty(len(some), np.float32)
        for start in range(0, len(some), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            agree = (signatures[some[part]] == signatures[others[part]]).mean(axis=1)
            likeness[part] = (256 * agree - 1) / 255
        return likeness


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """For each document the first one with its hash, or -1 if it is the first."""
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
    """For each document an earlier near-duplicate, or -1.

    In each band a document is compared only with the first and with the previous document that
    share it: the cost stays linear however many documents are alike.

    Args:
        candidates: documents to compare, ascending.
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
    """For each element, the document at the start of its run of equal keys."""
    start = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))[: len(key)])
    return np.repeat(document[start], np.diff(start, append=len(key)))


def _keys(signatures: np.ndarray, candidates: np.ndarray, rows: slice) -> np.ndarray:
    keys = np.zeros(len(candidates), np.uint64)
    for column in range(rows.start, rows.stop):
        keys = mix(keys + signatures[candidates, column])
    return keys


def _shingles(pieces: Words, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Every ``width`` consecutive pieces of one document: the document, and their hash."""
    runs = max(0, len(pieces.hash) - width + 1)
    hashes = np.zeros(runs, np.uint64)
    for i in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + pieces.hash[i : i + runs]
    inside = np.flatnonzero(pieces.document[:runs] == pieces.document[width - 1 :])
    return pieces.document[inside], mix(hashes[inside])


def _densify(values: np.ndarray, empty: np.ndarray) -> None:
    """Fill each empty bin from the first full bin in its own order of bins; each row has one."""
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
    """A different order of all bins for each bin: [attempt, bin]."""
    return np.argsort(
        mix(np.arange(1, bins * bins + 1, dtype=np.uint64)).reshape(bins, bins), axis=0
    )
