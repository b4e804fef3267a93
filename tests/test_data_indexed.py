"""The .bin/.idx format: the bytes that upstream writes, and a reader that nothing in a file can surprise."""

import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from harness.data import indexed
from harness.data.indexed import FormatError, Marks, PairWriter

UINT16, INT32 = indexed.DTYPES[8], indexed.DTYPES[4]
EOD = 9


def documents(seed: int, count: int, vocab: int = 60000) -> list[list[list[int]]]:
    """Documents of sequences of ids; some documents are empty, some have several sequences."""
    rng = random.Random(seed)
    return [
        [
            [rng.randrange(vocab) for _ in range(rng.randint(1, 40))]
            for _ in range(rng.choice([0, 1, 1, 1, 3]))
        ]
        for _ in range(count)
    ]


def append(writer: PairWriter, docs: list[list[list[int]]]) -> None:
    sequences = [sequence for doc in docs for sequence in doc]
    ids = np.array([i for sequence in sequences for i in sequence], np.uint32)
    writer.append(ids, np.array([len(s) for s in sequences]), np.cumsum([len(doc) for doc in docs]))


def write(
    prefix: Path, docs: list[list[list[int]]], dtype: np.dtype = UINT16, blocks: int = 3
) -> indexed.Pair:
    writer = PairWriter(prefix, dtype)
    size = -(-len(docs) // blocks) or 1
    for start in range(0, len(docs), size):
        append(writer, docs[start : start + size])
    return writer.finish()


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return indexed.bin_path(prefix).read_bytes(), indexed.idx_path(prefix).read_bytes()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [UINT16, INT32])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_the_pair_is_the_one_that_upstreams_builder_writes(tmp_path, dtype, count):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    docs = documents(count, count)
    builder = IndexedDatasetBuilder(str(tmp_path / "up.bin"), dtype.type)
    for doc in docs:
        builder.add_document(
            [i for sequence in doc for i in sequence], [len(sequence) for sequence in doc]
        )
    builder.finalize(str(tmp_path / "up.idx"))

    written = write(tmp_path / "ours", docs, dtype)
    assert pair(tmp_path / "ours") == pair(tmp_path / "up")
    assert written.marks.documents == count
    if written.marks.tokens:
        theirs = IndexedDataset(str(tmp_path / "ours"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == [
            sequence for doc in docs for sequence in doc
        ]


@pytest.mark.cpu
def test_merged_shards_are_the_ones_that_upstream_merges(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    shards = [tmp_path / f"shard{n}" for n in range(4)]
    for n, shard in enumerate(shards):
        write(shard, documents(n, [30, 0, 1, 90][n]))
    builder = IndexedDatasetBuilder(str(tmp_path / "up.bin"), np.uint16)
    for shard in shards:
        builder.add_index(str(shard))
    builder.finalize(str(tmp_path / "up.idx"))

    indexed.merge(shards, tmp_path / "ours")
    assert pair(tmp_path / "ours") == pair(tmp_path / "up")


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(None, INT32), (65499, UINT16), (65500, INT32), (50257, UINT16)]
)
def test_ids_are_stored_as_upstream_chooses(vocab, dtype):
    assert indexed.best_dtype(vocab) == dtype


def test_merging_gives_what_writing_at_once_gives(tmp_path):
    docs = documents(1, 200)
    write(tmp_path / "whole", docs)
    for n in range(5):
        write(tmp_path / f"part{n}", docs[n * 40 : n * 40 + 40])
    merged = indexed.merge([tmp_path / f"part{n}" for n in range(5)], tmp_path / "merged")
    assert pair(tmp_path / "merged") == pair(tmp_path / "whole")
    assert merged.bin_sha256 == hashlib.sha256(pair(tmp_path / "whole")[0]).hexdigest()
    assert merged.idx_sha256 == hashlib.sha256(pair(tmp_path / "whole")[1]).hexdigest()


def test_shards_of_different_dtypes_do_not_merge(tmp_path):
    write(tmp_path / "a", documents(1, 3), UINT16)
    write(tmp_path / "b", documents(1, 3), INT32)
    with pytest.raises(FormatError, match="do not merge"):
        indexed.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_the_reader_gives_back_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", 7)
    docs = documents(2, 300)
    write(tmp_path / "x", docs)
    index = indexed.check_pair(tmp_path / "x")
    assert index.documents == len(docs)
    assert index.lengths.tolist() == [len(s) for doc in docs for s in doc]
    assert index.document_tokens().tolist() == [sum(map(len, doc)) for doc in docs]
    assert index.tokens == sum(len(s) for doc in docs for s in doc)


def test_an_interrupted_writer_goes_on_where_its_marks_say(tmp_path):
    docs = documents(3, 100)
    write(tmp_path / "whole", docs)
    writer = PairWriter(tmp_path / "x", UINT16)
    append(writer, docs[:40])
    marks = writer.marks
    append(writer, docs[40:70])  # after the marks: lost, and written again
    writer.close()
    resumed = PairWriter(tmp_path / "x", UINT16, marks)
    append(resumed, docs[40:])
    finished = resumed.finish()
    assert pair(tmp_path / "x") == pair(tmp_path / "whole")
    assert finished.bin_sha256 == hashlib.sha256(pair(tmp_path / "x")[0]).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "whole.bin",
        "whole.idx",
        "x.bin",
        "x.idx",
    ]


def test_marks_beyond_the_parts_are_refused(tmp_path):
    writer = PairWriter(tmp_path / "x", UINT16)
    append(writer, documents(1, 5))
    writer.close()
    with pytest.raises(FormatError, match="fewer than"):
        PairWriter(tmp_path / "x", UINT16, Marks(10**6, 5, 5))


def test_until_it_is_finished_there_is_no_pair(tmp_path):
    writer = PairWriter(tmp_path / "x", UINT16)
    append(writer, documents(1, 5))
    writer.sync()
    assert not indexed.bin_path(tmp_path / "x").exists()
    assert not indexed.idx_path(tmp_path / "x").exists()
    with pytest.raises(FormatError, match="No such file"):
        indexed.check_pair(tmp_path / "x")


def test_an_older_index_never_stands_beside_the_new_tokens(tmp_path, monkeypatch):
    """Stopped between the two names, it leaves no pair."""
    write(tmp_path / "x", documents(1, 5))
    replace = Path.replace

    def stopped(path, target):
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", documents(2, 5))
    assert not indexed.idx_path(tmp_path / "x").exists()


def good(prefix: Path) -> bytearray:
    docs = [[[1, 2, EOD]], [], [[3], [4, EOD]], [[5, 6, 7, EOD]]]
    write(prefix, docs)
    return bytearray(indexed.idx_path(prefix).read_bytes())


BAD = {
    "empty": (lambda b: b"", "is empty"),
    "magic": (lambda b: b"MMIDIDY" + b[7:], "does not begin with"),
    "header cut": (lambda b: b[:20], "within its header"),
    "version": (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version 2"),
    "dtype": (lambda b: b[:17] + b"\x63" + b[18:], "dtype 99"),
    "truncated": (lambda b: b[:-1], "truncated"),
    "longer": (lambda b: b + b"\0", "too long"),
    "sequences beyond memory": (lambda b: b[:18] + struct.pack("<Q", 2**63) + b[26:], "truncated"),
    "no documents": (lambda b: b[:26] + struct.pack("<Q", 0) + b[34:], "documents \\+ 1"),
    "negative length": (
        lambda b: b[:34] + struct.pack("<i", -3) + b[38:],
        "sequence 0 has length -3",
    ),
    "length": (lambda b: b[:34] + struct.pack("<i", 4) + b[38:], "sequence 1 points to byte"),
    "first document": (lambda b: b[:-40] + struct.pack("<q", 1) + b[-32:], "begins at sequence 1"),
    "documents backwards": (
        lambda b: b[:-24] + struct.pack("<q", 0) + b[-16:],
        "ends before it begins",
    ),
    "missing end": (lambda b: b[:-8] + struct.pack("<q", 3), "an end is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_index_is_named(tmp_path, name):
    spoil, message = BAD[name]
    indexed.idx_path(tmp_path / "x").write_bytes(spoil(bytes(good(tmp_path / "x"))))
    with pytest.raises(FormatError, match=message):
        indexed.check_pair(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"), [(-1, "truncated"), (-20, "truncated"), (1, "too long")]
)
def test_a_bin_of_another_size_is_named(tmp_path, change, message):
    good(tmp_path / "x")
    path = indexed.bin_path(tmp_path / "x")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(FormatError, match=message):
        indexed.check_pair(tmp_path / "x")


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_ids_outside_the_vocabulary_are_named_with_their_document(tmp_path, monkeypatch, block):
    monkeypatch.setattr(indexed, "_BLOCK", block)
    good(tmp_path / "x")
    index = indexed.check_pair(tmp_path / "x")
    found = indexed.check_tokens(tmp_path / "x", index, vocab_size=10, eod=EOD)
    assert (found.highest, found.inner_ends) == (9, 0)
    assert found.sha256 == hashlib.sha256(indexed.bin_path(tmp_path / "x").read_bytes()).hexdigest()
    write(tmp_path / "y", [[[1, 2]], [], [[3], [4, 8]], [[8]]])
    with pytest.raises(
        FormatError, match="document 2 has id 8 as its token 2; the vocabulary is 0 to 7"
    ):
        indexed.check_tokens(tmp_path / "y", indexed.check_pair(tmp_path / "y"), vocab_size=8)


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_a_document_without_its_end_is_named(tmp_path, monkeypatch, block):
    monkeypatch.setattr(indexed, "_BLOCK", block)
    write(tmp_path / "x", [[[1, 2, EOD]], [], [[3, EOD, 4], [5, EOD]], [[5, 6, 7]]])
    index = indexed.check_pair(tmp_path / "x")
    with pytest.raises(FormatError, match="document 3 ends with id 7, not with end-of-document 9"):
        indexed.check_tokens(tmp_path / "x", index, vocab_size=10, eod=EOD)


def test_ends_within_documents_are_counted(tmp_path):
    write(tmp_path / "x", [[[1, EOD, EOD]], [[3, EOD, 4], [5, EOD]]])
    index = indexed.check_pair(tmp_path / "x")
    assert indexed.check_tokens(tmp_path / "x", index, vocab_size=10, eod=EOD).inner_ends == 2


def fuzz(tmp_path: Path, count: int, seed: int) -> int:
    """Read ``count`` mutated indices; returns how many still were whole ones."""
    rng = random.Random(seed)
    write(tmp_path / "x", documents(seed, 12))
    whole = bytes(indexed.idx_path(tmp_path / "x").read_bytes())
    path = tmp_path / "y.idx"
    indexed.bin_path(tmp_path / "y").write_bytes(indexed.bin_path(tmp_path / "x").read_bytes())
    still = 0
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            at = (
                rng.randrange(len(data))
                if rng.random() < 0.5
                else rng.randrange(min(64, len(data)))
            )
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + 8] = struct.pack(
                        "<Q", rng.choice([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
                    )
                case 2:
                    del data[at : at + rng.choice([1, 4, 9, len(data)])]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 9))
                case _:
                    data[at : at + 4] = struct.pack("<i", rng.choice([-1, 0, 2**31 - 1, -(2**31)]))
            data = data or bytearray(b"\0")
        path.write_bytes(data)
        try:
            index = indexed.check_pair(tmp_path / "y")
            indexed.check_tokens(tmp_path / "y", index, vocab_size=65500, eod=1)
        except FormatError:
            continue
        else:
            still += 1
    return still


def test_no_mutated_index_crashes_the_reader(tmp_path):
    assert fuzz(tmp_path, 1500, seed=4) < 1500


@pytest.mark.full
def test_none_of_100_000_mutated_indices_crashes_the_reader(tmp_path):
    for seed in range(20):
        assert fuzz(tmp_path, 5000, seed) < 5000
