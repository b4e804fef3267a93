"""An endless corpus, whose documents and defects depend only on (seed, document number)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from harness.data.synthetic.damage import SHARES, line_with, words_with
from harness.data.synthetic.language import FORMS, LANGUAGES, START, shares, stream, table

DUPLICATES = ("exact-duplicate", "near-duplicate")
MENDABLE = ("foreign-few", "nfd", "control", "mojibake")
"""Defects that cleaning can repair; documents with other defects must be dropped."""
DEFECTS = (
    *DUPLICATES,
    *MENDABLE,
    "mixed-language",
    "foreign-many",
    "too-short",
    "repeated",
    "invalid",
)

_BATCH = 512
_CHAIN = 64
_FOLLOWS, _FAVOURS = 184, 216
"""Of 256 random values, those below the first give a successor of the word before, those below the
second a favourite word of the document, and the others any word."""


@dataclass(frozen=True)
class Mixture:
    """Shares of languages, and defects per 10,000 documents of the main (first) language."""

    languages: dict[str, int]
    defects: dict[str, int] = field(default_factory=dict)

    @property
    def main(self) -> str:
        return next(iter(self.languages))


PLAIN = Mixture({"sv": 50, "en": 25, "de": 10, "code": 10, "fi": 5})
"""Several languages without defects."""
DAMAGED = Mixture(
    {"sv": 80, "en": 5, "da": 4, "nb": 4, "de": 2, "fi": 1, "ru": 2, "zh": 1, "code": 1},
    {"exact-duplicate": 400, "near-duplicate": 600, "invalid": 20}
    | dict.fromkeys(DEFECTS[2:-1], 100),
)
"""A Swedish crawl: one document in five is in another language, and one in six of the Swedish ones
is damaged or a duplicate."""
MIXTURES = {"plain": PLAIN, "damaged": DAMAGED}


@dataclass(frozen=True)
class Label:
    """The truth about a document.

    Attributes:
        source: the document that it duplicates, except for ``share`` of the words.
    """

    document: int
    language: str
    defect: str | None = None
    source: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class _Plan:
    """The nature of some documents, arrays of one length.

    Attributes:
        defect: index into DEFECTS, or -1.
        source: number of the document whose words it has.
        language: index into LANGUAGES.
    """

    defect: np.ndarray
    source: np.ndarray
    language: np.ndarray
    random: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """The documents 0, 1, 2 … of a seed and a mixture."""

    seed: int = 0
    mixture: Mixture = field(default_factory=lambda: PLAIN)

    def lines(self, first: int, last: int) -> Iterator[tuple[bytes, Label]]:
        """JSON lines and labels of the documents ``first`` … ``last - 1``."""
        return self._lines(range(first, last))

    def texts(self, documents: Sequence[int]) -> list[str]:
        """The text of some documents, with their defects.

        Raises:
            UnicodeDecodeError: one is invalid UTF-8.
        """
        return [json.loads(line)["text"] for line, _ in self._lines(documents)]

    def undamaged(self, documents: Sequence[int]) -> list[str]:
        """The text of some documents without defects; of a duplicate, its source's."""
        return [
            json.loads(b'"%s"' % body)
            for numbers in _batches(documents)
            for body in table().render(self._walk(self._plan(numbers)))
        ]

    def _lines(self, documents: Sequence[int]) -> Iterator[tuple[bytes, Label]]:
        for numbers in _batches(documents):
            plan = self._plan(numbers)
            defects = [DEFECTS[kind] if kind >= 0 else None for kind in plan.defect]
            natures = list(zip(defects, plan.language.tolist(), plan.random.tolist(), strict=True))
            words = [
                words_with(defect, words, language, random)
                for words, (defect, language, random) in zip(self._walk(plan), natures, strict=True)
            ]
            for number, source, body, (defect, language, random) in zip(
                numbers.tolist(), plan.source.tolist(), table().render(words), natures, strict=True
            ):
                share = SHARES[random % len(SHARES)] if defect == "near-duplicate" else None
                label = Label(
                    number,
                    LANGUAGES[language],
                    defect,
                    source if defect in DUPLICATES else None,
                    share,
                )
                yield line_with(defect, body, random), label

    def _plan(self, documents: np.ndarray) -> _Plan:
        plan = self._nature(documents)
        # A duplicate has the words of an earlier document in the main language without defects.
        asked = np.flatnonzero((plan.defect >= 0) & (plan.defect < len(DUPLICATES)))
        for attempt in count():
            hopeless = documents[asked] == 0 if attempt < 64 else np.full(len(asked), True)
            plan.defect[asked[hopeless]] = -1
            asked = asked[~hopeless]
            if not len(asked):
                return plan
            candidate = stream(plan.random[asked], attempt + 1)[:, attempt] % documents[asked]
            plan.source[asked] = candidate
            nature = self._nature(candidate)
            asked = asked[(nature.defect >= 0) | (nature.language != plan.language[asked])]

    def _nature(self, documents: np.ndarray) -> _Plan:
        """The plan without the sources of duplicates."""
        names = np.array([LANGUAGES.index(name) for name in self.mixture.languages])
        rates = [self.mixture.defects.get(name, 0) for name in DEFECTS]
        for_language, for_defect, random = stream(documents ^ self._salt, 3).T
        language = names[_pick(for_language, list(self.mixture.languages.values()))]
        defect = _pick(for_defect, [*rates, 10000 - sum(rates)])
        defect[(defect == len(DEFECTS)) | (language != names[0])] = -1
        return _Plan(defect, documents.copy(), language, random)

    @property
    def _salt(self) -> np.ndarray:
        return stream(np.array([self.seed], np.uint64), 1)[0]

    def _walk(self, plan: _Plan) -> list[np.ndarray]:
        """Each document as numbers of word forms.

        It has 60 words or more, 370 on average; one document in 256 has over 15,000. Chains of 64
        words are drawn at the same time; a document has as many chains as it needs.
        """
        known = table()
        length_of, favours, starts = stream(plan.source ^ ~self._salt, 3).T
        lengths = 60 * 256 // (256 - (length_of >> np.uint64(56)).astype(np.int64))
        favourites = known.draw(plan.language[:, None], stream(favours, 16))
        chains = -(-lengths // _CHAIN)
        owner = np.repeat(np.arange(len(chains)), chains)
        first = np.cumsum(chains) - chains
        language = plan.language[owner]
        seeds = starts[owner] + (np.arange(len(owner)) - first[owner]).astype(np.uint64)
        forms = np.empty((len(owner), _CHAIN), np.int32)
        word = known.draw(language, stream(seeds, 1)[:, 0])
        for step, random in enumerate(stream(seeds, _CHAIN).T):
            choice = random.astype(np.uint8)
            bits = random.view(np.int64)
            word = np.where(
                choice < _FOLLOWS,
                known.successors[word, known.skew[(bits >> 8) & 0xFF]],
                np.where(
                    choice < _FAVOURS,
                    favourites[owner, (bits >> 16) & 0xF],
                    known.draw(language, random),
                ),
            )
            forms[:, step] = word * FORMS + known.punctuation[(bits >> 20) & 0xFF]
        forms[first, 0] += START - forms[first, 0] % FORMS
        flat = forms.reshape(-1)
        return [
            flat[at : at + n]
            for at, n in zip((first * _CHAIN).tolist(), lengths.tolist(), strict=True)
        ]


def _batches(documents: Sequence[int]) -> Iterator[np.ndarray]:
    for start in range(0, len(documents), _BATCH):
        yield np.array(documents[start : start + _BATCH], np.uint64)


def _pick(random: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """Index into ``weights``, in proportion to them, for each random number."""
    return np.searchsorted(
        np.cumsum(shares(weights, 1 << 16)),
        (random >> np.uint64(48)).astype(np.int64),
        side="right",
    )
