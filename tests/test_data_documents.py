"""Documents out of files: what upstream's tool would read is read the same; what it would crash on is counted."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from harness.data import documents
from harness.data.documents import BEGIN, Reader, ReadPosition, TextLayout, text_file
from harness.errors import UserError

pytest.importorskip("orjson", reason="the set-up stage `data` is not installed")


TEXTS = TextLayout()


def read(
    *paths: Path, layout: TextLayout = TEXTS, start: ReadPosition = BEGIN
) -> tuple[list, Counter, list[ReadPosition], Reader]:
    reader = Reader([text_file(path) for path in paths], layout, start)
    texts, skipped, places = [], Counter(), []
    while block := reader.next():
        found = block.find()
        texts += found.texts
        skipped += found.skipped
        places.append(block.end)
    return texts, skipped, places, reader


def jsonl(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )
    return path


def row(text: object, **more: object) -> str:
    return json.dumps({"id": 1, "text": text, **more}, ensure_ascii=random.random() < 0.5)


def test_texts_are_those_of_pythons_own_reader(tmp_path):
    rng = random.Random(1)
    alphabet = ["a", "é", "漢", "😀", '"', "\\", "\n", "\t", "\u2028", "\x7f", "\0", "/", "\ufeff"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 50))) for _ in range(3000)]
    path = jsonl(
        tmp_path / "x.jsonl",
        *(row(text, n=rng.random(), list=[None, {"text": 0}]) for text in texts),
    )
    assert read(path)[0] == texts


ODD = [
    (b'{"text": "a"}\r', ["a"]),
    (b'{"text": "a"}\r{"text": "b"}', ["a", "b"]),
    (b' { "text" : "a" } ', ["a"]),
    (b'{"text": "a", "text": "b"}', ["b"]),
    (b'{"n": NaN, "text": "a"}', ["a"]),
    (b'{"n": 123456789012345678901234567890, "text": "a"}', ["a"]),
    (b'{"text": "\\ud83d\\ude00 \\u0000"}', ["😀 \0"]),
    (b'{"text": ""}', [""]),
    (b'{"text": ["one", "two"]}', [["one", "two"]]),
    (b'{"text": []}', [[]]),
]


@pytest.mark.parametrize(("line", "texts"), ODD)
def test_an_odd_line_is_read_as_upstreams_tool_reads_it(tmp_path, line, texts):
    assert read(jsonl(tmp_path / "x.jsonl", line))[:2] == (texts, Counter())


BAD = [
    (b"", "blank"),
    (b" \t\r", "blank"),
    (b'{"text": "\xff"}', "no UTF-8"),
    (b'\xff\xfe{\x00"\x00', "no UTF-8"),
    (b"not json", "no JSON"),
    (b'{"text": "cut', "no JSON"),
    (b'{"text": "a\x00b"}', "no JSON"),
    (b"\x00" * 50, "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b'{"txt": "a"}', "no text"),
    (b'{"text": null}', "no text"),
    (b'{"text": 3}', "no text"),
    (b'{"text": ["a", 3]}', "no text"),
    (b'"text"', "no text"),
    (b"3", "no text"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b'{"text": ["ok", "\\udfff"]}', "surrogate"),
    (b'{"text": "' + b"x" * 2000 + b'"}', "too long"),
]


@pytest.mark.parametrize(("line", "rule"), BAD)
def test_a_bad_line_is_counted_and_the_others_are_read(tmp_path, line, rule):
    longest = 200_000 if rule != "too long" else 1000
    path = jsonl(tmp_path / "x.jsonl", row("before"), line, row("after"))
    texts, skipped, _, _ = read(path, layout=TextLayout(longest=longest))
    assert texts == ["before", "after"]
    assert skipped == Counter({rule: 1})
    assert rule in documents.RULES


def test_a_byte_order_mark_does_not_cost_the_first_document(tmp_path):
    assert read(jsonl(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + row("a").encode(), row("b")))[0] == [
        "a",
        "b",
    ]


def test_a_json_array_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "x.json").write_text('\n[{"text": "a"},\n{"text": "b"}]')
    with pytest.raises(UserError, match="jq -c"):
        read(tmp_path / "x.json")


def test_a_last_line_without_an_end_is_read(tmp_path):
    (tmp_path / "x.jsonl").write_text(row("a") + "\n" + row("b"))
    assert read(tmp_path / "x.jsonl")[0] == ["a", "b"]


def test_an_empty_file_holds_nothing(tmp_path):
    for name in ("x.jsonl", "x.txt"):
        (tmp_path / name).touch()
        assert read(tmp_path / name)[:2] == ([], Counter())


def test_a_line_beyond_all_measure_is_skipped_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    lines = [
        row("a"),
        row("x" * 50_000),
        row("b"),
        row("c"),
        row("y" * 2990),
        row("z" * 4000),
        row("d"),
    ]
    path = jsonl(tmp_path / "x.jsonl", *lines)
    texts, skipped, places, _ = read(path, layout=TextLayout(longest=3020))
    assert texts == ["a", "b", "c", "y" * 2990, "d"]
    assert skipped == Counter({"too long": 2})
    assert places[-1] == ReadPosition(0, path.stat().st_size, len(lines))


def files(folder: Path, count: int = 300) -> list[Path]:
    """The same documents in every kind of file."""
    rng = random.Random(7)
    texts = ["å" * rng.choice([0, 1, 30, 500]) + str(n) for n in range(count)]
    data = "".join(row(text) + "\n" for text in texts).encode()
    found = [jsonl(folder / "a.jsonl", *data.splitlines())]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    found.append(folder / "b.jsonl.gz")
    (folder / "c.txt").write_text("".join(text + "\n" for text in texts))
    found.append(folder / "c.txt")
    try:
        import pyarrow
        from pyarrow import parquet

        packed = (
            pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:7000], data[7000:])
        )
        (folder / "d.jsonl.zst").write_bytes(b"".join(packed))
        found.append(folder / "d.jsonl.zst")
        parquet.write_table(
            pyarrow.table({"id": range(count), "text": texts}),
            folder / "e.parquet",
            row_group_size=70,
        )
        found.append(folder / "e.parquet")
    except ImportError:
        pass
    return found


@pytest.mark.parametrize("block", [100, 4000, 2 << 20])
def test_every_kind_of_file_gives_the_same_documents_from_any_place(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    paths = files(tmp_path)
    expected = read(paths[0])[0]
    assert len(expected) == 300
    for path in paths:
        texts, skipped, places, _ = read(path)
        assert (texts, skipped) == (expected, Counter()), path.name
        for place in places[:: max(1, len(places) // 7)]:
            assert read(path, start=place)[0] == expected[place.records :], (path.name, place)
    texts, _, places, reader = read(*paths)
    assert texts == expected * len(paths)
    assert len(reader.sha256) == len(paths)
    middle = places[len(places) // 2]
    again, _, _, resumed = read(*paths, start=middle)
    assert again == texts[middle.records :]
    assert resumed.sha256 == reader.sha256


@pytest.mark.parametrize("limit", [1, 70, 71, 299, 300, 301, 450])
@pytest.mark.parametrize("block", [100, 2 << 20])
def test_a_limit_counts_over_all_files(tmp_path, monkeypatch, limit, block):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    for path in files(tmp_path):
        other = jsonl(tmp_path / "z.jsonl", *(row(str(n)) for n in range(200)))
        whole = read(path, other)[0]
        texts, _, places, _ = read(path, other, layout=TextLayout(limit=limit))
        assert texts == whole[:limit]
        assert places[-1].records == min(limit, 500)


def test_a_packed_file_that_is_cut_short_is_refused(tmp_path):
    for path in files(tmp_path):
        if path.suffix in (".gz", ".zst"):
            path.write_bytes(path.read_bytes()[:-9])
            with pytest.raises(UserError, match=f"{path.name} cannot be read"):
                read(path)
            path.write_bytes(b"nothing packed at all")
            with pytest.raises(UserError, match=f"{path.name} cannot be read"):
                read(path)


def test_a_missing_file_and_an_unknown_ending_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "x.jsonl")
    for name in ("x.csv", "x", "x.parquet.gz", "x.gz", "jsonl"):
        with pytest.raises(UserError, match="known endings"):
            text_file(tmp_path / name)


def test_plain_text_is_a_document_a_line_or_a_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\r\n\n  two \n\xff\nthree")
    assert read(path)[:2] == (["one", "  two ", "three"], Counter({"blank": 1, "no UTF-8": 1}))
    assert read(path, layout=TextLayout(each="file"))[:2] == ([], Counter({"no UTF-8": 1}))
    path.write_bytes(b"one\r\n\ntwo\n")
    assert read(path, layout=TextLayout(each="file"))[:2] == (["one\r\n\ntwo\n"], Counter())
    assert read(path, layout=TextLayout(each="file", longest=5))[:2] == (
        [],
        Counter({"too long": 1}),
    )


def test_parquet_rows_without_text_are_counted(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    broken = pyarrow.array([b"a", b"\xff", None, b"b"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": broken}), path)
    assert read(path)[:2] == (["a", "b"], Counter({"no UTF-8": 1, "no text": 1}))
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 4, broken.buffers())
    parquet.write_table(pyarrow.table({"text": raw}), path)
    assert read(path)[:2] == (["a", "b"], Counter({"no UTF-8": 1, "no text": 1}))
    parquet.write_table(pyarrow.table({"text": [["a", "b"], [], ["c"], None]}), path)
    assert read(path)[:2] == ([["a", "b"], [], ["c"]], Counter({"no text": 1}))
    parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    with pytest.raises(UserError, match=r"no column 'text'.*content"):
        read(path)
    assert read(path, layout=TextLayout(key="content"))[0] == ["a"]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="int64"):
        read(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
