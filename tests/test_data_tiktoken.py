"""Llama 3's tokenizer.model, in tiktoken's format, gives tiktoken's ids, by Hugging Face's own conversion."""

import base64
import json
from pathlib import Path

import pytest

from harness.data import tiktoken_files
from harness.data.hard_texts import hard_texts
from harness.data.tiktoken_files import PATTERN, is_tiktoken, special_tokens, tiktoken_folder
from harness.data.tokenizer import find_tokenizer
from harness.errors import UserError

backends = pytest.importorskip("tokenizers", reason="the set-up stage `data` is not installed")

TEXTS = [text for text in hard_texts(["<|end_of_text|>"]) if len(text) < 400]


@pytest.fixture(scope="module")
def small() -> dict[bytes, int]:
    """Token -> rank of a small tokenizer: the bytes, then merges in the order in which they were learned."""
    from tokenizers import models, pre_tokenizers, trainers

    made = backends.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([*TEXTS[::3], *Path(__file__).read_text().splitlines()], trainer)
    value = {letter: byte for byte, letter in enumerate(tiktoken_files.byte_letters())}
    return {
        bytes(value[letter] for letter in token): rank for token, rank in made.get_vocab().items()
    }


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join(
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(ranks.items(), key=lambda one: one[1])
        )
    )
    return path


@pytest.fixture
def model(tmp_path, small, monkeypatch) -> Path:
    monkeypatch.setattr(tiktoken_files, "RANKS", len(small))
    return write(tmp_path / "Llama-3-small" / "tokenizer.model", small)


def test_its_ids_are_those_of_tiktoken(model, small, tmp_path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="the set-up stage `heavy` is not installed")
    names = {name: len(small) + number for number, name in enumerate(special_tokens())}
    reference = tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=small, special_tokens=names
    )
    made = backends.Tokenizer.from_file(
        str(tiktoken_folder(model, tmp_path / "home") / "tokenizer.json")
    )
    texts = [*TEXTS, "It's 12345 o'clock\r\n\n  WE'LL\tsee", "a" * 3000]
    for text in texts:
        if not any(name in text for name in names):
            assert made.encode(text, add_special_tokens=False).ids == reference.encode_ordinary(
                text
            ), repr(text[:80])
    marked = "<|begin_of_text|>hej<|eot_id|><|reserved_special_token_247|>"
    assert made.encode(marked, add_special_tokens=False).ids == reference.encode(
        marked, allowed_special="all"
    )
    assert made.encode("hej").ids == [len(small), *reference.encode_ordinary("hej")], (
        "upstream begins each text with <|begin_of_text|>"
    )


def test_its_description_is_hugging_faces(model, tmp_path) -> None:
    converters = pytest.importorskip(
        "transformers.convert_slow_tokenizer", reason="the set-up stage `data` is not installed"
    )
    pytest.importorskip("tiktoken", reason="the set-up stage `heavy` is not installed")
    theirs = json.loads(
        converters.TikTokenConverter(str(model), extra_special_tokens=special_tokens())
        .converted()
        .to_str()
    )
    made = backends.Tokenizer.from_file(
        str(tiktoken_folder(model, tmp_path / "home") / "tokenizer.json")
    )
    ours = json.loads(made.to_str())
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens", "normalizer"):
        if part == "pre_tokenizer":  # what ByteLevel trims is about offsets, not ids
            for description in (ours, theirs):
                description[part]["pretokenizers"][1].pop("trim_offsets")
        assert ours[part] == theirs[part], part


def test_llamas_special_tokens_are_where_llama_has_them() -> None:
    names = special_tokens()
    assert len(names) == len({*names}) == 256
    at = {name: 128_000 + number for number, name in enumerate(names)}
    # config.json and generation_config.json of Llama 3.1 and 3.2 name these ids
    assert (at["<|begin_of_text|>"], at["<|end_of_text|>"], at["<|finetune_right_pad_id|>"]) == (
        128000,
        128001,
        128004,
    )
    assert (at["<|start_header_id|>"], at["<|end_header_id|>"]) == (128006, 128007)
    assert (at["<|eom_id|>"], at["<|eot_id|>"], at["<|python_tag|>"]) == (128008, 128009, 128010)
    assert at["<|reserved_special_token_247|>"] == 128255


def test_the_file_and_its_folder_name_the_tokenizer(model, small, tmp_path) -> None:
    pytest.importorskip("transformers", reason="the set-up stage `data` is not installed")
    pytest.importorskip("gigatoken", reason="the set-up stage `data` is not installed")
    found = find_tokenizer(str(model), tmp_path / "home")
    assert find_tokenizer(str(model.parent), tmp_path / "home") == found
    assert (found.kind, found.name, found.vocab_size) == (
        "HuggingFaceTokenizer",
        "Llama-3-small",
        len(small) + 256,
    )
    assert (found.eod, found.end, found.before) == (
        len(small) + 1,
        "<|end_of_text|>",
        ("<|begin_of_text|>",),
    )
    assert (
        found.decode(found.encoder().encode(["åäö 123"], closed=False)[0].tolist())
        == "<|begin_of_text|>åäö 123"
    )


def test_another_models_file_and_a_damaged_one_are_refused(
    model, small, tmp_path, monkeypatch
) -> None:
    home = tmp_path / "home"
    whole = model.read_bytes()
    for broken, said in (
        (whole.replace(b" 7\n", b" x\n"), "line 8 is no token in base64 with its rank"),
        (whole.replace(b" 7\n", b" 8\n"), "are not 0, 1, 2"),
        (whole[: len(whole) // 2], "tokenizer.model|is no token"),
        (b"=== 0\n" + whole, "line 1 is no token"),
        (b"\n".join(whole.split(b"\n")[1:]), "are not 0, 1, 2"),
    ):
        model.write_bytes(broken)
        with pytest.raises(UserError, match=said):
            tiktoken_folder(model, home)
    model.write_bytes(whole)
    monkeypatch.setattr(tiktoken_files, "RANKS", 128_000)
    with pytest.raises(
        UserError,
        match=rf"has {len(small):,} tokens, Llama 3's tokenizer.model 128,000: it is another model's",
    ):
        find_tokenizer(str(model), home)
    assert not home.exists()
    (tmp_path / "sentencepiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert is_tiktoken(model) and not is_tiktoken(tmp_path / "sentencepiece.model")
