"""Defects of crawled text, made in its words (numbers of word forms) or in its characters."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable

import numpy as np

from harness.data.synthetic.language import FORMS, LANGUAGES, WORDS, stream, table

SHARES = (0.01, 0.02, 0.04, 0.08)
"""Shares of words in which near-duplicates differ."""


def _random(seed: int, number: int) -> np.ndarray:
    return stream(np.array([seed], np.uint64), number)[0]


def _draw(language: int, number: int, seed: int) -> np.ndarray:
    return table().draw(language, _random(seed, number))


def _places(words: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Positions of ``share`` of the words, at least one."""
    number = max(1, round(share * len(words)))
    return (_random(seed ^ 1, number) % np.uint64(len(words))).astype(np.int64)


def _exchange(words: np.ndarray, where: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``words`` with ``new`` ones at ``where``, in the same form, such as after a comma."""
    words = words.copy()
    words[where] = new * FORMS + words[where] % FORMS
    return words


def _near_duplicate(words: np.ndarray, language: int, seed: int) -> np.ndarray:
    where = _places(words, SHARES[seed % len(SHARES)], seed)
    return _exchange(words, where, _draw(language, len(where), seed))


def _mixed_language(words: np.ndarray, language: int, seed: int) -> np.ndarray:
    """Translates the second half into nonsense of another language with Latin letters."""
    where = np.arange(len(words) // 2, len(words))
    other = (language + 1 + seed % 5) % LANGUAGES.index("ru")
    return _exchange(words, where, _draw(other, len(where), seed))


def _russian(words: np.ndarray, share: float, among: int, seed: int) -> np.ndarray:
    """Replaces ``share`` of the words by one of the ``among`` most frequent Russian words."""
    where = _places(words, share, seed)
    return _exchange(
        words, where, LANGUAGES.index("ru") * WORDS + _draw(0, len(where), seed) % among
    )


def _repeated(words: np.ndarray, seed: int) -> np.ndarray:
    return np.append(words[:1], np.tile(words[1:13], 20 + seed % 40))


OF_WORDS: dict[str | None, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "near-duplicate": _near_duplicate,
    "mixed-language": _mixed_language,
    "foreign-many": lambda words, language, seed: _russian(words, 0.1, WORDS, seed),
    "foreign-few": lambda words, language, seed: _russian(words, 0.002, 16, seed),
    "too-short": lambda words, language, seed: words[: 3 + seed % 6],
    "repeated": lambda words, language, seed: _repeated(words, seed),
}
"""Defect -> function of a document's words, language and random number to damaged words."""


def _control(text: str, seed: int) -> str:
    """Appends control, zero-width and direction characters to one word in five to fifteen."""
    words = text.split(" ")
    marks = "\0\b\x1f\x7f\u200b\ufeff\u00ad\u202e\u2060"
    step = 5 + seed % 10
    for i in range(0, len(words), step):
        words[i] += marks[(i + seed) % len(marks)]
    return " ".join(words)


_WINDOWS_1252 = {
    byte: bytes([byte]).decode("cp1252")
    for byte in range(0x80, 0xA0)
    if byte not in b"\x81\x8d\x8f\x90\x9d"
}


def _mojibake(text: str, seed: int) -> str:
    """UTF-8 read as Windows-1252."""
    return text.encode().decode("latin-1").translate(_WINDOWS_1252)


OF_TEXT: dict[str | None, Callable[[str, int], str]] = {
    "nfd": lambda text, seed: unicodedata.normalize("NFD", text),
    "control": _control,
    "mojibake": _mojibake,
}
"""Defect -> function of a text and a random number to a damaged text."""


def words_with(defect: str | None, words: np.ndarray, language: int, seed: int) -> np.ndarray:
    """A document's words, damaged if ``defect`` is a defect of words."""
    return OF_WORDS[defect](words, language, seed) if defect in OF_WORDS else words


def line_with(defect: str | None, body: bytes, seed: int) -> bytes:
    """A document as a JSON line, damaged if ``defect`` is a defect of characters.

    Args:
        body: the text as the inside of a JSON string.
    """
    if defect in OF_TEXT:
        text = OF_TEXT[defect](json.loads(b'"%s"' % body), seed)
        body = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    elif defect == "invalid":
        body = body[: len(body) // 2] + b"\xff\xfe" + body[len(body) // 2 :]
    return b'{"text": "%s"}\n' % body
