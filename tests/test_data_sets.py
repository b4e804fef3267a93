"""Before a run: the cheap look at a data set, blends and splits, all without numpy in the launcher."""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT
from harness.commands import COMMANDS
from harness.data import check, commands, data_sets, definitions, look, prepare, sources
from harness.data.documents import text_file
from harness.data.header import bin_path, idx_path
from harness.data.prepare import Means, Recipe
from harness.data.progress import StageProgress, amount, duration
from harness.data.splits import check_split, split_matrix
from harness.errors import UserError
from harness.experiment.constraints import with_changes

pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two data sets, a and b, of 200 documents each."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    for name in ("a", "b"):
        rows = [
            " ".join(str(rng.randrange(98)) for _ in range(rng.randint(1, 60))) for _ in range(200)
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows)
        )
        recipe = Recipe(name, str(folder / f"{name}.jsonl"), tokenizer="null:100")
        prepare.prepare(recipe, Means(folder=folder / "data"))
    return folder / "data"


@pytest.fixture
def data(tmp_path, made) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(made, tmp_path / "data")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


SPOILED = {
    "bin cut": (lambda p: cut(bin_path(p), -2), "truncated"),
    "bin longer": (
        lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes() + b"ab"),
        "too long",
    ),
    "bin gone": (lambda p: bin_path(p).unlink(), "No such file"),
    "idx cut": (lambda p: cut(idx_path(p), -8), "truncated"),
    "idx empty": (lambda p: idx_path(p).write_bytes(b""), "is empty"),
    "idx of something else": (
        lambda p: idx_path(p).write_bytes(b"PK\x03\x04" * 30),
        "does not begin with",
    ),
    "an older pair": (lambda p: shutil.copy(idx_path(p), p.parent / "kept"), None),
    "manifest": (
        lambda p: (p.parent / "manifest.json").write_text("{}"),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_set_is_refused_with_a_reason_and_a_way_out(data, kind):
    spoil, reason = SPOILED[kind]
    spoil(data_sets.prefix_of("a", data))
    if reason is None:
        assert data_sets.find("a", data).documents == 200
        return
    with pytest.raises(UserError, match=reason) as caught:
        data_sets.find("a", data)
    assert "data" in str(caught.value).splitlines()[-1]
    assert data_sets.find("b", data).documents == 200


def test_a_pair_that_its_manifest_does_not_know_is_refused(data):
    for ending in ("bin", "idx"):
        shutil.copy(
            data / "b" / f"b_text_document.{ending}", data / "a" / f"a_text_document.{ending}"
        )
    with pytest.raises(UserError, match=r"its manifest says"):
        data_sets.find("a", data)


def test_a_changed_tokenizer_is_noticed(data):
    home = data / "a" / "tokenizer"
    (home / "tokenizer.json").write_text('{"model": {}}')
    content = json.loads((data / "a" / "manifest.json").read_text())
    sha256 = data_sets.tokenizer_sha256("HuggingFaceTokenizer", home)
    content["tokenizer"] |= {"type": "HuggingFaceTokenizer", "sha256": sha256}
    (data / "a" / "manifest.json").write_text(json.dumps(content))
    found = data_sets.find("a", data)
    assert (found.tokenizer_type, found.tokenizer_model, found.vocab_size) == (
        "HuggingFaceTokenizer",
        home,
        100,
    )
    (home / "tokenizer.json").write_text('{"model": {"merges": ["a b"]}}')
    with pytest.raises(UserError, match=r"tokenizer .* changed since it made the tokens"):
        data_sets.find("a", data)
    (home / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        data_sets.find("a", data)


def test_a_set_made_elsewhere_needs_no_manifest(data):
    (data / "a" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        data_sets.find("a", data)
    description = data / "a" / "tokenizer" / "tokenizer.json"
    for vocabulary in ({"x": 0, "y": 1, "<s>": 2}, [["x", -1.0], ["y", -2.0], ["<s>", 0.0]]):
        description.write_text(
            json.dumps(
                {
                    "model": {"vocab": vocabulary},
                    "added_tokens": [{"content": "<s>"}, {"content": "</s>"}],
                }
            )
        )
        found = data_sets.find("a", data)
        assert (found.documents, found.vocab_size, found.tokenizer_type) == (
            200,
            4,
            "HuggingFaceTokenizer",
        )
    for damaged in ("{", "{}", '{"model": {"vocab": 3}}'):
        description.write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer.json is damaged, or of an unknown kind"):
            data_sets.find("a", data)


def test_an_unknown_set_is_named_with_what_there_is(made):
    assert data_sets.prepared_names(made) == ("a", "b")
    with pytest.raises(UserError, match=r"DATA=aa is not prepared; did you mean a\?"):
        data_sets.find("aa", made)
    with pytest.raises(UserError, match=r"DATA=oscar-sv is not prepared; make data-oscar-sv"):
        data_sets.find("oscar-sv", made)


def test_a_single_set_is_upstreams_single_path(made):
    single = data_sets.blend("a", made)
    assert single.data_path == (str(made / "a" / "a_text_document"),)
    assert single.cache.parent == made / "a" / "cache"


@pytest.mark.parametrize("typed", ["a:0.7 b:0.3", "a:0.7,b:0.3", " a:0.7 ,  b:0.3 "])
def test_a_blend_is_weights_and_paths(made, typed):
    mixed = data_sets.blend(typed, made)
    assert mixed.data_path == (
        "0.7",
        str(made / "a" / "a_text_document"),
        "0.3",
        str(made / "b" / "b_text_document"),
    )
    assert mixed.cache != data_sets.blend("b:0.3 a:0.7", made).cache


BAD_BLENDS = {
    "a b": "weight above 0",
    "a:0.7 b": "weight above 0",
    "a:x": "weight above 0",
    "a:0": "weight above 0",
    "a:-1": "weight above 0",
    "a:inf": "weight above 0",
    "a:nan": "weight above 0",
    "": "names no data set",
    "a:1 mock:1": "cannot be blended",
    "a:1 c:1": "DATA=c is not prepared",
}


@pytest.mark.parametrize("typed", BAD_BLENDS)
def test_a_wrong_blend_is_refused(made, typed):
    with pytest.raises(UserError, match=BAD_BLENDS[typed]):
        data_sets.blend(typed, made)


def test_sets_of_different_tokenizers_do_not_mix(data, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "1 2"}\n')
    prepare.prepare(Recipe("c", str(tmp_path / "c.jsonl"), tokenizer="null:50"), Means(folder=data))
    with pytest.raises(
        UserError,
        match=r"a and c were made by different tokenizers\nprepare c again with TOKENIZER=.*/a/tokenizer$",
    ):
        data_sets.blend("a:1 b:1 c:1", data)


def test_the_cache_moves_when_the_content_changes(data, tmp_path):
    before = data_sets.blend("a", data).cache
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n')
    prepare.prepare(
        Recipe("a", str(tmp_path / "a.jsonl"), tokenizer="null:100"), Means(folder=data, force=True)
    )
    assert data_sets.blend("a", data).cache != before


def test_a_split_has_bounds_as_upstream_has_them():
    assert split_matrix("1,1,0") == ((0, 0.5), (0.5, 1.0), None)
    assert split_matrix("100") == ((0, 1.0), None, None)
    assert split_matrix("0,1,1") == (None, (0.0, 0.5), (0.5, 1.0))
    for wrong in ("", "a,b", "1,2,3,4", "-1,2", "0,0,0", "inf,1", "nan"):
        with pytest.raises(UserError, match="such as 949,50,1"):
            split_matrix(wrong)


def test_a_split_that_gets_nothing_is_refused_before_upstream_hangs(made):
    single = data_sets.blend("a", made)
    with pytest.raises(
        UserError, match="of its 200 sequences the split 949,50,1 leaves none for test"
    ):
        check_split(single, "949,50,1")
    check_split(single, "90,9,1")
    check_split(single, "100,0,0")


def test_the_launcher_needs_no_numpy(made):
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from pathlib import Path; from harness.data import data_sets, splits\n"
        f"chosen = data_sets.blend('a:1 b:2', Path({str(made)!r})); splits.check_split(chosen, '9,1')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_joined_sets_are_one_after_the_other(data):
    from harness.data import indexed
    from harness.data.merge import merge

    (data / "all").mkdir()
    (data / "all" / "all_text_document.bin").write_bytes(b"left by a killed one")
    manifest = merge(["a", "b"], "all", data)
    found, parts = data_sets.find("all", data), [data_sets.find(name, data) for name in ("a", "b")]
    assert (found.documents, found.tokens) == (400, sum(part.tokens for part in parts))
    assert manifest.counted.records == 400
    joined, first = (indexed.check_pair(data_sets.prefix_of(name, data)) for name in ("all", "a"))
    assert joined.document_tokens()[:200].tolist() == first.document_tokens().tolist()
    assert all(finding.right for finding in check.check("all", data))
    with pytest.raises(UserError, match="is prepared already"):
        merge(["a", "b"], "all", data)
    with pytest.raises(UserError, match="FROM="):
        merge(["a"], "one", data)
    (data / "b" / "manifest.json").unlink()
    (data / "b" / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    with pytest.raises(UserError, match="different tokenizers"):
        merge(["a", "b"], "two", data)


def test_a_merge_refuses_what_it_would_spoil_and_leaves_no_trace(data):
    from harness.data.merge import merge

    def refused(names, name, why):
        before = sorted(data.rglob("*"))
        with pytest.raises(UserError, match=why):
            merge(names, name, data)
        assert sorted(data.rglob("*")) == before

    unfinished = data / "all" / "work" / "text-1" / "00000.jsonl"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("of an interrupted preparation")
    (data / "mine").mkdir()
    (data / "mine" / "manifest.json").write_text("left of a set whose pair is lost")
    refused(["a", "b"], "mine", "is prepared already")
    refused(["a", "c"], "all", "FROM=c is not prepared")
    refused(["a", "a"], "all", "a twice")
    refused(["a:0.3", "b"], "all", "without weights")
    raw = bytearray(bin_path(data_sets.prefix_of("b", data)).read_bytes())
    raw[8] ^= 1
    bin_path(data_sets.prefix_of("b", data)).write_bytes(raw)
    refused(["a", "b"], "all", "changed since it was prepared")
    manifest = json.loads((data / "a" / "manifest.json").read_text())
    manifest["written"]["dtype"] = "int32"
    (data / "a" / "manifest.json").write_text(json.dumps(manifest))
    refused(["a", "b"], "all", "b is stored as uint16, a as int32")


def test_joined_conversations_are_conversations(data):
    """A joined set without this would be trained on as plain text, questions and all."""
    from harness.data.merge import merge

    for name, answers in (("a", 30), ("b", 12)):
        file = data / name / "manifest.json"
        manifest = json.loads(file.read_text())
        file.write_text(
            json.dumps(
                {
                    **manifest,
                    "chat": {
                        "template": "simple",
                        "template_sha256": "x",
                        "answer_tokens": answers,
                    },
                }
            )
        )
    assert merge(["a", "b"], "all", data).chat.answer_tokens == 42
    assert data_sets.find("all", data).chat


def findings(data: Path, name: str = "a") -> dict[str, check.DataFinding]:
    return {finding.what: finding for finding in check.check(name, data)}


def test_a_good_set_is_right_in_everything(made):
    seen = findings(made)
    assert list(seen) == [
        "manifest",
        "index",
        "counts",
        ".idx checksum",
        "tokenizer",
        "tokens",
        ".bin checksum",
    ]
    assert all(finding.right for finding in seen.values())


def test_a_check_finds_what_the_cheap_look_does_not(data):
    prefix = data_sets.prefix_of("a", data)
    content = bytearray(bin_path(prefix).read_bytes())
    content[10:12] = (97).to_bytes(2, "little")
    bin_path(prefix).write_bytes(content)
    assert [f.what for f in findings(data).values() if not f.right] in (
        [".bin checksum"],
        ["tokens"],
    )
    content[10:12] = (100).to_bytes(2, "little")
    bin_path(prefix).write_bytes(content)
    assert data_sets.find("a", data)
    wrong = findings(data)["tokens"]
    assert not wrong.right
    assert "id 100" in wrong.seen
    assert "0 to 99" in wrong.seen
    content[-2:] = (5).to_bytes(2, "little")
    content[10:12] = (1).to_bytes(2, "little")
    bin_path(prefix).write_bytes(content)
    assert (
        "document 199 ends with id 5, not with end-of-document 99" in findings(data)["tokens"].seen
    )
    index = bytearray(idx_path(prefix).read_bytes())
    index[34:38] = (10_000).to_bytes(4, "little")
    idx_path(prefix).write_bytes(index)
    assert data_sets.find("a", data)
    assert list(findings(data)) == ["manifest", "index"]
    assert not findings(data)["index"].right


def test_an_inspection_counts_and_decodes(made):
    shown = "\n".join(look.inspect("a", samples=4, folder=made))
    chosen = data_sets.find("a", made)
    assert f"a: 200 documents, {chosen.tokens:,} tokens" in shown
    assert f"tokens per document: mean {chosen.tokens / 200:,.1f}, longest" in shown
    bars = re.findall(r"up to [\d,]+ +(\d+) #*$", shown, re.MULTILINE)
    assert sum(map(int, bars)) == 200
    first = json.loads((made.parent / "a.jsonl").read_text().splitlines()[0])["text"]
    assert re.findall(r"document (\d+),", shown) == ["0", "50", "100", "150"]
    assert f"tokens:\n  {first} 99\n" in shown


def test_lengths_are_counted_by_powers_of_two():
    import numpy as np

    mean, percentiles, *bars = look.length_lines(np.array([0, 1, 2, 3, 9]))
    assert mean == "\ntokens per document: mean 3.0, longest 9, none in 1"
    assert percentiles == "  1% up to 0, 25% up to 1, 50% up to 2, 75% up to 3, 99% up to 3"
    found = [bar.split()[2:4] for bar in bars]
    assert found == [["1", "2"], ["2", "1"], ["4", "1"], ["8", "0"], ["16", "1"]]
    assert look.length_lines(np.array([], int)) == []


def test_the_commands_print_what_they_found(made, monkeypatch, capsys):
    for module in (data_sets, commands, look, check):
        monkeypatch.setattr(module, "DATA", made)
    for function in (
        data_sets.prepared_names,
        data_sets.find,
        data_sets.blend,
        look.inspect,
        check.check,
    ):
        defaults = [made if value == ROOT / "data" else value for value in function.__defaults__]
        monkeypatch.setattr(function, "__defaults__", tuple(defaults))
    assert commands.list_sets() == 0
    shown = capsys.readouterr().out
    assert "tinystories-10k  not prepared" in shown
    assert "200 documents" in shown
    assert commands.inspect_set({"NAME": "a", "SAMPLES": "1"}) == 0
    assert "200 documents" in capsys.readouterr().out
    assert commands.check_set({"NAME": "a"}) == 0
    cut(bin_path(data_sets.prefix_of("b", made)), -2)
    assert commands.check_set({"NAME": "b"}) == 1
    assert "WRONG  index" in capsys.readouterr().out
    with pytest.raises(UserError, match="NAME missing: one of a, b"):
        commands.check_set({})
    with pytest.raises(UserError, match="DATA=c is not prepared"):
        commands.check_set({"NAME": "c"})


def test_wrong_settings_are_named(tmp_path):
    for words, message in [
        (["NAME=x"], "INPUT missing"),
        (["INPUT=x"], "NAME missing"),
        (["NAME=x", "INPUT=y", "DOCUMENTS=page"], "DOCUMENTS=page"),
        (["NAME=x", "INPUT=y", "LONGEST=no"], "LONGEST=no"),
        (["NAME=x", "INPUT=y", "APPEND_EOD=2"], "APPEND_EOD=2"),
        (["NAME=x", "INPUT=y", "TOKENISER=gpt2"], "TOKENIZER"),
        ([f"INPUT={tmp_path}", "NAME=x"], "no .jsonl, .parquet or .txt file"),
        ([f"INPUT={tmp_path}/*.jsonl", "NAME=x"], "nothing matches"),
        ([f"INPUT={__file__}", "NAME=x"], "known endings"),
        (["INPUT=x", "NAME=x", "RULES=se"], "RULES=se: .*sv"),
    ]:
        with pytest.raises(UserError, match=message):
            commands.prepare_input(COMMANDS["data-prepare"].parse(words))
    with pytest.raises(UserError, match="did you mean tinystories-10k"):
        commands.prepare_known("tinystories", {})
    with pytest.raises(UserError, match="is not generated"):
        commands.prepare_known("tinystories-10k", {"SIZE_MB": "3"})


def test_files_are_found_by_name_folder_and_pattern(tmp_path):
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.txt",
        "sub/d.parquet",
        "notes.md",
        ".hidden.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = lambda wanted: [file.path.name for file in sources.local_files(wanted)]  # noqa: E731
    assert names(str(tmp_path)) == ["a.jsonl.gz", "b.jsonl", "c.txt", "d.parquet"]
    assert names(f"{tmp_path}/*.jsonl") == [".hidden.jsonl", "b.jsonl"] or names(
        f"{tmp_path}/*.jsonl"
    ) == ["b.jsonl"]
    assert names(f"{tmp_path}/sub {tmp_path}/b.jsonl") == ["c.txt", "d.parquet", "b.jsonl"]
    assert names(f"{tmp_path}/**/*.txt") == ["c.txt"] == names(f"{tmp_path}/*/c.*")
    (tmp_path / "e.txt").mkdir()
    with pytest.raises(UserError, match=r"e\.\*: no such file or folder, and nothing matches"):
        names(f"{tmp_path}/e.*")
    (tmp_path / "with space.jsonl").touch()
    assert names(f"{tmp_path}/with space.jsonl") == ["with space.jsonl"]
    assert text_file(tmp_path / "b.jsonl").kind == "jsonl"


def test_the_definitions_are_read_and_pin_what_can_be_pinned():
    known = definitions.definitions()
    assert {
        "openwebtext-10k",
        "tinystories-10k",
        "wikipedia-sv",
        "oscar-sv",
        "synthetic",
    } <= known.keys()
    assert known["tinystories-10k"].limit == known["openwebtext-10k"].limit == 10_000
    for name in ("tinystories-10k", "wikipedia-sv"):
        assert len(known[name].hub.revision) == 40
    for definition in known.values():
        recipe = prepare.recipe_of(definition)
        assert recipe.rules is None or recipe.rules.is_file()


BAD_DEFINITIONS = {
    "x:\n  shows: y\n  hub: {repository: a/b, revision: c, files: d, gatd: true}": "'hub.gatd'; did you mean gated",
    "x:\n  shows: y\n  limits: 3\n  synthetic: {size_mb: 1}": "unknown key 'limits'; did you mean limit",
    "x:\n  shows: y": "either hub, synthetic or chat",
    "x:\n  shows: y\n  synthetic: {size_mb: 0}": "size_mb",
    "x:\n  synthetic: {size_mb: 1}": "'shows' is missing",
    "X y:\n  shows: y\n  synthetic: {size_mb: 1}": "name",
    "- a": "expected key: value pairs",
    "a: 1": "datasets.yaml: a: expected key: value pairs, found 1",
    "x: {shows: a}\nx: {shows: b}": "'x' occurs twice",
    "a: [": "not valid YAML",
}


@pytest.mark.parametrize("content", BAD_DEFINITIONS)
def test_a_wrong_definition_is_named(tmp_path, content):
    (tmp_path / "datasets.yaml").write_text(content)
    with pytest.raises(UserError, match=BAD_DEFINITIONS[content]):
        definitions.definitions(tmp_path / "datasets.yaml")


class Screen:
    """A terminal, or a pipe."""

    def __init__(self, tty: bool) -> None:
        self.tty, self.text = tty, ""

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def shown(monkeypatch, tty: bool, stages: dict[str, int]) -> str:
    """What 60 steps of each stage, one a second, write; the values are the bytes done at first."""
    from harness.data import progress as module

    now, screen = [100.0], Screen(tty)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with StageProgress(screen) as progress:
        for stage, first in stages.items():
            for second in range(60):
                now[0] += 1
                done = first + second * 10**6
                progress.show(stage, done, first + 60 * 10**6, "5 M tokens")
        progress.say("done")
    return screen.text


def test_progress_in_a_pipe_is_a_line_every_ten_seconds(monkeypatch):
    lines = shown(monkeypatch, False, {"tokenise": 0}).splitlines()
    assert len(lines) == 6
    assert lines[4] == "tokenise: 50 MB of 60 MB  1 MB/s  10 s left  5 M tokens"
    assert lines[5] == "done"


def test_progress_on_a_terminal_is_one_bar_that_goes(monkeypatch):
    text = shown(monkeypatch, True, {"tokenise": 0})
    assert "50 MB of 60 MB  1 MB/s  10 s left  5 M tokens" in text
    assert text.endswith("done\n")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden for good"
    assert text.count("\n") <= 2, "more than one line"


def test_progress_of_a_resumed_stage_has_its_own_rate(monkeypatch):
    text = shown(monkeypatch, False, {"read": 0, "tokenise": 540 * 10**6})
    assert "tokenise: 590 MB of 600 MB  1 MB/s  10 s left  5 M tokens" in text


def test_progress_of_comparing_counts_bands_not_bytes(monkeypatch):
    assert "compare: 50 M of 60 M  1 M/s" in shown(monkeypatch, False, {"compare": 0})


def test_amounts_and_times_are_short():
    assert [amount(n) for n in (0, 999, 1000, 12_345_678, 999_600, 5e13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "1 MB",
        "50 TB",
    ]
    assert amount(7_350_000, "") == "7.35 M"
    assert [duration(s) for s in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3:05 min", "2:10 h"]


def test_the_published_set_is_the_default_where_it_is_prepared(made, tmp_path):
    from harness.experiment.catalog import load_catalog

    experiment = load_catalog().find("101")
    assert data_sets.default_for(experiment, tmp_path) == "mock"
    assert data_sets.default_for(with_changes(experiment, published_data="b"), made) == "b"
    assert replace(data_sets.find("a", made), name="z").home == made / "a"
