"""What a user made is neither deleted nor replaced unasked, whichever command writes."""

import gzip
import json
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.system.files import replace_folder

pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")
from harness.data import commands

RULES = "rules:\n  - length: {min_characters: 3, max_characters: 100}\n"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def clean(tmp_path, capsys):
    """``make data-clean`` of ``texts``, and what it printed."""
    (tmp_path / "rules.yaml").write_text(RULES)

    def run(*texts: str, out: Path = tmp_path / "out", rules: str = RULES, **settings: str) -> str:
        (tmp_path / "rules.yaml").write_text(rules)
        source = tmp_path / "in.jsonl"
        wanted = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if not source.exists() or source.read_text() != wanted:
            source.write_text(wanted)
        words = {
            "INPUT": str(source),
            "OUT": str(out),
            "RULES": str(tmp_path / "rules.yaml"),
            "WORKERS": "1",
        } | settings
        assert commands.clean_files(words) == 0
        return capsys.readouterr().out

    return run


def test_cleaning_does_not_mix_into_a_folder_with_files(clean, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("notes.txt", "00000.jsonl"):
        (mine / name).write_text("mine")
        before = content(mine)
        for force in ({}, {"FORCE": "1"}):
            with pytest.raises(
                UserError,
                match=rf"holds files that no cleaning wrote: {name}\nname a folder that is new or empty",
            ):
                clean("one two", out=mine, **force)
        assert content(mine) == before
        (mine / name).unlink()
    clean("one two", out=mine)  # an empty folder will do
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no cleaning wrote: notes.txt"):
        clean("one two", out=mine, FORCE="1")


def test_cleaning_other_text_replaces_only_when_asked_and_the_same_goes_on(clean, tmp_path):
    assert "1 of 2 documents kept" in clean("one two", "x")
    first = content(tmp_path / "out")
    assert "1 of 2 documents kept" in clean("one two", "x")
    assert content(tmp_path / "out") == first
    for change in ({"rules": RULES.replace("3", "4")}, {}):
        with pytest.raises(
            UserError,
            match=r"holds the results of other inputs or other rules\n.*FORCE=1 replaces this one",
        ):
            clean("three four", **change)
        assert content(tmp_path / "out") == first
    assert "1 of 1 documents kept" in clean("three four", FORCE="1")
    assert (tmp_path / "out" / "00000.jsonl").read_text() == '{"text":"three four"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "rules.yaml"]


def test_the_old_text_stays_until_the_new_one_is_whole(clean, tmp_path, monkeypatch):
    from harness.data.clean import pipeline

    clean("one two")
    first = content(tmp_path / "out")
    stop = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr(pipeline._Cleaning, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        clean("three four", FORCE="1")
    assert content(tmp_path / "out") == first
    monkeypatch.undo()
    clean("three four", FORCE="1")
    assert (tmp_path / "out" / "00000.jsonl").read_text() == '{"text":"three four"}\n'


def test_cleaning_reads_what_preparing_reads(clean, tmp_path):
    """Plain text, a document a line, packed or not; the same command again changes nothing."""
    (tmp_path / "a.txt").write_bytes(
        "one two\nx\nåtta nio\n\xff\n".encode("latin-1").replace(b"\xe5", "å".encode())
    )
    with gzip.open(tmp_path / "b.txt.gz", "wt") as packed:
        packed.write("three four\n")
    wanted = {"INPUT": f"{tmp_path / 'a.txt'} {tmp_path / 'b.txt.gz'}"}
    said = clean(**wanted)
    assert "3 of 4 documents kept" in said and "skipped 1: bytes that are no UTF-8" in said
    texts = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "out").glob("0*.jsonl"))
        for line in path.open()
    ]
    assert texts == ["one two", "åtta nio", "three four"]
    first = content(tmp_path / "out")
    assert "3 of 4 documents kept" in clean(**wanted) and content(tmp_path / "out") == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (
        tmp_path / "old" / "file"
    ).read_text() == "new"
    (tmp_path / "next").mkdir()
    replace_folder(tmp_path / "next", tmp_path / "free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free", "old"]


def test_conversations_take_the_settings_of_their_target(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the set-up stage `heavy` is not installed")
    from harness.data.chat import prepare

    asked = []
    monkeypatch.setattr(
        prepare,
        "prepare_chat",
        lambda *given, **more: asked.append((given[0], given[2], more)) or (None, None),
    )
    monkeypatch.setattr(prepare, "tell", lambda *_: None)
    monkeypatch.setattr(prepare, "prepared_names", lambda: ("toy-chat",))
    assert commands.prepare_known("toy-chat", {}) == 0 and not asked
    assert (
        commands.prepare_known("toy-chat", {"NAME": "other", "TOKENIZER": "bytes", "FORCE": "1"})
        == 0
    )
    assert asked == [("other", "bytes", {"force": True})]
    with pytest.raises(
        UserError, match="LIMIT, SIZE_MB: conversations of toy-chat have no such setting"
    ):
        commands.prepare_known("toy-chat", {"SIZE_MB": "3", "LIMIT": "2"})
