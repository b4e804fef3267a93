"""Equal and nearly equal documents."""

import random
import re

import pytest

np = pytest.importorskip("numpy", reason="needs numpy")

from harness.data.clean.duplicates import NearDuplicates, exact_duplicates, near_duplicates  # noqa: E402
from harness.data.clean.words import characters, split  # noqa: E402

WORDS = NearDuplicates(similarity=0.8, shingle=5, of="words", bands=21, rows=6)
CHARACTERS = NearDuplicates(similarity=0.8, shingle=5, of="characters", bands=21, rows=6)


def document(generator, words=200):
    return [f"{generator.choice('abcdefåäö')}{generator.randrange(2000)}" for _ in range(words)]


def edited(words, share, generator):
    return [
        generator.choice("xyz") + str(generator.randrange(99)) if generator.random() < share else w
        for w in words
    ]


def jaccard(a, b, width=5):
    """Of runs of words that begin in the text or at its end, which is ``width`` words that no text has."""
    a, b = ([*words, *[None] * width] for words in (a, b))
    one, other = ({tuple(w[i : i + width]) for i in range(len(w) - width + 1)} for w in (a, b))
    return len(one & other) / len(one | other)


def signatures(rule, documents):
    return rule.signatures([" ".join(words).encode() for words in documents])


def test_words_are_those_of_split():
    generator = random.Random(0)
    texts = [
        "".join(generator.choices("aåж漢😀  ", k=generator.randrange(30))).encode()
        for _ in range(200)
    ]
    found = split(texts)
    of_each = [[] for _ in texts]
    for start, end, number in zip(found.start, found.end, found.document, strict=True):
        of_each[number].append(found.text[start:end].tobytes())
    assert of_each == [text.split() for text in texts]
    by_hash = {}
    for start, end, value in zip(found.start, found.end, found.hash.tolist(), strict=True):
        assert by_hash.setdefault(value, word := found.text[start:end].tobytes()) == word
    assert len(by_hash) == len({word for words in of_each for word in words})
    letters = characters(texts)
    assert [
        letters.text[s:e].tobytes().decode()
        for s, e in zip(letters.start, letters.end, strict=True)
    ] == [letter for text in texts for letter in text.decode() if letter != " "]


def test_exact_duplicates_name_the_first():
    hashes = np.array([7, 5, 7, 9, 5, 7, 0], np.uint64)
    assert exact_duplicates(hashes).tolist() == [-1, -1, 0, -1, 1, 0, -1]
    assert exact_duplicates(np.empty(0, np.uint64)).tolist() == []


@pytest.mark.parametrize("words", [12, 60, 300, 3000])
def test_likeness_estimates_jaccard(words):
    generator = random.Random(words)
    errors = []
    for share in [0.0, 0.01, 0.03, 0.1, 0.3, 1.0] * 20:
        one = document(generator, words)
        other = edited(one, share, generator)
        found = WORDS.likeness(signatures(WORDS, [one, other]), np.array([0]), np.array([1]))[0]
        errors.append(found - jaccard(one, other))
    # The standard deviation of 126 independent bins is 0.045 at worst; documents of few words fill fewer bins.
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < (0.12 if words < 60 else 0.06)


def test_signatures_do_not_depend_on_the_batch():
    generator = random.Random(1)
    documents = [document(generator, generator.randrange(1, 90)) for _ in range(50)]
    together = signatures(WORDS, documents)
    assert (together == np.concatenate([signatures(WORDS, [words]) for words in documents])).all()
    assert (together[::-1] == signatures(WORDS, documents[::-1])).all()


def test_case_and_punctuation_do_not_count():
    one, other = (
        "Å, vad härligt! (Sade Östen.) Éclair; Привет",
        "å vad HÄRLIGT sade östen éclair Привет",
    )
    assert (WORDS.signatures([one.encode()]) == WORDS.signatures([other.encode()])).all()


def test_characters_where_there_are_no_words():
    one = "政府建议从明年起提高补贴因为物价上涨了很多人民日报昨天报道了这个消息" * 2
    near, other = (
        one.replace("昨", "今"),
        "我们在河边散步看见许多鸟儿飞过天空然后回家吃晚饭聊天直到深夜才睡觉" * 2,
    )
    found = CHARACTERS.signatures([text.encode() for text in (one, near, other)])
    likeness = CHARACTERS.likeness(found, np.array([0, 0]), np.array([1, 2]))
    assert likeness[0] > 0.6
    assert likeness[1] < 0.1


def test_documents_without_words_or_with_one():
    found = WORDS.signatures([b"", b"...", b"ett", b"Ett!", b"tva"])
    assert (found[0] == found[1]).all()
    assert (found[2] == found[3]).all()
    assert (found[2] != found[4]).mean() > 0.4


def test_near_duplicates_are_those_of_all_pairs():
    """Beside a comparison of every document with every earlier one."""
    generator = random.Random(2)
    documents = [document(generator)]
    for _ in range(400):
        near = edited(
            generator.choice(documents), generator.choice([0.002, 0.01, 0.02, 0.05]), generator
        )
        documents.append(near if generator.random() < 0.3 else document(generator))
    found = signatures(WORDS, documents)
    everyone = np.arange(len(documents))
    twin = near_duplicates(WORDS, found, everyone)
    likeness = np.array(
        [WORDS.likeness(found, np.full(len(documents), i), everyone) for i in everyone]
    )
    wanted = (np.tril(likeness, -1) >= WORDS.similarity).any(axis=1)
    assert wanted.sum() > 40
    assert not (~wanted & (twin >= 0)).any()
    assert (wanted & (twin < 0)).sum() <= 2
    later = np.flatnonzero(twin >= 0)
    assert (twin[later] < later).all()
    assert (likeness[twin[later], later] >= WORDS.similarity).all()


def test_near_duplicates_compare_candidates_alone():
    found = signatures(WORDS, [document(random.Random(seed % 2)) for seed in range(6)])
    assert near_duplicates(WORDS, found, np.array([1, 2, 3, 5])).tolist() == [-1, -1, -1, 1, -1, 1]
    assert near_duplicates(WORDS, found, np.empty(0, np.int64)).tolist() == [-1] * 6


def test_a_hundred_thousand_alike_cost_no_square():
    """All pairs would be ten thousand million comparisons."""
    found = np.repeat(signatures(WORDS, [document(random.Random(3))]), 100_000, axis=0)
    twin = near_duplicates(WORDS, found, np.arange(len(found)))
    assert twin[0] == -1
    assert not (twin[1:] == -1).any()


def test_shingles_reach_no_other_document():
    """The end of one document and the start of the next make no shingle."""
    words = re.findall(r"\w+", "ett tu tre fyra fem sex sju")
    alone = signatures(WORDS, [words])[0]
    for before, after in ((["noll"], ["nio"]), (words, words)):
        assert (signatures(WORDS, [before, words, after])[1] == alone).all()
