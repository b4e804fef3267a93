"""Files in Hugging Face's safetensors format, read and written a tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
data_offsets) and the data (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9
LARGEST_HEADER = 100_000_000
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What weights can be; the other dtypes are of buffers, or quantised."""
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SLICE = re.compile(r"(.+)\[(\d+)\]")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``offset`` is that of its first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: int) -> Stored:
        """Its slice ``index`` along the first axis."""
        inner = Stored(self.file, self.dtype, self.shape[1:], self.offset)
        return Stored(inner.file, inner.dtype, inner.shape, self.offset + index * inner.bytes)

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        raw = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(raw.numpy())
            while view and (done := file.readinto(view)):
                view = view[done:]
        return raw.view(self.dtype).view(self.shape)


def sliced(name: str) -> tuple[str, int | None]:
    """``("experts.up", 3)`` of ``experts.up[3]``, slice 3 along the first axis; ``(name, None)`` of
    a whole tensor."""
    found = _SLICE.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


class Tensors(Mapping[str, Stored]):
    """The tensors of a model's folder by name; ``name[3]`` is slice 3 of one."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Stored:
        whole, index = sliced(name)
        return self._stored[whole] if index is None else self._stored[whole].part(index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, name: str) -> Tensor:
        """Its values. Raises KeyError where it is not there."""
        return self[name].read()


def open_folder(folder: Path) -> Tensors:
    """The tensors that lie in ``folder``.

    Raises:
        UserError: there are none, they are pickled, a file is missing or damaged, or a tensor is
        not where the index says.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise UserError(_none_there(folder))
        return Tensors(_read_header(folder / SINGLE))
    try:
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({*placed.values()})
        missing = [shard for shard in shards if not (folder / _file_name(shard)).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is damaged: it has no weight_map\nfetch it again") from None
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {_few(missing)}\nfetch"
            " them"
        )
    stored: dict[str, Stored] = {}
    for shard in shards:
        stored |= _read_header(folder / shard)
    if absent := [name for name in placed if name not in stored]:
        raise UserError(
            f"{folder}: {INDEX} names tensors that no shard has: {_few(absent)}\nfetch the folder"
            " again"
        )
    return Tensors(stored)


def _file_name(shard: str) -> str:
    """``shard`` where it can be a file beside the index. Raises ValueError where it is a path, or
    too long."""
    if (
        not shard
        or shard in (".", "..")
        or "/" in shard
        or "\0" in shard
        or len(os.fsencode(shard)) > 255
    ):
        raise ValueError(shard)
    return shard


def _none_there(folder: Path) -> str:
    pickled = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
        for path in folder.glob(pattern)
    )
    if pickled:
        return (
            f"{folder} has pickled weights only ({_few(pickled)}): opening a pickle runs the code"
            " in it, so they are refused\nget the safetensors of the same model, or write them"
            " where you trust the file:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    return (
        f"{folder} has no {SINGLE} and no {INDEX}\nHF= wants safetensors, as save_pretrained writes"
        " them; pickled weights are refused"
    )


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
        header = file.read(length) if length <= min(size, LARGEST_HEADER) else b""
    base = _LENGTH.size + length
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        stored = {name: _entry(path, entry, base) for name, entry in entries.items()}
        ends = sorted(entry["data_offsets"] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(
            f"{path} is no safetensors file: its header cannot be read\nfetch it again"
        ) from None
    if (end := max((base + end for _, end in ends), default=base)) != size:
        what = (
            f"is cut off: {size:,} bytes of {end:,}"
            if size < end
            else f"has {size:,} bytes, its header says {end:,}"
        )
        raise UserError(f"{path} {what}\nfetch it again")
    for name, entry in stored.items():
        begin, behind = entries[name]["data_offsets"]
        if entry.bytes != behind - begin:
            raise UserError(
                f"{path} is damaged: {name[:80]} has {behind - begin:,} bytes, its shape says"
                f" {entry.bytes:,}: a tensor's bytes are not as many as its shape says\nfetch it"
                " again"
            )
    if any(behind != begin for (_, behind), (begin, _) in pairwise([[0, 0], *ends])):
        raise UserError(f"{path} is damaged: its tensors overlap or leave gaps\nfetch it again")
    return stored


def _entry(path: Path, entry: Mapping, base: int) -> Stored:
    """The tensor that a header's entry describes. Raises ValueError or TypeError where it describes
    none."""
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise UserError(
            f"{path}: a tensor of dtype {str(entry['dtype'])[:40]}; known: {', '.join(DTYPES)}"
        )
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    # True and 1.0 equal 1, and go nowhere
    if (
        not isinstance(shape, list)
        or any(type(n) is not int or n < 0 for n in (*shape, begin, end))
        or begin > end
    ):
        raise ValueError(f"{begin} to {end} of shape {shape}")
    return Stored(path, DTYPES[entry["dtype"]], tuple(shape), base + begin)


def _few(names: Iterable[str], n: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class Writer:
    """Files whose headers are written and whose tensors are filled in, in any order."""

    def __init__(self, places: Mapping[str, Stored], handles: Mapping[Path, int]) -> None:
        self._places, self._handles = Tensors(places), handles

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in ``name``, or ``name[3]``, its slice 3."""
        place = self._places[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, announced {place.shape}"
                f" {place.dtype}"
            )
        view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            done += os.pwrite(
                self._handles[place.file], view[done : done + 2**30], place.offset + done
            )


@contextmanager
def writing(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Writer]:
    """Files in ``folder`` for ``tensors`` (name -> dtype, shape), with an index where there are
    several."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        if filled and filled + sizes[name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    names = (
        [SHARD.format(n + 1, len(shards)) for n in range(len(shards))]
        if len(shards) > 1
        else [SINGLE]
    )
    places: dict[str, Stored] = {}
    handles: dict[Path, int] = {}
    try:
        for file, shard in zip((folder / name for name in names), shards, strict=True):
            handles[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            entries, offset = {}, 0
            for name in shard:
                dtype, shape = tensors[name]
                ends = [offset, offset + sizes[name]]
                entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": ends}
                offset += sizes[name]
            header = json.dumps(
                {"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")
            ).encode()
            header += b" " * (-len(header) % 8)
            os.pwrite(handles[file], _LENGTH.pack(len(header)) + header, 0)
            os.ftruncate(handles[file], _LENGTH.size + len(header) + offset)
            for name, entry in entries.items():
                base = _LENGTH.size + len(header)
                places[name] = Stored(
                    file, tensors[name][0], tensors[name][1], base + entry["data_offsets"][0]
                )
        yield Writer(places, handles)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
