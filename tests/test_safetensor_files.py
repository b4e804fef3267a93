"""Whatever bytes a safetensors file or its index holds, it is read or refused in words."""

import json
import random
import struct
from pathlib import Path

import pytest

from harness.errors import UserError

torch = pytest.importorskip("torch", reason="the set-up stage `heavy` is not installed")
from harness.convert import safetensor_files  # noqa: E402
from harness.convert.safetensor_files import open_folder  # noqa: E402

WHOLE = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]},
}


def write(folder: Path, header: object, data: bytes = bytes(28)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def changed(**entry: object) -> dict:
    return {**WHOLE, "b": {**WHOLE["b"], **entry}}


def test_a_whole_file_is_read(tmp_path) -> None:
    found = open_folder(write(tmp_path, {"__metadata__": {"format": "pt"}, **WHOLE}))
    assert found.read("a").shape == (2, 3) and found.read("b").dtype == torch.uint8


@pytest.mark.parametrize("header", [
    changed(data_offsets=[24.0, 28]), changed(data_offsets=[24, 28.0]), changed(data_offsets=[True, 28]), changed(data_offsets=["24", 28]),
    changed(data_offsets=[24]), changed(data_offsets=[24, 26, 28]), changed(data_offsets=None), changed(data_offsets=[28, 24]),
    changed(data_offsets=[-4, 28]), changed(shape=[4.0]), changed(shape=4), changed(shape=[-4]), changed(shape=["4"]),
    changed(shape=[10**400]), changed(shape=[5]), changed(dtype=["U8"]), changed(dtype=None), changed(dtype="F99"),
    changed(data_offsets=[0, 28], shape=[28]), {"a": WHOLE["b"]}, changed(data_offsets=[24, 10**30], shape=[10**30 - 24]),
    {}, [], b"\xff\xfe", b"[" * 100_000, {"a": 5}, {"a": None}, b"",
])  # fmt: skip
def test_a_header_that_says_nonsense_is_refused(tmp_path, header) -> None:
    with pytest.raises(UserError, match=r"is damaged or cut off: .*\nfetch it again"):
        open_folder(write(tmp_path, header))


@pytest.mark.parametrize(
    "shard",
    ["x" * 5000, "å" * 200, "../model.safetensors", "/etc/passwd", "", ".", "..", "a\0b", "\ud800"],
)
def test_an_index_that_names_no_file_is_damaged(tmp_path, shard) -> None:
    write(tmp_path, WHOLE)
    (tmp_path / safetensor_files.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"index.json is damaged: it has no weight_map"):
        open_folder(tmp_path)


def test_an_index_of_any_bytes_is_read_or_refused(tmp_path) -> None:
    write(tmp_path, WHOLE)
    for text in (
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"null",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": null}}',
        b"",
    ):
        (tmp_path / safetensor_files.INDEX).write_bytes(text)
        with pytest.raises(UserError, match="is damaged"):
            open_folder(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_and_lost_bytes_end_in_words(tmp_path, seed) -> None:
    whole = bytearray(
        write(tmp_path, {"__metadata__": {"format": "pt"}, **WHOLE})
        .joinpath("model.safetensors")
        .read_bytes()
    )
    rng, refused = random.Random(seed), 0
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged) - 28)
            damaged[at] = rng.choice(
                [
                    rng.randrange(256),
                    ord('"'),
                    ord("}"),
                    ord("0"),
                    ord("-"),
                    ord("."),
                    ord("e"),
                    ord("9"),
                ]
            )
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            for stored in open_folder(tmp_path).values():
                stored.read()
        except UserError:
            refused += 1
    assert refused > 100
