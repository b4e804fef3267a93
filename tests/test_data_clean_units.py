"""Cutting files into units of whole lines."""

import random

import pytest

from harness.data.clean import units


def lines_of(path, unit_bytes):
    return [line for unit in units.cut([path], unit_bytes) for line in unit.lines()]


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 64, 1000, 10**6])
def test_units_hold_every_line_once_and_in_order(tmp_path, unit_bytes):
    generator = random.Random(unit_bytes)
    for case in range(20):
        pieces = [
            b"x" * generator.choice([0, 0, 1, 5, 70, 300]) for _ in range(generator.randrange(60))
        ]
        content = b"\n".join(pieces) + (b"\n" if case % 2 else b"")
        path = tmp_path / f"{case}.jsonl"
        path.write_bytes(content)
        found = lines_of(path, unit_bytes)
        assert [line.rstrip(b"\n") for _, line in found] == [piece for piece in pieces if piece]
        assert all(content[at : at + len(line)] == line for at, line in found)
        assert all(at == 0 or content[at - 1 : at] == b"\n" for at, _ in found)


def test_units_are_numbered_over_all_files(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, size in zip(paths, (25, 0, 10), strict=True):
        path.write_bytes(b"x" * size)
    found = [(unit.number, unit.path.name, unit.start, unit.end) for unit in units.cut(paths, 10)]
    assert found == [(0, "a", 0, 10), (1, "a", 10, 20), (2, "a", 20, 25), (3, "c", 0, 10)]


def test_a_line_too_long_is_cut_off_and_the_next_one_found(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "LONGEST_LINE_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"one\n" + b"x" * 5000 + b"\ntwo\n" + b"y" * 100 + b"\n" + b"z" * 101)
    for unit_bytes in (10, 300, 10**6):
        found = [line for _, line in lines_of(path, unit_bytes)]
        assert found == [b"one\n", b"x" * 101, b"two\n", b"y" * 100 + b"\n", b"z" * 101]
