"""The synthetic corpus: the same everywhere, true labels, learnable."""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest

np = pytest.importorskip("numpy", reason="needs numpy")
pytest.importorskip("wordfreq", reason="needs wordfreq")

from harness.data.synthetic.corpus import DAMAGED, DEFECTS, PLAIN, Corpus, Mixture  # noqa: E402
from harness.data.synthetic.files import generate  # noqa: E402

MESS = Mixture({"sv": 90, "ru": 10}, dict.fromkeys(DEFECTS, 700))


def digest(corpus, documents):
    return hashlib.sha256(b"".join(line for line, _ in corpus.lines(0, documents))).hexdigest()[:16]


def test_bytes_are_fixed():
    assert digest(Corpus(0, PLAIN), 300) == "4d74597169ec2393"
    assert digest(Corpus(1, DAMAGED), 300) == "9e94c0316c73adaa"
    assert digest(Corpus(1, PLAIN), 300) != digest(Corpus(0, PLAIN), 300)


def test_any_part_is_the_same_by_itself():
    corpus = Corpus(7, MESS)
    everything = list(corpus.lines(0, 900))
    assert list(corpus.lines(500, 900)) == everything[500:]
    valid = [label.document for _, label in everything if label.defect != "invalid"][::-7]
    assert corpus.texts(valid) == [json.loads(everything[number][0])["text"] for number in valid]


def test_labels_are_true():
    corpus = Corpus(3, MESS)
    found = list(corpus.lines(0, 3000))
    of_kind = {
        defect: [label for _, label in found if label.defect == defect] for defect in DEFECTS
    }
    assert all(len(of_one) > 100 for of_one in of_kind.values())
    assert all(label.language == "sv" for of_one in of_kind.values() for label in of_one)

    def text(label):
        return json.loads(found[label.document][0])["text"]

    def before(label):
        return corpus.undamaged([label.document])[0]

    for label in of_kind["exact-duplicate"]:
        source = found[label.source][1]
        assert (source.defect, source.language, source.document < label.document) == (
            None,
            "sv",
            True,
        )
        assert found[label.document][0] == found[label.source][0]
    for label in of_kind["near-duplicate"]:
        one, other = text(label).split(), json.loads(found[label.source][0])["text"].split()
        assert (
            0
            <= sum(a != b for a, b in zip(one, other, strict=True))
            <= max(1, round(label.share * len(one)))
        )
    for label in of_kind["nfd"]:
        assert not unicodedata.is_normalized("NFC", text(label))
        assert unicodedata.normalize("NFC", text(label)) == before(label)
    for label in of_kind["control"]:
        rest = "".join(
            c for c in text(label) if unicodedata.category(c) not in ("Cc", "Cf") or c == "\n"
        )
        assert rest == before(label)
    for label in of_kind["mojibake"]:
        assert "Ã" in text(label)
        assert "Ã" not in before(label)
    for label in of_kind["invalid"]:
        with pytest.raises(UnicodeDecodeError):
            found[label.document][0].decode()
    for label in of_kind["foreign-many"]:
        assert sum("\u0400" <= c <= "\u04ff" for c in text(label)) > 0.02 * len(text(label))
    for label in of_kind["foreign-few"]:
        assert 0 < sum("\u0400" <= c <= "\u04ff" for c in text(label)) < 0.02 * len(text(label))
    assert max(len(text(label).split()) for label in of_kind["too-short"]) == 8
    for _, label in found:
        if label.defect is None and label.language == "sv":
            assert not any("\u0400" <= c <= "\u04ff" for c in text(label))
            assert unicodedata.is_normalized("NFC", text(label))


def test_mixture_is_as_asked():
    counts = Counter(label.language for _, label in Corpus(5, PLAIN).lines(0, 5000))
    assert {language: number / 50 for language, number in counts.items()} == pytest.approx(
        PLAIN.languages, abs=2
    )


def test_every_language_can_be_the_main_one():
    for language in ("en", "ru", "zh", "code"):
        corpus = Corpus(2, Mixture({language: 1}, dict.fromkeys(DEFECTS, 800)))
        assert {label.defect for _, label in corpus.lines(0, 400)} == {None, *DEFECTS}


def test_files_hold_the_corpus(tmp_path):
    corpus = Corpus(3, MESS)
    shards = generate(tmp_path, 400_000, corpus, processes=1)
    content = b"".join(shard.read_bytes() for shard in shards)
    documents = content.count(b"\n")
    assert content == b"".join(line for line, _ in corpus.lines(0, documents))
    assert 400_000 <= len(content) < 400_000 + len(content.splitlines()[-1]) + 1


def test_files_do_not_depend_on_processes_or_interruptions(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.data.synthetic.files.DOCUMENTS_PER_SHARD", 100)

    def files(folder):
        return {
            p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }

    def stop(what, done, total):
        if done > 300_000:
            raise KeyboardInterrupt

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    generate(whole, 900_000, Corpus(4, MESS), processes=1)
    with pytest.raises(KeyboardInterrupt):
        generate(resumed, 900_000, Corpus(4, MESS), processes=1, progress=stop)
    (resumed / "00001.jsonl").unlink()
    generate(resumed, 900_000, Corpus(4, MESS), processes=1)
    generate(resumed, 900_000, Corpus(4, MESS), processes=1)
    assert files(resumed) == files(whole)
    assert len(files(whole)) > 2


def test_two_processes_make_the_same(tmp_path):
    for processes in (1, 2):
        generate(tmp_path / str(processes), 300_000, Corpus(), processes)
    assert (tmp_path / "1/00000.jsonl").read_bytes() == (tmp_path / "2/00000.jsonl").read_bytes()
    assert sorted(p.name for p in (tmp_path / "2").glob("*.jsonl")) == ["00000.jsonl"]


def test_words_can_be_foretold():
    """A word is worth far fewer bits after the one before it than alone: what a model learns first."""
    text = " ".join(
        " ".join(Corpus(0, Mixture({"sv": 1})).texts(range(4000))).lower().split()
    ).split()
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    one, two = Counter(train), Counter(pairwise(train))

    def alone(word):
        return (one[word] + 1) / (len(train) + len(one))

    bits_alone = -sum(math.log2(alone(word)) for word in held_out) / len(held_out)
    bits_after = -sum(
        math.log2(0.5 * two[before, word] / max(1, one[before]) + 0.5 * alone(word))
        for before, word in pairwise(held_out)
    ) / len(held_out)
    assert bits_after < 0.8 * bits_alone
