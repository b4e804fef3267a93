"""The languages of synthetic text: words, their successors, and how they are written."""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from harness.data.clean.words import mix
from harness.errors import UserError
from harness.system import yaml_files

LANGUAGES = ("sv", "en", "de", "da", "nb", "fi", "ru", "zh", "code")
WORDS = 16384
"""Words of each language."""
FORMS = 6
MID, COMMA, SENTENCE, QUESTION, PARAGRAPH, START = range(FORMS)
"""Forms of a word: inside a sentence, after a comma, at the start of a sentence, after a question,
at the start of a paragraph, of a document."""

_SUCCESSORS = 16
_DRAW_BITS = 18
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Table:
    """All languages: word w of language l is number l x WORDS + w, its form f word x FORMS + f.

    Attributes:
        text: every form as JSON-escaped UTF-8, form f at ``starts[f]`` … ``starts[f + 1]``.
        draws: 2**18 words a language, each as often as it is frequent.
        successors: [word, 16].
        skew: 256 indices of successors, each as often as it is likely.
        punctuation: 256 forms, each as often as it is likely.
    """

    text: np.ndarray
    starts: np.ndarray
    draws: np.ndarray
    successors: np.ndarray
    skew: np.ndarray
    punctuation: np.ndarray

    def draw(self, language: np.ndarray | int, random: np.ndarray) -> np.ndarray:
        """A word of ``language`` for each 64-bit random number."""
        return self.draws[
            (language << _DRAW_BITS) + (random >> np.uint64(64 - _DRAW_BITS)).astype(np.int64)
        ]

    def render(self, documents: Sequence[np.ndarray]) -> list[bytes]:
        """Documents, given as numbers of forms, as insides of JSON strings."""
        forms = np.concatenate(documents)
        lengths = self.starts[forms + 1] - self.starts[forms]
        ends = np.cumsum(lengths, dtype=np.int32)
        index = np.repeat(self.starts[forms] - ends + lengths, lengths)
        index += np.arange(len(index), dtype=index.dtype)
        text = self.text.take(index).tobytes()
        bounds = ends[np.cumsum([len(document) for document in documents]) - 1].tolist()
        return [text[start:end] for start, end in pairwise([0, *bounds])]


@functools.cache
def table() -> Table:
    """All languages in one table. A word of rank r (from 0) has a frequency ~ 1 / (r + 3)."""
    forms = [
        form
        for name in LANGUAGES
        for word in _words(name)
        for form in _WRITTEN.get(name, _spaced)(word)
    ]
    text = np.frombuffer("".join(forms).encode(), np.uint8)
    starts = np.cumsum([0, *(len(form.encode()) for form in forms)], dtype=np.int32)
    ranks = np.repeat(
        np.arange(WORDS), shares([10**9 // (rank + 3) for rank in range(WORDS)], 1 << _DRAW_BITS)
    )
    draws = (np.arange(len(LANGUAGES))[:, None] * WORDS + ranks).astype(np.int32).reshape(-1)
    skew = np.repeat(
        np.arange(_SUCCESSORS), shares([1000 // (rank + 1) for rank in range(_SUCCESSORS)], 256)
    )
    punctuation = np.repeat([MID, COMMA, SENTENCE, QUESTION, PARAGRAPH], [214, 16, 20, 2, 4])
    known = Table(text, starts, draws, np.empty(0), skew, punctuation)
    words = np.arange(len(LANGUAGES) * WORDS)
    random = stream(words.astype(np.uint64) << np.uint64(8), _SUCCESSORS)
    return replace(known, successors=known.draw((words // WORDS)[:, None], random))


def stream(seed: np.ndarray, number: int) -> np.ndarray:
    """The first ``number`` random 64-bit numbers of each seed: [seed, number]."""
    return mix(mix(seed + _GOLDEN)[:, None] + np.arange(1, number + 1, dtype=np.uint64) * _GOLDEN)


def shares(weights: Sequence[int], total: int) -> np.ndarray:
    """``total`` divided in proportion to ``weights``, as integers."""
    return np.diff(np.cumsum(weights) * total // sum(weights), prepend=0)


def _words(language: str) -> list[str]:
    """The ``WORDS`` most frequent words of a language that have only letters."""
    if language == "code":
        return _statements()
    try:
        from wordfreq import get_frequency_list
    except ImportError:
        raise UserError(
            "synthetic text takes its words from the package wordfreq\nrun make setup"
        ) from None
    by_rank = chain.from_iterable(get_frequency_list(language, "small"))
    words = (unicodedata.normalize("NFC", word) for word in by_rank)
    return list(islice(filter(str.isalpha, words), WORDS))


def _spaced(word: str) -> tuple[str, ...]:
    capital = word[:1].upper() + word[1:]
    return f" {word}", f", {word}", f". {capital}", f"? {capital}", f".\\n\\n{capital}", capital


def _unspaced(word: str) -> tuple[str, ...]:
    comma, stop, question = "\uff0c", "\u3002", "\uff1f"
    return word, f"{comma}{word}", f"{stop}{word}", f"{question}{word}", f"{stop}\\n\\n{word}", word


def _block(statement: str) -> tuple[str, ...]:
    name = "".join(filter(str.isalpha, statement))[:12].lower()
    forms = (
        f"\n    {statement}",
        f"\n        {statement}",
        f"\n\n\ndef {name}(self, value):\n    {statement}",
        f"\n    if {name}:\n        {statement}",
        f"\n\n\nclass {name.title()}:\n    def __init__(self):\n        {statement}",
        f"import {name}\n\n\ndef main():\n    {statement}",
    )
    return tuple(json.dumps(form)[1:-1] for form in forms)


_WRITTEN = {"zh": _unspaced, "code": _block}


def _statements() -> list[str]:
    """Lines of code, those with the most common names first."""
    code = yaml_files.read(Path(__file__).with_name("code.yaml"))
    names, statements = code["names"].split(), code["statements"]
    among = np.minimum(len(names), 4 + np.arange(WORDS) // 200).astype(np.uint64)
    chosen = stream(np.arange(WORDS, dtype=np.uint64), 3) % among[:, None]
    return [
        statements[i % len(statements)].format(a=names[a], b=names[b], c=names[c], n=i % 17)
        for i, (a, b, c) in enumerate(chosen.tolist())
    ]
