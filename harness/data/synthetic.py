"""Natural-looking text made on this machine: any size, several languages, planted duplicates and defects.

A document is a walk over a language's words: real words at Zipf's frequencies (the lists of the package wordfreq; its data
is CC BY-SA 4.0), each with a few preferred successors, a handful of words of the document's own, sentences and paragraphs.
So a small GPT learns it far below the entropy of single words, while language identification takes it for what it is.

Everything follows from (seed, document number) by integer arithmetic alone: the same bytes on every machine, any part
alone, and a duplicate of any earlier document at no cost.

    corpus/00000.jsonl …         one {"text": …} a line
    corpus/labels/00000.jsonl    the truth: one Label a line, for every document that is not a clean one of the main language
"""

from __future__ import annotations

import functools
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np

from harness.data.clean.files import atomic
from harness.data.clean.workers import map_in_order
from harness.errors import UserError, nearest
from harness.rundir import write_json

LANGUAGES = ("sv", "en", "de", "da", "nb", "fi", "ru", "zh", "code")
DEFECTS = (
    "exact-duplicate",
    "near-duplicate",
    "mixed-language",
    "foreign-many",
    "foreign-few",
    "nfd",
    "control",
    "mojibake",
    "too-short",
    "repeated",
    "invalid",
)
"""What is planted. ``foreign-few``, ``nfd``, ``control`` and ``mojibake`` can be mended; the others must go."""

MENDABLE = ("foreign-few", "nfd", "control", "mojibake")

DOCUMENTS_PER_SHARD = 16384
_BATCH = 1024
_WORDS = 16384
_SUCCESSORS = 16
_CHAIN = 64
_DRAWS = 18
_FORMS = 6
_MID, _COMMA, _SENTENCE, _QUESTION, _PARAGRAPH, _START = range(_FORMS)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Mixture:
    """Parts of each language, and defects per 10,000 documents of the main (the first) language."""

    languages: dict[str, int] = field(default_factory=lambda: {"sv": 1})
    defects: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for known, given, what in ((LANGUAGES, self.languages, "language"), (DEFECTS, self.defects, "defect")):
            for name, parts in given.items():
                if name not in known:
                    raise UserError(f"synthetic {what} {name!r}: {nearest(name, known)}")
                if parts < 0:
                    raise UserError(f"synthetic {what} {name}: {parts} parts; give 0 or more")
        if not sum(self.languages.values()):
            raise UserError(f"synthetic text needs a language; {nearest('', LANGUAGES)}")
        if sum(self.defects.values()) > 9000:
            raise UserError(f"{sum(self.defects.values())} defects in 10,000 documents; give 9,000 at most")

    @property
    def main(self) -> str:
        return next(iter(self.languages))


PLAIN = Mixture({"sv": 50, "en": 25, "de": 10, "code": 10, "fi": 5})
DAMAGED = Mixture(
    {"sv": 80, "en": 5, "da": 4, "nb": 4, "de": 2, "fi": 1, "ru": 2, "zh": 1, "code": 1},
    {
        "exact-duplicate": 400,
        "near-duplicate": 600,
        "mixed-language": 100,
        "foreign-many": 100,
        "foreign-few": 100,
        "nfd": 100,
        "control": 100,
        "mojibake": 100,
        "too-short": 100,
        "repeated": 100,
        "invalid": 20,
    },
)
"""A Swedish crawl: one document in five is of another language, one in six is damaged or a duplicate."""


@dataclass(frozen=True)
class Label:
    """What is true of a document. ``source``: what it duplicates; ``share``: of its words were exchanged."""

    document: int
    language: str
    defect: str | None = None
    source: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Corpus:
    """An endless sequence of documents, fixed by its seed and mixture."""

    seed: int = 0
    mixture: Mixture = PLAIN

    def lines(self, first: int, last: int) -> Iterator[tuple[bytes, Label]]:
        """JSON lines and labels of the documents ``first`` … ``last - 1``."""
        for start in range(first, last, _BATCH):
            yield from self._batch(np.arange(start, min(last, start + _BATCH), dtype=np.uint64))

    def undamaged(self, documents: Sequence[int]) -> list[str]:
        """The texts before any damage was planted (of a duplicate: its source)."""
        numbers = np.array(documents, dtype=np.uint64)
        _, source, language, _ = self._plan(numbers)
        return [json.loads(b'"%s"' % b"".join(map(_table().forms.__getitem__, words.tolist())))
                for words in self._walk(source, language)]

    def _plan(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Defect (index into DEFECTS, or -1), source, language and a random number of each document."""
        source = documents.copy()
        defect, language, random = self._nature(documents)
        # Only a clean document of the main language is duplicated, and only a later one duplicates it.
        duplicate = np.flatnonzero((defect >= 0) & (defect < 2))
        for attempt in count(1):
            if not len(duplicate):
                break
            first = documents[duplicate] == 0 if attempt < 64 else np.ones(len(duplicate), bool)
            defect[duplicate[first]] = -1
            duplicate = duplicate[~first]
            candidate = _mix(random[duplicate] + np.uint64(attempt)) % documents[duplicate]
            source[duplicate] = candidate
            other = self._nature(candidate)
            duplicate = duplicate[(other[0] >= 0) | (other[1] != language[duplicate])]
        source[defect < 0] = documents[defect < 0]
        return defect, source, language, random

    def _nature(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = _mix(_mix(documents) ^ _mix(np.uint64([self.seed]) * np.uint64(2) + np.uint64(1)))
        names = np.array([LANGUAGES.index(name) for name in self.mixture.languages])
        language = names[_pick(random & np.uint64(0xFFFF), list(self.mixture.languages.values()), 1 << 16)]
        rates = [self.mixture.defects.get(name, 0) for name in DEFECTS]
        defect = _pick((random >> np.uint64(16)) & np.uint64(0xFFFF), [*rates, 10000 - sum(rates)], 1 << 16)
        defect[(defect == len(DEFECTS)) | (language != names[0])] = -1
        return defect, language, _mix(random)

    def _lengths(self, source: np.ndarray) -> np.ndarray:
        """Words of each document: at least 60, 370 on average, one in 256 over 7,000."""
        return 60 * 256 // (256 - ((_mix(source + np.uint64(self.seed)) >> np.uint64(20)) & np.uint64(0xFF)).astype(np.int64))

    def _walk(self, source: np.ndarray, language: np.ndarray) -> list[np.ndarray]:
        """Each document as numbers of word forms. Chains of 64 words walk side by side, a document takes as many as it needs."""
        table = _table()
        lengths = self._lengths(source)
        chains = -(-lengths // _CHAIN)
        owner = np.repeat(np.arange(len(source)), chains)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(chains) - chains, chains)
        salt = _mix(np.uint64([self.seed]) + _GOLDEN)
        key = _mix((source[owner] ^ salt) + _mix(number.astype(np.uint64)))
        base = (language << _DRAWS)[owner]
        favourites = table.draws[(language[:, None] << _DRAWS) + (
            _mix((source ^ salt)[:, None] * np.uint64(16) + np.arange(16, dtype=np.uint64)) >> np.uint64(64 - _DRAWS)
        ).astype(np.int64)]
        forms = np.empty((len(owner), _CHAIN), np.int32)
        word = table.draws[base + (key >> np.uint64(64 - _DRAWS)).astype(np.int64)]
        for step in range(_CHAIN):
            key += _GOLDEN
            random = _mix(key).view(np.int64)
            choice = random & 0xFF
            successor = table.successors[word, table.skew[(random >> 8) & 0xFF]]
            favourite = favourites[owner, (random >> 16) & 0xF]
            fresh = table.draws[base + ((random >> 20) & ((1 << _DRAWS) - 1))]
            word = np.where(choice < 150, successor, np.where(choice < 190, favourite, fresh))
            forms[:, step] = word * _FORMS + table.punctuation[(random >> 40) & 0xFF]
        flat = forms.reshape(-1)
        starts = (np.cumsum(chains) - chains) * _CHAIN
        flat[starts] += _START - flat[starts] % _FORMS
        return [flat[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]

    def _batch(self, documents: np.ndarray) -> Iterator[tuple[bytes, Label]]:
        table = _table()
        defect, source, language, random = self._plan(documents)
        for words, number, kind, origin, tongue, chance in zip(
            self._walk(source, language), documents.tolist(), defect.tolist(), source.tolist(), language.tolist(),
            random.tolist(), strict=True,
        ):
            name = DEFECTS[kind] if kind >= 0 else None
            share = None
            if name in _WORD_DAMAGE:
                words, share = _WORD_DAMAGE[name](words, tongue, chance)
            body = b"".join(map(table.forms.__getitem__, words.tolist()))
            if name in _TEXT_DAMAGE:
                text = _TEXT_DAMAGE[name](json.loads(b'"%s"' % body), chance)
                body = text if isinstance(text, bytes) else json.dumps(text, ensure_ascii=False)[1:-1].encode()
            yield b'{"text": "%s"}\n' % body, Label(
                number, LANGUAGES[tongue], name, origin if origin != number else None, share
            )


def generate(
    output_dir: Path,
    size_bytes: int,
    corpus: Corpus = Corpus(),
    processes: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Path, ...]:
    """Write the first documents of ``corpus``, ``size_bytes`` or one document more, as JSONL shards with labels beside them.

    Each shard appears whole or not at all; a second call goes on where the first one was killed, to the same bytes.

    Returns:
        The shards, in order.
    Raises:
        UserError: ``output_dir`` holds another corpus, or its disk is full.
    """
    if size_bytes < 1:
        raise UserError(f"SIZE={size_bytes}: give the number of bytes to make, 1 or more")
    _table()
    recipe = {"seed": corpus.seed, "mixture": asdict(corpus.mixture), "size_bytes": size_bytes}
    (output_dir / "labels").mkdir(parents=True, exist_ok=True)
    manifest = output_dir / "synthetic.json"
    if manifest.exists() and (found := json.loads(manifest.read_text())) != recipe:
        raise UserError(f"{output_dir} holds another synthetic corpus: {found}\nremove it, or give another NAME=")
    write_json(manifest, recipe)
    shards: list[Path] = []
    done = 0
    tasks = ((corpus, output_dir, shard, size_bytes) for shard in count())
    with map_in_order(_write_shard, tasks, processes) as sizes:
        while done < size_bytes:
            shard = output_dir / f"{len(shards):05}.jsonl"
            shards.append(shard)
            size = next(sizes)
            done += size if done + size < size_bytes else _cut(shard, size_bytes - done)
            progress("synthetic", done, size_bytes)
    for ahead in set(output_dir.glob("[0-9]*.jsonl")) - set(shards):
        ahead.unlink()
        (output_dir / "labels" / ahead.name).unlink()
    return tuple(shards)


def labels(corpus_dir: Path) -> Iterator[Label]:
    """The labels of a corpus, in the order of its documents."""
    for path in sorted((corpus_dir / "labels").glob("*.jsonl")):
        yield from _read_labels(path)


def _write_shard(corpus: Corpus, output_dir: Path, shard: int, limit_bytes: int) -> int:
    """Write one shard, of ``limit_bytes`` or one document more at most, unless it is there. Returns its size in bytes."""
    path = output_dir / f"{shard:05}.jsonl"
    if path.exists():
        return path.stat().st_size
    size = 0
    truth = []
    first = shard * DOCUMENTS_PER_SHARD
    with atomic(path) as file:
        for line, label in corpus.lines(first, first + DOCUMENTS_PER_SHARD):
            size += file.write(line)
            if label.defect or label.language != corpus.mixture.main:
                truth.append(label)
            if size >= limit_bytes:
                break
        _write_labels(output_dir / "labels" / path.name, truth)
    return size


def _cut(shard: Path, size_bytes: int) -> int:
    """Cut a shard after the document that reaches ``size_bytes``. Returns its size."""
    size = 0
    last = int(shard.stem) * DOCUMENTS_PER_SHARD
    with shard.open("rb") as file:
        while size < size_bytes:
            size += len(file.readline())
            last += 1
    truth = shard.parent / "labels" / shard.name
    _write_labels(truth, [label for label in _read_labels(truth) if label.document < last])
    os.truncate(shard, size)
    return size


def _write_labels(path: Path, truth: Iterable[Label]) -> None:
    with atomic(path) as file:
        file.writelines(json.dumps(asdict(label)).encode() + b"\n" for label in truth)


def _read_labels(path: Path) -> list[Label]:
    with path.open("rb") as file:
        return [Label(**json.loads(line)) for line in file]


def _draw(language: int, number: int, random: int) -> np.ndarray:
    """Words of a language, at their frequencies."""
    draws = _stream(random, number) >> np.uint64(64 - _DRAWS)
    return _table().draws[(language << _DRAWS) + draws.astype(np.int64)]


def _some(words: np.ndarray, share: float, random: int) -> np.ndarray:
    """Positions of ``share`` of the words, one at least."""
    number = max(1, round(share * len(words)))
    return (_stream(random ^ 1 << 40, number) % np.uint64(len(words))).astype(np.int64)


def _exchange(words: np.ndarray, where: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``new`` words in the places ``where``, with the punctuation that was there."""
    words = words.copy()
    words[where] = new * _FORMS + words[where] % _FORMS
    return words


def _near_duplicate(words: np.ndarray, language: int, random: int) -> tuple[np.ndarray, float]:
    share = (0.01, 0.02, 0.04, 0.08)[random & 3]
    where = _some(words, share, random)
    return _exchange(words, where, _draw(language, len(where), random)), share


def _second_half(words: np.ndarray, language: int, random: int) -> tuple[np.ndarray, None]:
    where = np.arange(len(words) // 2, len(words))
    other = (language + 1 + random % 5) % LANGUAGES.index("ru")
    return _exchange(words, where, _draw(other, len(where), random)), None


def _foreign(share: float, script: str, among: int) -> Callable[..., tuple[np.ndarray, None]]:
    """Exchange for the ``among`` most frequent words of a language in another script."""

    def damage(words: np.ndarray, language: int, random: int) -> tuple[np.ndarray, None]:
        where = _some(words, share, random)
        return _exchange(words, where, LANGUAGES.index(script) * _WORDS + _draw(0, len(where), random) % among), None

    return damage


_WORD_DAMAGE: dict[str | None, Callable[[np.ndarray, int, int], tuple[np.ndarray, float | None]]] = {
    "near-duplicate": _near_duplicate,
    "mixed-language": _second_half,
    "foreign-many": _foreign(0.1, "ru", _WORDS),
    "foreign-few": _foreign(0.002, "ru", 16),
    "too-short": lambda words, language, random: (words[: 3 + random % 6], None),
    "repeated": lambda words, language, random: (np.append(words[:1], np.tile(words[1:13], 20 + random % 40)), None),
}


def _nfd(text: str, random: int) -> str:
    return unicodedata.normalize("NFD", text)


def _control(text: str, random: int) -> str:
    """Put control characters, zero-width characters and marks at one word in ten or so."""
    pieces = text.split(" ")
    marks = "\0\b\x1f\x7f\u200b\ufeff\u00ad\u202e\u2060"
    step = 5 + random % 10
    return " ".join(p + marks[(i + random) % len(marks)] if i % step == 0 else p for i, p in enumerate(pieces))


def _mojibake(text: str, random: int) -> str:
    """UTF-8 read as Windows-1252."""
    return text.encode().decode("latin-1").translate(_WINDOWS_1252)


_WINDOWS_1252 = {b: bytes([b]).decode("cp1252") for b in range(0x80, 0xA0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}


def _invalid(text: str, random: int) -> bytes:
    """A line that is no UTF-8."""
    raw = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    return raw[: len(raw) // 2] + b"\xff\xfe" + raw[len(raw) // 2 :]


_TEXT_DAMAGE: dict[str | None, Callable[[str, int], str | bytes]] = {
    "nfd": _nfd, "control": _control, "mojibake": _mojibake, "invalid": _invalid,
}


@dataclass(frozen=True)
class _Table:
    """All languages side by side. Word w of language l is number l * 16384 + w, its form f is number word * 6 + f.

    ``forms``: JSON-escaped UTF-8 of every form; ``draws``: 2**18 words a language, each as often as it is frequent;
    ``successors``: [word, 16]; ``skew``: 256 indices of successors, ``punctuation``: 256 forms, as often as they are likely.
    """

    forms: list[bytes]
    draws: np.ndarray
    successors: np.ndarray
    skew: np.ndarray
    punctuation: np.ndarray


@functools.cache
def _table() -> _Table:
    forms = "\0".join(
        form for language in LANGUAGES for word in _words(language) for form in _FORMS_OF.get(language, _spaced)(word)
    )
    ranks = np.repeat(np.arange(_WORDS), _shares([10**9 // (rank + 3) for rank in range(_WORDS)], 1 << _DRAWS))
    draws = (np.arange(len(LANGUAGES))[:, None] * _WORDS + ranks).astype(np.int32).reshape(-1)
    words = np.arange(len(LANGUAGES) * _WORDS)
    hashes = _mix(words.astype(np.uint64)[:, None] * np.uint64(_SUCCESSORS) + np.arange(_SUCCESSORS, dtype=np.uint64))
    successors = draws[((words // _WORDS) << _DRAWS)[:, None] + (hashes >> np.uint64(64 - _DRAWS)).astype(np.int64)]
    skew = np.repeat(np.arange(_SUCCESSORS), _shares([1000 // (rank + 1) for rank in range(_SUCCESSORS)], 256))
    punctuation = np.repeat([_MID, _COMMA, _SENTENCE, _QUESTION, _PARAGRAPH], [214, 16, 20, 2, 4])
    return _Table(forms.encode().split(b"\0"), draws, successors, skew, punctuation)


def _shares(weights: Sequence[int], total: int) -> np.ndarray:
    """``total`` divided in proportion to ``weights``, exactly."""
    bounds = np.cumsum(weights) * total // sum(weights)
    return np.diff(bounds, prepend=0)


def _pick(random: np.ndarray, weights: Sequence[int], total: int) -> np.ndarray:
    """Index into ``weights``, in proportion to them, for each random number below ``total``."""
    return np.searchsorted(np.cumsum(_shares(weights, total)), random.astype(np.int64), side="right")


def _mix(values: np.ndarray) -> np.ndarray:
    """A random function of 64-bit numbers (the finaliser of splitmix64)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _stream(random: int, number: int) -> np.ndarray:
    return _mix(np.array([random], np.uint64) + np.arange(number, dtype=np.uint64))


def _words(language: str) -> list[str]:
    """The ``_WORDS`` most frequent words of a language, letters only."""
    if language == "code":
        return _statements()
    try:
        from wordfreq import get_frequency_list
    except ImportError:
        raise UserError("synthetic text takes its words from the package wordfreq\nrun make setup") from None
    words = (unicodedata.normalize("NFC", word) for words in get_frequency_list(language, "small") for word in words)
    return list(islice((word for word in words if word.isalpha()), _WORDS))


def _spaced(word: str) -> tuple[str, ...]:
    capital = word[:1].upper() + word[1:]
    return f" {word}", f", {word}", f". {capital}", f"? {capital}", f".\\n\\n{capital}", capital


def _unspaced(word: str) -> tuple[str, ...]:
    return word, f"，{word}", f"。{word}", f"？{word}", f"。\\n\\n{word}", word


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
    return tuple(json.dumps(form, ensure_ascii=False)[1:-1] for form in forms)


_FORMS_OF = {"zh": _unspaced, "code": _block}

_NAMES = (
    "value item name path size count index data result error line text key node tree list table row column user file "
    "buffer config option model batch loss step rate state queue task worker cache token weight layer head query score"
).split()
_STATEMENTS = (
    "{a} = {b}.{c}()", "{a} = self.{b}[{c}]", "self.{a} = {b}", "return {a}", "return {a}.{b}", "{a}.append({b})",
    "for {a} in {b}:", "if {a} is None:", "if not {a}:", "{a} += {n}", "{a} = {b} + {c}", "{a} = [{b} for {b} in {c}]",
    'print(f"{a}: {{{b}}}")', 'raise ValueError(f"{a} {{{b}}} is no {c}")', "assert {a} == {n}", "# the {a} of the {b}",
    "{a} = len({b})", "with open({a}) as {b}:", "{a}, {b} = {b}, {a}", "while {a} < {n}:", "{a}.{b}({c}={n})",
    "{a} = max({b}, {c})", "yield {a}, {b}", "{a} = {{{b}: {c}}}", "continue", "try:", "except {a}Error:", "else:",
    "{a} = {b}[{n}:]", "{a} = sorted({b}, key={c})", "self.{a}({b}, {c})", "return self.{a}[{b}]",
)


def _statements() -> list[str]:
    """Lines of code, simple names first."""
    def name(number: int, salt: int) -> str:
        among = min(len(_NAMES), 4 + number // 200)
        return _NAMES[int(_stream(number * 4 + salt, 1)[0]) % among]

    return [
        _STATEMENTS[i % len(_STATEMENTS)].format(a=name(i, 0), b=name(i, 1), c=name(i, 2), n=i % 17)
        for i in range(_WORDS)
    ]
