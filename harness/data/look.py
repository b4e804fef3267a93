"""What a prepared data set holds: make data-inspect NAME=…"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data import indexed
from harness.data.data_sets import DATA, DataSet, find
from harness.data.header import FormatError, bin_path
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError

SHARES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class Lengths:
    """Tokens of documents. ``shares``: what SHARES of them do not exceed. ``bars``: by powers of
    two, how many."""

    mean: float
    longest: int
    empty: int
    shares: tuple[int, ...]
    bars: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """The beginning of a document, as its tokens spell it."""

    document: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` saw."""

    chosen: DataSet
    dtype: str
    bin_bytes: int
    lengths: Lengths
    samples: tuple[Sample, ...]


def inspect(name: str, samples: int = 3, folder: Path = DATA) -> Inspection:
    """Look into the data set ``name``.

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
        return Lengths(0.0, 0, 0, (0,) * len(SHARES), ())
    ordered = np.sort(lengths)
    shares = tuple(int(ordered[int(share * (len(ordered) - 1))]) for share in SHARES)
    powers = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    bars = tuple(
        (2**power, int(count))
        for power, count in enumerate(powers)
        if power >= np.flatnonzero(powers)[0]
    )
    return Lengths(
        float(lengths.mean()), int(ordered[-1]), int(np.count_nonzero(lengths == 0)), shares, bars
    )


def _samples(
    chosen: DataSet, index: indexed.Index, lengths: np.ndarray, count: int
) -> Iterator[Sample]:
    if not index.tokens or not count:
        return
    tokenizer = Tokenizer(
        chosen.tokenizer_type,
        "",
        chosen.tokenizer_model,
        chosen.tokenizer_sha256,
        chosen.vocab_size or 0,
        None,
    )
    tokens = np.memmap(bin_path(chosen.prefix), index.dtype, "r")
    again = f"make data-check NAME={chosen.name} says more"
    if index.dtype.kind not in "iu":
        raise UserError(
            f"NAME={chosen.name}: tokens are stored as {index.dtype.name}; ids are"
            f" integers\n{again}"
        )
    for document in np.flatnonzero(lengths)[:: max(1, np.count_nonzero(lengths) // count)][
        :count
    ].tolist():
        first = int(index.pointers[index.document_indices[document]]) // index.dtype.itemsize
        ids = tokens[first : first + min(200, lengths[document])].tolist()
        if wrong := next((i for i in ids if not 0 <= i < chosen.vocab_size), None):
            raise UserError(
                f"NAME={chosen.name}: document {document:,} has id {wrong:,}, the vocabulary is 0"
                f" to {chosen.vocab_size - 1:,}\n{again}"
            )
        yield Sample(document, int(lengths[document]), tokenizer.decode(ids))
