"""Documents in, .bin/.idx out: the bytes that upstream's tool writes, in little memory, after any interruption."""

import errno
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.data import documents, indexed, tokenize
from harness.data.documents import TextLayout, text_file
from harness.data.header import bin_path, idx_path
from harness.data.indexed import DTYPES, PairWriter
from harness.data.tokenize import Job
from harness.data.tokenizer import Tokenizer, find_tokenizer
from harness.errors import UserError

pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")

TEXT = TextLayout()


def null(size: int = 60000) -> Tokenizer:
    return find_tokenizer(f"null:{size}", Path())


def job(
    *paths: Path,
    prefix: Path,
    tokenizer: Tokenizer | None = None,
    layout: TextLayout = TEXT,
    eod: bool = True,
) -> Job:
    return Job(tuple(text_file(path) for path in paths), layout, tokenizer or null(), eod, prefix)


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def ids(rng: random.Random, most: int = 30) -> str:
    return " ".join(str(rng.randrange(59999)) for _ in range(rng.randint(1, most)))


def corpus(path: Path, count: int = 2000, seed: int = 0, sentences: bool = False) -> Path:
    """Documents of ids, some bad lines among them; sentences: some documents are lists of them, some of these empty."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(count):
            text: object = ids(rng)
            if sentences and rng.random() < 0.4:
                text = [ids(rng) for _ in range(rng.randint(0, 4))]
            line = json.dumps({"text": text}).encode()
            if rng.random() < 0.02:
                line = rng.choice(
                    [b"", b"no json", b'{"text": "x y"}', b'{"id": 3}', b'{"text": "\xff"}']
                )
            file.write(line + b"\n")
    return path


def expected(
    path: Path, prefix: Path, vocab_size: int = 60000, eod: bool = True
) -> tuple[bytes, bytes]:
    """What upstream's encoder and builder make of the good lines, written down plainly."""
    tokens, lengths, ends = [], [], []
    for line in path.read_bytes().split(b"\n"):
        try:
            text = json.loads(line)["text"]
            sentences = [
                [int(word) for word in part.split(" ")]
                for part in ([text] if isinstance(text, str) else text)
            ]
        except (ValueError, KeyError):
            continue
        sentences = [each for each in sentences if each]
        if sentences and eod:
            sentences[-1].append(vocab_size - 1)
        tokens += itertools.chain.from_iterable(sentences)
        lengths += map(len, sentences)
        ends.append(len(lengths))
    writer = PairWriter(prefix, indexed.best_dtype(vocab_size))
    writer.append(np.array(tokens), np.array(lengths, np.int64), np.array(ends, np.int64))
    writer.finish()
    return pair(prefix)


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("eod", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("vocab_size", [60000, 70000])
def test_the_pair_is_what_a_plain_loop_writes(
    tmp_path, monkeypatch, sentences, eod, workers, vocab_size
):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 5000)
    path = corpus(tmp_path / "x.jsonl", sentences=sentences)
    wanted = expected(path, tmp_path / "plain", vocab_size, eod)
    done = tokenize.tokenize(
        job(path, prefix=tmp_path / "x", tokenizer=null(vocab_size), eod=eod), workers=workers
    )
    assert pair(tmp_path / "x") == wanted
    index = indexed.check_pair(tmp_path / "x")
    assert (done.counts.documents, done.counts.tokens) == (index.documents, index.tokens)
    assert done.counts.documents + sum(done.counts.skipped.values()) == done.counts.records == 2000
    assert set(done.counts.skipped) == {"blank", "no JSON", "no ids", "no text", "no UTF-8"}
    assert done.counts.empty == int(np.count_nonzero(index.document_tokens() == 0))
    assert (done.counts.empty > 0) == sentences
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.state.json"))


def test_several_files_of_several_kinds_are_one_after_another(tmp_path):
    first, second = corpus(tmp_path / "a.jsonl", 300, 1), corpus(tmp_path / "b.jsonl", 300, 2)
    together = tmp_path / "c.jsonl"
    together.write_bytes(first.read_bytes() + second.read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(second.read_bytes()))
    wanted = expected(together, tmp_path / "plain")
    done = tokenize.tokenize(job(first, tmp_path / "b.jsonl.gz", prefix=tmp_path / "x"))
    assert pair(tmp_path / "x") == wanted
    assert [len(digest) for digest in done.source_sha256.values()] == [64, 64]


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("seed", range(8))
def test_a_run_goes_on_from_what_was_noted(tmp_path, monkeypatch, seed):
    """Appends fail for good at a random block, after notes at random moments; the parts have more than was noted."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 3000)
    rng = random.Random(seed)
    path = corpus(tmp_path / "x.jsonl", 1500, seed, sentences=True)
    wanted = expected(path, tmp_path / "plain")
    append = tokenize._Run._append

    def dying(self, number, block, encoded):
        if rng.random() < 0.1:
            raise Killed
        append(self, number, block, encoded)
        if rng.random() < 0.5:
            tokenize._Run._checkpoint(self)

    monkeypatch.setattr(tokenize._Run, "_append", dying)
    resumed = set()
    for _ in range(300):
        try:
            run = tokenize._Run(job(path, prefix=tmp_path / "x"), 1)
            resumed.add(run.place.offset)
            done = run.finish(lambda *now: None)
            break
        except Killed:
            for part in tmp_path.glob("x.*.part"):
                with part.open("ab") as file:
                    file.write(rng.randbytes(rng.randint(0, 50)))
    assert len(resumed) > 1
    assert pair(tmp_path / "x") == wanted
    monkeypatch.undo()
    fresh = tokenize.tokenize(job(path, prefix=tmp_path / "y"))
    assert (done.counts, done.pair, done.source_sha256) == (
        fresh.counts,
        fresh.pair,
        fresh.source_sha256,
    )


@pytest.mark.parametrize("change", ["input", "tokenizer", "layout", "eod", "parts", "state"])
def test_an_unfinished_run_of_something_else_is_not_taken_up(tmp_path, monkeypatch, change):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 3000)
    path = corpus(tmp_path / "x.jsonl", 500)
    first = job(path, prefix=tmp_path / "x")
    run = tokenize._Run(first, 1)
    encoder = null().encoder()
    for number in range(4):
        block = run.reader.next()
        run._append(number, block, tokenize._encode(block.find().texts, encoder, first))
    run._checkpoint()
    run.writer.close()
    assert tokenize._Run(first, 1).place.offset > 0
    other = first
    match change:
        case "input":
            with path.open("ab") as file:
                file.write(b'{"text": "1"}\n')
        case "tokenizer":
            other = replace(first, tokenizer=null(50000))
        case "layout":
            other = replace(first, layout=TextLayout(limit=100))
        case "eod":
            other = replace(first, append_eod=False)
        case "parts":
            (tmp_path / "x.bin.part").write_bytes(b"")
        case "state":
            first.state.write_text('{"key": 3')
    assert tokenize._Run(other, 1).place.offset == 0


def test_a_full_disk_is_named_and_then_resumed_from(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 3000)
    path = corpus(tmp_path / "x.jsonl", 1000)
    wanted = expected(path, tmp_path / "plain")
    room, write = [20_000], indexed._write

    def full(file, block):
        if len(memoryview(block)) > room[0]:
            file.write(memoryview(block)[: room[0]])
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(memoryview(block))
        write(file, block)

    monkeypatch.setattr(indexed, "_write", full)
    with pytest.raises(UserError, match=r"the disk is full\nmake room and start again: it resumes"):
        tokenize.tokenize(job(path, prefix=tmp_path / "x"))
    assert not bin_path(tmp_path / "x").exists()
    assert not idx_path(tmp_path / "x").exists()
    assert tokenize._Run(job(path, prefix=tmp_path / "x"), 1).place.offset > 0
    monkeypatch.setattr(indexed, "_write", write)
    tokenize.tokenize(job(path, prefix=tmp_path / "x"))
    assert pair(tmp_path / "x") == wanted


def test_an_input_that_changes_meanwhile_is_refused(tmp_path):
    path = corpus(tmp_path / "x.jsonl", 500)

    def touch(*now):
        os.utime(path, ns=(1, 1))

    with pytest.raises(UserError, match="changed while it was read"):
        tokenize.tokenize(job(path, prefix=tmp_path / "x"), touch)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "nothing at all"), (b"no json\n\n", "1 no JSON, 1 blank")]
)
def test_a_source_without_documents_is_refused(tmp_path, content, found):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"no document in .*x.jsonl: {found}"):
        tokenize.tokenize(job(tmp_path / "x.jsonl", prefix=tmp_path / "x"), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_an_error_of_one_thread_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 3000)
    path = corpus(tmp_path / "x.jsonl.gz", 2000)
    path.write_bytes(gzip.compress(path.read_bytes())[:-200])
    before = threading.active_count()
    with pytest.raises(UserError, match="cannot be read"):
        tokenize.tokenize(job(path, prefix=tmp_path / "x"), workers=4)
    assert threading.active_count() == before


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path):
    path = corpus(tmp_path / "x.jsonl", 10)
    endless = replace(null(), eod=None)
    with pytest.raises(UserError, match="no end-of-document token"):
        tokenize.tokenize(job(path, prefix=tmp_path / "x", tokenizer=endless))


def test_progress_counts_up_to_all_bytes(tmp_path):
    path = corpus(tmp_path / "x.jsonl", 3000)
    seen = []
    tokenize.tokenize(job(path, prefix=tmp_path / "x"), lambda *now: seen.append(now))
    assert seen[-1][:2] == (path.stat().st_size, path.stat().st_size)
    assert seen == sorted(seen)


@pytest.mark.full
def test_memory_stays_below_a_gibibyte(tmp_path):
    """400 MB of words that never come again, which the tokenizer would all remember, and a line of 200 MB."""
    pytest.importorskip("gigatoken")
    home = Path(tokenize.__file__).parents[2] / "data" / "tokenizers"
    if not (home / "gpt2").is_dir():
        pytest.skip("GPT-2's vocabulary is not here: make data-… brings it")
    rng = np.random.default_rng(0)
    with (tmp_path / "x.jsonl").open("wb") as file:
        for _ in range(100):
            letters = rng.integers(97, 123, 4_000_000, np.uint8)
            letters[rng.random(len(letters)) < 0.1] = 32
            for start in range(0, len(letters), 10_000):
                file.write(b'{"text": "' + letters[start : start + 10_000].tobytes() + b'"}\n')
        file.write(b'{"text": "' + b"x" * 200_000_000 + b'"}\n')
        file.write(b'{"text": "' + "x å 😀".encode() * 1_500_000 + b'"}\n')
    script = f"""
from pathlib import Path
from harness.data.documents import TextLayout, text_file
from harness.data.tokenize import Job, tokenize
from harness.data.tokenizer import find_tokenizer
files = (text_file(Path({str(tmp_path / "x.jsonl")!r})),)
gpt2 = find_tokenizer("gpt2", Path({str(home)!r}))
done = tokenize(Job(files, TextLayout(), gpt2, True, Path({str(tmp_path / "x")!r})), workers=2)
# not ru_maxrss, which counts the process that started this one, too
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(dict(done.counts.skipped), int(peak.split()[1]) >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=home.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    skipped, mib = done.stdout.rsplit(" ", 1)
    assert skipped == "{'too long': 1}"
    assert int(mib) < 1024


@pytest.mark.cpu
@pytest.mark.parametrize("sentences", [False, True])
def test_the_pair_is_what_upstreams_encoder_and_builder_make(tmp_path, monkeypatch, sentences):
    """The steps of upstream's tools/preprocess_data.py on megatron-core's own tokenizer and builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers import MegatronTokenizer

    monkeypatch.setattr(documents, "BLOCK_BYTES", 5000)
    rng = random.Random(3)
    path = tmp_path / "x.jsonl"
    rows = [ids(rng) for _ in range(500)]
    if sentences:
        rows = [
            [ids(rng) for _ in range(rng.randint(0, 4))] if rng.random() < 0.4 else row
            for row in rows
        ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    upstream = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=60000
    )
    builder = IndexedDatasetBuilder(
        str(tmp_path / "up.bin"), dtype=DType.optimal_dtype(upstream.vocab_size)
    )
    for row in rows:
        parts = [
            upstream.tokenize(sentence) for sentence in ([row] if isinstance(row, str) else row)
        ]
        tokens, lengths = (
            list(itertools.chain.from_iterable(parts)),
            [len(part) for part in parts if part],
        )
        if tokens:
            tokens.append(upstream.eod)
            lengths[-1] += 1
        builder.add_document(tokens, lengths)
    builder.finalize(str(tmp_path / "up.idx"))
    tokenize.tokenize(job(path, prefix=tmp_path / "x"))
    assert pair(tmp_path / "x") == pair(tmp_path / "up")


@pytest.mark.cpu
@pytest.mark.parametrize("eod", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "null"])
def test_the_pair_is_what_upstreams_tool_writes(tmp_path, kind, eod):
    from harness.machine.upstream import locate

    tree = locate()
    if tree is None:
        pytest.skip(
            "upstream's tools/preprocess_data.py is not here: git submodule update --init megatron-lm"
        )
    home = Path(tokenize.__file__).parents[2] / "data" / "tokenizers"
    path = tmp_path / "x.jsonl"
    rng = random.Random(5)
    if kind == "null":
        texts = [ids(rng) for _ in range(400)]
        tokenizer, arguments = (
            null(),
            ["--tokenizer-type", "NullTokenizer", "--vocab-size", "60000"],
        )
    else:
        if not (home / "gpt2").is_dir():
            pytest.skip("GPT-2's vocabulary is not here: make data-… brings it")
        from harness.data.hard_texts import hard_texts

        texts = list(hard_texts(["<|endoftext|>"]))[::7]
        tokenizer = find_tokenizer("gpt2", home)
        arguments = [
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(home / "gpt2"),
        ]
    path.write_text(
        "".join(
            json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) + "\n" for text in texts
        )
    )
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        path,
        "--output-prefix",
        tmp_path / "up",
        "--workers",
        "2",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
    subprocess.run(
        [*command, *arguments, *["--append-eod"][:eod]],
        cwd=tree,
        env=environment,
        check=True,
        capture_output=True,
    )
    tokenize.tokenize(job(path, prefix=tmp_path / "x", tokenizer=tokenizer, eod=eod))
    assert pair(tmp_path / "x") == pair(tmp_path / "up_text_document")
    assert indexed.check_pair(tmp_path / "x").dtype == DTYPES[8]
