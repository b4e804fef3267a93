"""Splits many documents into words at once, and hashes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_SPACE = ord(" ")


@dataclass(frozen=True)
class Words:
    """Words: runs of bytes that are not spaces, ``text[start:end]``.

    Attributes:
        hash: (words,) uint64.
        document: (words,) the number of the document.
    """

    text: np.ndarray
    start: np.ndarray
    end: np.ndarray
    hash: np.ndarray
    document: np.ndarray


def split(documents: Sequence[bytes], separator: bytes = b" ") -> Words:
    """The words of each document, followed by those of the ``separator``.

    The separator must begin and end with a space.
    """
    text = np.frombuffer(separator.join([*documents, b""]), np.uint8)
    inside = np.concatenate(([False], text != _SPACE, [False]))
    bounds = np.flatnonzero(inside[1:] != inside[:-1])
    start, end = bounds[::2], bounds[1::2]
    return Words(
        text, start, end, hash_spans(text, start, end), _document_of(start, documents, separator)
    )


def characters(documents: Sequence[bytes], separator: bytes = b" ") -> Words:
    """As ``split``, with each UTF-8 character except the space as a word."""
    text = np.frombuffer(separator.join([*documents, b""]), np.uint8)
    bounds = np.append(np.flatnonzero((text & 0xC0) != 0x80), len(text))
    letters = np.flatnonzero(text[bounds[:-1]] != _SPACE)
    start, end = bounds[:-1][letters], bounds[1:][letters]
    return Words(
        text, start, end, hash_spans(text, start, end), _document_of(start, documents, separator)
    )


def _document_of(start: np.ndarray, documents: Sequence[bytes], separator: bytes) -> np.ndarray:
    ends = np.cumsum([0, *(len(document) + len(separator) for document in documents)])
    return np.repeat(np.arange(len(documents)), np.diff(np.searchsorted(start, ends)))


def hash_spans(text: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each ``text[start:end]``: the sum of text[start + i] * BASE**i, mixed.

    One pass computes the sums of all prefixes. A span's is the difference of two, divided by
    BASE**start.
    """
    up, down = _powers(len(text) + 1)
    prefixes = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(text * up[: len(text)], out=prefixes[1:])
    return mix((prefixes[end] - prefixes[start]) * down[start])


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers after which every bit depends on all (MurmurHash3's
    finaliser)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


_cache = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _powers(number: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE**i and BASE**-i modulo 2**64 for the first i, at least ``number`` of them."""
    global _cache
    if len(_cache[0]) < number:
        factors = np.full((2, 1 << number.bit_length()), [[_BASE], [_INVERSE]], np.uint64)
        factors[:, 0] = 1
        _cache = tuple(np.multiply.accumulate(factors, axis=1))
    return _cache
