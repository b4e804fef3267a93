"""Statistics and sample text of a prepared data set: make data-inspect NAME=…"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data import indexed
from harness.data.data_sets import DataSet, find
from harness.data.header import FormatError, bin_path
from harness.data.names import DATA
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError

PERCENTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens.

    Attributes:
        percentiles: at PERCENTILES.
        bars: (2**n, documents with more than 2**(n - 1) and at most 2**n tokens).
    """

    mean: float
    longest: int
    empty: int
    percentiles: tuple[int, ...]
    bars: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DocumentSample:
    """The decoded beginning of a document."""

    document: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """The result of ``inspect``."""

    chosen: DataSet
    dtype: str
    bin_bytes: int
    lengths: Lengths
    samples: tuple[DocumentSample, ...]


def inspect(name: str, samples: int = 3, folder: Path = DATA) -> Inspection:
    """Read lengths and sample documents of the data set ``name``.

    Args:
        samples: how many documents to decode, spread evenly.

    Raises:
        UserError: it is not there or damaged.
    """
    chosen = find(name, folder)
    try:
        index = indexed.check_pair(chosen.prefix)
    except FormatError as error:
        raise UserError(str(error)) from None
    lengths = index.document_tokens()
    return Inspection(
        chosen,
        index.dtype.name,
        index.bin_bytes,
        measure(lengths),
        tuple(_samples(chosen, index, lengths, samples)),
    )


def measure(lengths: np.ndarray) -> Lengths:
    """Statistics of tokens per document; ``lengths`` is (documents,) int64."""
    if not len(lengths):
        return Lengths(0.0, 0, 0, (0,) * len(PERCENTILES), ())
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    counts = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)).tolist()
    lowest = next(power for power, count in enumerate(counts) if count)
    return Lengths(
        mean=float(lengths.mean()),
        longest=int(ordered[-1]),
        empty=int(np.count_nonzero(lengths == 0)),
        percentiles=tuple(int(ordered[int(share * last)]) for share in PERCENTILES),
        bars=tuple((2**power, counts[power]) for power in range(lowest, len(counts))),
    )


def _samples(
    chosen: DataSet, index: indexed.Index, lengths: np.ndarray, count: int
) -> Iterator[DocumentSample]:
    if not index.tokens or not count:
        return
    again = f"make data-check NAME={chosen.name} says more"
    if index.dtype.kind not in "iu":
        raise UserError(
            f"NAME={chosen.name}: tokens are stored as {index.dtype.name}, not as integers\n{again}"
        )
    tokenizer = Tokenizer(
        chosen.tokenizer_type,
        "",
        chosen.tokenizer_model,
        chosen.tokenizer_sha256,
        chosen.vocab_size or 0,
        None,
    )
    tokens = np.memmap(bin_path(chosen.prefix), index.dtype, "r")
    filled = np.flatnonzero(lengths)
    for document in filled[:: max(1, len(filled) // count)][:count].tolist():
        first = int(index.pointers[index.document_indices[document]]) // index.dtype.itemsize
        ids = tokens[first : first + min(_SAMPLE_TOKENS, lengths[document])].tolist()
        if wrong := next((i for i in ids if not 0 <= i < chosen.vocab_size), None):
            raise UserError(
                f"NAME={chosen.name}: document {document:,} has id {wrong:,}, the vocabulary is 0"
                f" to {chosen.vocab_size - 1:,}\n{again}"
            )
        yield DocumentSample(document, int(lengths[document]), tokenizer.decode(ids))
