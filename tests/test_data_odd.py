"""Odd and torn files in the readers of data: a result or a sentence, never a traceback."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from harness.errors import UserError

pytest.importorskip("numpy", reason="the set-up stage `data` is not installed")
pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")
from harness.data import check, commands, content, data_sets, look
from harness.data.chat.conversations import has_template
from harness.data.header import bin_path
from harness.data.manifest import read_manifest
from harness.data.prepare import Means, Recipe, prepare
from harness.data.publishing import check_free


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "in.jsonl").write_text('{"text": "1 2 3"}\n' * 50)
    prepare(
        Recipe("mine", str(folder / "in.jsonl"), tokenizer="null:100"),
        Means(folder=folder / "data", workers=1),
    )
    return folder / "data"


@pytest.fixture
def data(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def read_all(data: Path) -> int:
    """Every reader of a data set; how many refused it."""

    def describe() -> None:
        if manifest := read_manifest(data / "mine"):
            manifest.lines()

    readers = (
        lambda: data_sets.find("mine", data),
        lambda: [*check.check("mine", data)],
        lambda: look.inspect("mine", 2, data),
        lambda: content.check_content("mine", data),
        lambda: check_free("mine", data),
        describe,
    )
    refused = 0
    for reader in readers:
        try:
            reader()
        except UserError:
            refused += 1
    return refused


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[]", b"null", b'{"name": 1}', b"[" * 100_000, b"", b"{"]
)
def test_a_manifest_of_any_bytes(data, text) -> None:
    (data / "mine" / "manifest.json").write_bytes(text)
    assert read_all(data) >= 4


def test_a_manifest_with_any_value_anywhere(data, capsys) -> None:
    whole = json.loads((data / "mine" / "manifest.json").read_text())
    places = [*_places(whole)]
    assert len(places) > 40
    rng = random.Random(0)
    for place in places:
        content = json.loads(json.dumps(whole))
        within = content
        for key in place[:-1]:
            within = within[key]
        within[place[-1]] = rng.choice([None, "x", -1, [], {}, 1.5, "\ud800", True, 10**30])
        (data / "mine" / "manifest.json").write_text(json.dumps(content))
        read_all(data)
    (data / "mine" / "manifest.json").write_text(json.dumps(whole))
    assert read_all(data) == 1, "only a taken name is refused of a whole one"


def _places(value, before=()):
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*before, key)
        yield from _places(inner, (*before, key))


def test_ids_beyond_the_vocabulary_are_said_where_text_is_shown(data) -> None:
    path = bin_path(data_sets.prefix_of("mine", data))
    path.write_bytes(b"\xff\xff" * (path.stat().st_size // 2))
    with pytest.raises(
        UserError,
        match=r"NAME=mine: document 0 has id 65,535, the vocabulary is 0 to 99\nmake data-check NAME=mine",
    ):
        look.inspect("mine", 1, data)


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"null", b'"x"', b"{", b'{"chat_template": ""}'])
def test_a_configuration_of_a_tokenizer_without_a_template(tmp_path, text) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(text)
    assert not has_template(tmp_path)


@pytest.mark.parametrize("words", [
    ["INPUT=~no-such-user/x"], ["TOKENIZER=~no-such-user/x"], ["RULES=~no-such-user/x"], ["INPUT=["], ["INPUT=/dev/null"],
])  # fmt: skip
def test_places_that_are_not_there(made, tmp_path, words) -> None:
    name = f"never-{os.getpid()}"  # other workers test other places at the same time
    whole = {"INPUT": str(made.parent / "in.jsonl"), "NAME": name, "TOKENIZER": "null:100"}
    given = {**whole, **dict(word.split("=") for word in words)}
    with pytest.raises(UserError):
        commands.prepare_input(given)
    assert not (data_sets.DATA / name).exists()


def test_rules_that_are_no_text(made, tmp_path) -> None:
    (tmp_path / "rules.yaml").write_bytes(b"\xff\xfe")
    recipe = Recipe(
        "mine", str(made.parent / "in.jsonl"), rules=tmp_path / "rules.yaml", tokenizer="null:100"
    )
    with pytest.raises(UserError, match=r"rules\.yaml is not valid YAML"):
        prepare(recipe, Means(folder=tmp_path / "data", workers=1))
    with pytest.raises(UserError, match=r"rules\.yaml"):
        commands.clean_files(
            {
                "INPUT": str(made.parent / "in.jsonl"),
                "OUT": str(tmp_path / "out"),
                "RULES": str(tmp_path / "rules.yaml"),
            }
        )
