"""A data set is prepared whole or not at all, to the same bytes however often it was killed."""

import contextlib
import errno
import json
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.data import data_sets, documents, indexed, prepare, sources, tokenize
from harness.data.definitions import Hub
from harness.data.documents import TextLayout
from harness.data.header import bin_path, idx_path
from harness.data.manifest import read_manifest
from harness.data.prepare import Means, Recipe
from harness.data.progress import StageProgress
from harness.errors import UserError

pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")

RULES = """
rules:
  - one-line
  - length: {min_characters: 4, max_characters: 100000}
  - exact-duplicates
"""


class Quiet(StageProgress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def show(self, *_) -> None:
        pass

    def say(self, line: str) -> None:
        self.said.append(line)


def corpus(path: Path, count: int = 600, seed: int = 0, key: str = "text") -> Path:
    rng = random.Random(seed)
    rows = [
        " ".join(str(rng.randrange(99)) for _ in range(rng.randint(1, 30))) for _ in range(count)
    ]
    path.write_text("".join(json.dumps({"id": 0, key: text}) + "\n" for text in rows))
    return path


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 2000)
    return Recipe("mine", str(corpus(tmp_path / "in.jsonl")), tokenizer="null:100")


def make(
    recipe: Recipe, folder: Path, workers: int = 1, **means
) -> tuple[prepare.Manifest, list[str]]:
    progress = Quiet()
    return prepare.prepare(
        recipe, Means(folder=folder, workers=workers, **means), progress
    ), progress.said


def pair(folder: Path, name: str = "mine") -> tuple[bytes, bytes]:
    prefix = data_sets.prefix_of(name, folder)
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def test_a_prepared_set_is_found_with_all_that_is_known_of_it(tmp_path, recipe):
    manifest, _ = make(recipe, tmp_path / "data")
    found = data_sets.find("mine", tmp_path / "data")
    assert (
        (found.documents, found.tokens)
        == (manifest.counted.documents, manifest.counted.tokens)
        == (600, found.tokens)
    )
    assert (found.tokenizer_type, found.tokenizer_model, found.vocab_size) == (
        "NullTokenizer",
        None,
        100,
    )
    assert data_sets.prepared_names(tmp_path / "data") == ("mine",)
    assert read_manifest(tmp_path / "data" / "mine") == manifest
    assert manifest.source.files[0].bytes == (tmp_path / "in.jsonl").stat().st_size
    assert len(manifest.source.files[0].sha256) == 64
    assert manifest.tokenizer.by == "harness"
    names = sorted(path.name for path in (tmp_path / "data" / "mine").iterdir())
    assert names == [
        "manifest.json",
        "mine_text_document.bin",
        "mine_text_document.idx",
        "tokenizer",
    ]


def test_what_is_prepared_stays_until_something_changes(tmp_path, recipe):
    data = tmp_path / "data"
    make(recipe, data)
    first, stamp = pair(data), idx_path(data_sets.prefix_of("mine", data)).stat().st_mtime_ns
    assert make(recipe, data)[1] == ["mine is prepared already; FORCE=1 prepares it again"]
    assert idx_path(data_sets.prefix_of("mine", data)).stat().st_mtime_ns == stamp
    make(recipe, data, force=True)
    assert pair(data) == first
    assert idx_path(data_sets.prefix_of("mine", data)).stat().st_mtime_ns != stamp
    for changed in (
        replace(recipe, append_eod=False),
        replace(recipe, tokenizer="null:200"),
        replace(recipe, layout=TextLayout(limit=50)),
    ):
        kept = pair(data)
        with pytest.raises(
            UserError,
            match=r"^NAME=mine is prepared already, .*it has [\d,]+ tokens, from .*\n.*FORCE=1 replaces",
        ):
            make(changed, data)
        assert pair(data) == kept
        assert not make(changed, data, force=True)[1]
        assert pair(data) != first
    corpus(tmp_path / "in.jsonl", seed=1)
    (data / "mine" / "cache" / "old").mkdir(parents=True)
    with pytest.raises(UserError, match="is prepared already, from other input"):
        make(recipe, data)
    assert (data / "mine" / "cache" / "old").exists()
    make(recipe, data, force=True)
    assert pair(data) != first
    assert not (data / "mine" / "cache").exists()


def test_a_damaged_set_is_prepared_anew(tmp_path, recipe):
    data = tmp_path / "data"
    make(recipe, data)
    first = pair(data)
    bin_path(data_sets.prefix_of("mine", data)).write_bytes(first[0][:-2])
    make(recipe, data)
    assert pair(data) == first
    (data / "mine" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"_document\.idx is there, without a manifest"):
        make(recipe, data)
    make(recipe, data, force=True)
    assert pair(data) == first


def test_the_old_set_stays_usable_while_a_new_one_fails(tmp_path, recipe, monkeypatch):
    data = tmp_path / "data"
    make(recipe, data)
    first = pair(data)
    corpus(tmp_path / "in.jsonl", seed=1)

    def full(file, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = indexed._write
    monkeypatch.setattr(indexed, "_write", full)
    with pytest.raises(UserError, match="is full"):
        make(recipe, data, force=True)
    assert pair(data) == first
    data_sets.find("mine", data)
    monkeypatch.setattr(indexed, "_write", write)
    make(recipe, data, force=True)
    assert pair(data) != first


def test_two_preparations_of_one_name_do_not_meet(tmp_path, recipe, monkeypatch):
    data = tmp_path / "data"
    entered, leave = threading.Event(), threading.Event()
    run = prepare._Preparation.run

    def slow(self):
        entered.set()
        leave.wait(10)
        return run(self)

    monkeypatch.setattr(prepare._Preparation, "run", slow)
    first = threading.Thread(target=make, args=(recipe, data))
    first.start()
    entered.wait(10)
    monkeypatch.setattr(prepare._Preparation, "run", run)
    with pytest.raises(UserError, match=f"process {os.getpid()} prepares mine already"):
        make(recipe, data)
    make(replace(recipe, name="other"), data)
    leave.set()
    first.join()
    assert pair(data) == pair(data, "other")
    assert not (data / "mine" / ".lock").exists()


def test_a_preparation_that_cannot_begin_leaves_nothing(tmp_path, recipe):
    with pytest.raises(UserError, match="no such file or folder"):
        make(replace(recipe, source=str(tmp_path / "missing.jsonl")), tmp_path / "data")
    with pytest.raises(UserError, match="no tokenizer"):
        make(replace(recipe, tokenizer="gtp2"), tmp_path / "data")
    assert not (tmp_path / "data" / "mine").exists()
    for name in ("Mine", "a/b", "", ".x", "mock", "a b"):
        with pytest.raises(UserError, match="NAME="):
            make(replace(recipe, name=name), tmp_path / "data")


def test_cleaned_text_is_tokenised_and_counted(tmp_path, recipe):
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    source = tmp_path / "in.jsonl"
    source.write_text(
        source.read_text() + '{"text": "1"}\nno json\n{"text": "1 2 3 4"}\n{"text": "1 2  3 4"}\n'
    )
    data = tmp_path / "data"
    manifest, _ = make(replace(recipe, rules=rules), data)
    assert manifest.cleaned.documents_in == 604
    assert manifest.cleaned.dropped["unreadable"] == 1
    assert manifest.cleaned.dropped["exact-duplicates"] >= 1
    assert (
        manifest.cleaned.documents_out
        == manifest.counted.documents
        == data_sets.find("mine", data).documents
    )
    assert manifest.source.files[0].sha256
    work = {path.name.partition("-")[0] for path in (data / "mine" / "work").iterdir()}
    assert work == {"clean", "source"}
    # Another tokenizer does not clean again: the source may even be gone from where it was made.
    clean = next((data / "mine" / "work").glob("clean-*/manifest.json")).stat().st_mtime_ns
    make(replace(recipe, rules=rules, tokenizer="null:200"), data, force=True)
    assert next((data / "mine" / "work").glob("clean-*/manifest.json")).stat().st_mtime_ns == clean


def test_other_files_become_json_lines_before_cleaning(tmp_path, recipe):
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    plain, _ = make(replace(recipe, rules=rules), tmp_path / "a")
    other = corpus(tmp_path / "other.jsonl", key="content")
    other.write_text(other.read_text() + '{"content": 3}\n')
    recipe = replace(recipe, source=str(other), layout=TextLayout(key="content"), rules=rules)
    manifest, _ = make(recipe, tmp_path / "b")
    assert pair(tmp_path / "a") == pair(tmp_path / "b")
    assert manifest.source.skipped == {"no text": 1}
    assert manifest.source.files[0].sha256
    assert manifest.counted == plain.counted
    assert not list((tmp_path / "b" / "mine" / "work").glob("text-*"))


class _Counter:
    """Kills this process at its ``fatal``-th change of a file."""

    def __init__(self, fatal: int | None) -> None:
        self.count, self.fatal = 0, fatal

    def tick(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch):
        with monkeypatch.context() as patch:
            for owner, name in [
                (indexed, "_write"),
                (Path, "replace"),
                (Path, "unlink"),
                (Path, "mkdir"),
                (Path, "rmdir"),
                (os, "fdatasync"),
                (os, "fsync"),
                (tokenize._Run, "_append"),
            ]:
                patch.setattr(owner, name, self._counted(getattr(owner, name)))
            yield self

    def _counted(self, function: Callable) -> Callable:
        def counted(*arguments, **more):
            self.tick()
            result = function(*arguments, **more)
            self.tick()
            return result

        return counted


@pytest.mark.parametrize("kind", ["plain", "cleaned", "over an old one"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, recipe, monkeypatch, kind):
    """24 processes end by SIGKILL at random changes of files, each going on where the one before was."""
    if kind == "cleaned":
        (tmp_path / "rules.yaml").write_text(RULES)
        source = corpus(tmp_path / "in.jsonl", key="content")
        recipe = replace(
            recipe,
            rules=tmp_path / "rules.yaml",
            layout=TextLayout(key="content"),
            source=str(source),
        )
    monkeypatch.setattr(tokenize, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(tokenize, "_WATCH_S", 0.0005)
    with _Counter(None).watching(monkeypatch) as dry:
        whole, _ = make(recipe, tmp_path / "whole")
    rng = random.Random(kind)
    data, kills, old, force = tmp_path / "data", 0, None, kind == "over an old one"
    while kills < 24:
        if kind == "over an old one" and not (data / "mine").exists():
            make(replace(recipe, append_eod=False), data)
            old = pair(data)
        fatal = (
            rng.randint(1, dry.count)
            if rng.random() < 0.7
            else rng.randint(max(1, dry.count - 80), dry.count)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            with _Counter(fatal).watching(monkeypatch):
                make(recipe, data, workers=1 if kind == "cleaned" else 3, force=force)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        try:
            data_sets.find("mine", data)
        except UserError:
            pass
        else:
            assert pair(data) in (old, pair(tmp_path / "whole"))
        if not os.WIFSIGNALED(status) or rng.random() < 0.15:
            final, _ = make(recipe, data, force=force)
            assert pair(data) == pair(tmp_path / "whole")
            assert final.counted == whole.counted
            assert final.written == whole.written
            assert final.source.files == whole.source.files
            for path in sorted((data / "mine").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            (data / "mine").rmdir()


@pytest.fixture
def mirror(tmp_path) -> Path:
    """A folder shaped like a hub: a repository with two Parquet files and one of zstd."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    home = tmp_path / "hub" / "someone" / "texts"
    (home / "data").mkdir(parents=True)
    for number in range(2):
        rows = [f"{number} {row}" for row in range(50)]
        parquet.write_table(
            pyarrow.table({"text": rows}), home / "data" / f"train-0000{number}-of-00002.parquet"
        )
    lines = "".join(json.dumps({"content": f"7 {row}"}) + "\n" for row in range(30)).encode()
    (home / "part_1.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    (home / "README.md").write_text("---\nlicense: mit\n---\n# Texts\n")
    return tmp_path / "hub"


def test_a_hub_shaped_folder_is_read_as_the_hub_is(tmp_path, mirror):
    hub = Hub(repository="someone/texts", revision="main", files="data/train-*.parquet")
    manifest, said = make(
        Recipe("mine", hub, tokenizer="null:100"), tmp_path / "data", mirror=mirror
    )
    assert manifest.counted.documents == 100
    assert [file.name for file in manifest.source.files] == [
        f"data/train-0000{n}-of-00002.parquet" for n in range(2)
    ]
    assert (manifest.source.kind, manifest.source.asked["repository"]) == ("hub", "someone/texts")
    assert said[-1] == "someone/texts: data/train-00001-of-00002.parquet (2 of 2)"
    packed = Hub(repository="someone/texts", revision="main", files="part_*.jsonl.zst")
    recipe = Recipe("packed", packed, TextLayout(key="content"), tokenizer="null:100")
    assert make(recipe, tmp_path / "data", mirror=mirror)[0].counted.documents == 30


def test_no_more_files_are_brought_than_the_limit_needs(tmp_path, mirror):
    hub = Hub(repository="someone/texts", revision="main", files="data/train-*.parquet")
    limited = Recipe("mine", hub, TextLayout(limit=50), tokenizer="null:100")
    manifest, _ = make(limited, tmp_path / "data", mirror=mirror)
    assert (manifest.counted.documents, len(manifest.source.files)) == (50, 1)
    manifest, _ = make(
        replace(limited, layout=TextLayout(limit=51)), tmp_path / "data", mirror=mirror, force=True
    )
    assert (manifest.counted.documents, len(manifest.source.files)) == (51, 2)


def test_a_hub_that_is_not_there_is_named_with_a_way_out(tmp_path, mirror, monkeypatch):
    hub = Hub(repository="someone/texts", revision="main", files="data/train-*.parquet", gated=True)
    recipe = Recipe("mine", hub, tokenizer="null:100")
    with pytest.raises(UserError, match=r"has no someone/texts/ with"):
        make(recipe, tmp_path / "data", mirror=tmp_path)
    with pytest.raises(
        UserError, match=r"nothing\*.parquet of someone/texts at main: .*(no such|No .*) ?files"
    ):
        none = hub.model_copy(update={"files": "nothing*.parquet"})
        make(replace(recipe, source=none), tmp_path / "data", mirror=mirror)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for proxy in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        UserError, match=r"(?s)127.0.0.1 cannot be reached.*accept its conditions.*HUB=<folder>"
    ):
        make(recipe, tmp_path / "data")


@pytest.mark.parametrize(("environment", "asked"), [
    ({}, ("huggingface.co", 443)), ({"HF_ENDPOINT": "http://mirror"}, ("mirror", 80)),
    ({"HF_ENDPOINT": "https://mirror:8443"}, ("mirror", 8443)), ({"HF_HUB_OFFLINE": "1"}, None), ({"ALL_PROXY": "http://p"}, None),
])  # fmt: skip
def test_the_hub_is_asked_for_first_unless_a_proxy_or_a_cache_stands_between(
    monkeypatch, environment, asked
):
    for name in list(os.environ):
        if name.upper() in (
            "HF_ENDPOINT",
            "HF_HUB_OFFLINE",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    places = []
    monkeypatch.setattr(
        sources.socket,
        "create_connection",
        lambda place, timeout: places.append(place) or contextlib.nullcontext(),
    )
    sources._reach_hub(Hub(repository="someone/texts", revision="main", files="*.parquet"))
    assert places == ([asked] if asked else [])


@pytest.mark.cpu
def test_text_made_here_is_prepared_cleaned_and_stays_the_same(tmp_path):
    pytest.importorskip("wordfreq")
    from harness.data.definitions import definition

    known = prepare.recipe_of(definition("synthetic-sv"))
    recipe = replace(
        known, source=known.source.model_copy(update={"size_mb": 2}), tokenizer="null:100"
    )
    with pytest.raises(UserError, match="no ids"):
        make(recipe, tmp_path / "data")
    home = Path(prepare.ROOT) / "data" / "tokenizers"
    if not (home / "gpt2").is_dir():
        pytest.skip("GPT-2's vocabulary is not here: make data-… brings it")
    (tmp_path / "data" / "tokenizers").symlink_to(home)
    recipe = replace(recipe, tokenizer="gpt2")
    first, _ = make(recipe, tmp_path / "data")
    again, _ = make(recipe, tmp_path / "data", force=True)
    assert first.written == again.written
    assert first.cleaned.dropped["near-duplicates"] > 0


def test_a_replacement_goes_on_where_it_was_interrupted(tmp_path, recipe, monkeypatch):
    """FORCE=1 does again what is done; it does not begin the new set anew each time."""
    data = tmp_path / "data"
    make(replace(recipe, append_eod=False), data)
    old = pair(data)
    monkeypatch.setattr(prepare, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(recipe, data, force=True)
    assert pair(data) == old
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "tokenize", lambda *_: pytest.fail("tokenised again"))
    make(recipe, data, force=True)
    assert pair(data) != old


def test_text_that_is_nothing_but_empty_documents_is_refused(tmp_path, recipe):
    from harness.data.chat.byte_tokenizer import byte_folder

    (tmp_path / "in.jsonl").write_text('{"text": ""}\n' * 3)
    for tokenizer, said in (
        (str(byte_folder(tmp_path)), "no text to train on: all 3 documents are empty"),
        ("null:100", "no document in .*: 3 no ids"),
    ):
        with pytest.raises(UserError, match=said):
            make(replace(recipe, tokenizer=tokenizer), tmp_path / "data")
        assert not (tmp_path / "data" / "mine").exists()


def test_rules_that_drop_everything_are_named_with_what_they_dropped(tmp_path, recipe):
    (tmp_path / "rules.yaml").write_text(RULES.replace("min_characters: 4", "min_characters: 9000"))
    with pytest.raises(
        UserError,
        match=r"rules.yaml dropped all 600 documents: 600 length\n.*dropped/ shows which and why",
    ):
        make(replace(recipe, rules=tmp_path / "rules.yaml"), tmp_path / "data")
    assert data_sets.prepared_names(tmp_path / "data") == ()


def test_files_of_others_in_the_folder_of_a_data_set_stay(tmp_path, recipe):
    """Text that somebody keeps in work/, and is the input; a tokenizer that is kept where the set's own would go."""
    work = tmp_path / "data" / "mine" / "work"
    work.mkdir(parents=True)
    source = corpus(work / "in.jsonl")
    (work / "clean-notes").mkdir()
    make(replace(recipe, source=str(source)), tmp_path / "data")
    make(replace(recipe, source=str(source)), tmp_path / "data", force=True)
    assert source.exists() and (work / "clean-notes").is_dir()
    kept = tmp_path / "data" / "other" / "tokenizer" / "tokenizer.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with pytest.raises(
        UserError, match=r"NAME=other is prepared already, .*other/tokenizer is there"
    ):
        make(replace(recipe, name="other"), tmp_path / "data")
    assert kept.read_text() == "{}"
