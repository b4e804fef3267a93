"""Precision and recall of each cleaning rule, on a synthetic corpus whose defects are known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from harness.data.clean.documents import OneLine
from harness.data.clean.pipeline import CleanReport, clean
from harness.data.clean.rules import Rules
from harness.data.synthetic.corpus import DAMAGED, MENDABLE, Corpus, Label
from harness.data.synthetic.files import generate

KEPT = "kept"
RIGHT = {
    "unreadable": {"invalid"},
    "length": {"too-short", "wrong language"},
    "repetition": {"repeated"},
    "language": {"wrong language", "mixed-language", "foreign-many"},
    "alphabet": {"wrong language", "foreign-many"},
    "exact-duplicates": {"exact-duplicate", "near-duplicate"},
    "near-duplicates": {"near-duplicate", "exact-duplicate"},
}
"""Defects for which a rule may drop a document; dropping any other document is an error."""

_CORPUS = Corpus(1, DAMAGED)
_PAIRS = 2000
_BINS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)


@dataclass(frozen=True)
class RuleScore:
    """``rightly`` of the ``dropped`` documents had one of the rule's defects."""

    rule: str
    dropped: int
    rightly: int

    @property
    def precision(self) -> float | None:
        return self.rightly / self.dropped if self.dropped else None


@dataclass(frozen=True)
class DefectScore:
    """``treated`` of the ``planted`` defects were dropped, or repaired to the original text.

    Attributes:
        by: rule -> number of documents that it dropped.
    """

    defect: str
    planted: int
    treated: int
    by: dict[str, int]

    @property
    def recall(self) -> float | None:
        return self.treated / self.planted if self.planted else None


@dataclass(frozen=True)
class SimilarityScore:
    """``dropped`` of the ``pairs`` of near-duplicates with Jaccard similarity ``least`` … ``most``."""

    least: float
    most: float
    pairs: int
    dropped: int


@dataclass(frozen=True)
class Measurement:
    """The result of cleaning a corpus with known defects."""

    corpus: dict[str, Any]
    report: CleanReport
    clean_documents: int
    clean_dropped: int
    rules: tuple[RuleScore, ...]
    defects: tuple[DefectScore, ...]
    near_duplicates: tuple[SimilarityScore, ...]


def measure(
    folder: Path,
    size_bytes: int,
    rules: Rules,
    corpus: Corpus = _CORPUS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    processes: int | None = None,
) -> Measurement:
    """Generate a corpus in ``folder``/in, clean it into ``folder``/out, and compare with its labels."""
    inputs = generate(folder / "in", size_bytes, corpus, processes, progress)
    report = clean(inputs, folder / "out", rules, progress, processes)
    decisions = np.load(folder / "out" / "decisions.npy")
    truth = {label.document: label for _, label in corpus.lines(0, len(decisions))}
    names = (KEPT, *report.dropped)

    dropped: dict[str, Counter[str]] = {}
    for document, decision in enumerate(decisions.tolist()):
        defect = _defect(truth[document], corpus.mixture.main)
        dropped.setdefault(defect, Counter())[names[decision]] += 1
    mended = _mended(inputs, folder / "out", report, decisions, truth, corpus)
    sound = dropped.pop("")
    return Measurement(
        corpus={"seed": corpus.seed, "mixture": asdict(corpus.mixture), "bytes": report.bytes_in},
        report=report,
        clean_documents=sound.total(),
        clean_dropped=sound.total() - sound[KEPT],
        rules=tuple(
            RuleScore(
                rule, report.dropped[rule], sum(dropped[d][rule] for d in right if d in dropped)
            )
            for rule, right in RIGHT.items()
            if rule in report.dropped
        ),
        defects=tuple(
            DefectScore(
                defect,
                by.total(),
                mended[defect] if defect in MENDABLE else by.total() - by[KEPT],
                {rule: number for rule, number in by.most_common() if rule != KEPT},
            )
            for defect, by in sorted(dropped.items())
        ),
        near_duplicates=tuple(_by_similarity(rules, decisions, names, truth, corpus)),
    )


def _defect(label: Label, main: str) -> str:
    """The defect of a document, "wrong language", or "" where it is sound."""
    return label.defect or ("wrong language" if label.language != main else "")


def _mended(
    inputs: Sequence[Path],
    output_dir: Path,
    report: CleanReport,
    decisions: np.ndarray,
    truth: dict[int, Label],
    corpus: Corpus,
) -> Counter[str]:
    """Number of kept documents with the right text, by repairable defect."""
    kept = dict(
        zip(
            np.flatnonzero(decisions == 0).tolist(),
            _texts(output_dir / s.name for s in report.shards),
            strict=True,
        )
    )
    wanted = [number for number in kept if truth[number].defect in MENDABLE]
    before = dict(zip(wanted, corpus.undamaged(wanted), strict=True))
    mended: Counter[str] = Counter()
    for number, text in enumerate(_texts(inputs)):
        if number in before:
            defect = truth[number].defect
            # The foreign words themselves are to go, no more.
            expected = (
                re.sub("[\u0400-\u04ff]", "", text) if defect == "foreign-few" else before[number]
            )
            mended[defect] += OneLine().apply([expected]).texts[0] == kept[number]
    return mended


def _texts(paths: Sequence[Path] | Iterator[Path]) -> Iterator[str]:
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                try:
                    yield orjson.loads(line)["text"]
                except orjson.JSONDecodeError:
                    yield ""


def _by_similarity(
    rules: Rules,
    decisions: np.ndarray,
    names: Sequence[str],
    truth: dict[int, Label],
    corpus: Corpus,
) -> Iterator[SimilarityScore]:
    """Near-duplicates that the rules of documents let pass, by their true similarity to what they
    were made from."""
    if not rules.near:
        return
    passed = (KEPT, "exact-duplicates", rules.near.key)
    pairs = [
        label
        for label in truth.values()
        if label.defect == "near-duplicate"
        and names[decisions[label.document]] in passed
        and names[decisions[label.source]] in passed
    ][:_PAIRS]
    similarity = np.array(
        [
            jaccard(one, other, rules.near.shingle)
            for one, other in zip(
                corpus.texts([label.document for label in pairs]),
                corpus.texts([label.source for label in pairs]),
                strict=True,
            )
        ]
    )
    gone = np.array([decisions[label.document] != 0 for label in pairs], bool)
    for least, most in pairwise(_BINS):
        inside = (similarity >= least) & ((similarity < most) | (most == 1))
        yield SimilarityScore(least, most, int(inside.sum()), int(gone[inside].sum()))


def jaccard(one: str, other: str, width: int) -> float:
    """Exactly, of the sets of ``width`` words in a row, without case and punctuation."""
    a, b = (_shingles(re.findall(r"\w+", text.lower()), width) for text in (one, other))
    return len(a & b) / len(a | b)


def _shingles(words: list[str], width: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}
