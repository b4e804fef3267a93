"""Statistics and sample text of a prepared data set: make data-inspect NAME=…"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from harness.data import indexed
from harness.data.data_sets import DataSet, find
from harness.data.header import FormatError, bin_path
from harness.data.manifest import read_manifest
from harness.data.names import DATA
from harness.data.progress import amount
from harness.data.tokenizer import tokenizer_of
from harness.errors import UserError

PERCENTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_SAMPLE_TOKENS = 200


def inspect(name: str, samples: int = 3, folder: Path = DATA) -> list[str]:
    """Lines about the data set ``name``: its size, source, lengths and sample documents.

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
    manifest = read_manifest(chosen.home)
    lengths = index.document_tokens()
    return [
        f"{chosen.name}: {chosen.documents:,} documents, {chosen.tokens:,} tokens",
        f"  {amount(index.bin_bytes)} of {index.dtype.name}, {chosen.tokenizer_type} of"
        f" {chosen.vocab_size} ids",
        *(manifest.lines() if manifest else ()),
        *length_lines(lengths),
        *_samples(chosen, index, lengths, samples),
    ]


def length_lines(lengths: np.ndarray) -> list[str]:
    """Statistics and a histogram of tokens per document; ``lengths`` is (documents,) int64."""
    if not len(lengths):
        return []
    ordered = np.sort(lengths)
    shares = ((share, ordered[int(share * (len(ordered) - 1))]) for share in PERCENTILES)
    counts = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)).tolist()
    first, most = np.flatnonzero(counts)[0], max(counts)
    return [
        f"\ntokens per document: mean {lengths.mean():,.1f}, longest {ordered[-1]:,}, none in"
        f" {np.count_nonzero(lengths == 0):,}",
        "  " + ", ".join(f"{share:.0%} up to {tokens:,}" for share, tokens in shares),
        *(
            f"  {f'up to {2**power:,}':>16} {count:>12,} {'#' * -(-40 * count // most)}"
            for power, count in enumerate(counts)
            if power >= first
        ),
    ]


def _samples(
    chosen: DataSet, index: indexed.Index, lengths: np.ndarray, count: int
) -> Iterator[str]:
    """The decoded beginnings of ``count`` documents."""
    if not index.tokens or not count:
        return
    again = f"make data-check NAME={chosen.name} says more"
    if index.dtype.kind not in "iu":
        raise UserError(
            f"NAME={chosen.name}: tokens are stored as {index.dtype.name}, not as integers\n{again}"
        )
    tokenizer = tokenizer_of(chosen)
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
        text = " ".join(tokenizer.decode(ids).split())
        shown = text[:400] + " …" * (len(text) > 400)
        yield f"\ndocument {document:,}, {lengths[document]:,} tokens:\n  {shown}"
