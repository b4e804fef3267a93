"""Reads and writes Hugging Face's safetensors files, a tensor at a time.

A file has the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype,
shape, data_offsets) and the data (github.com/huggingface/safetensors, README). The package
safetensors checks headers here. It does not read or write: it maps whole files when it reads, which
counts as resident memory, and writes only tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights; the others are for buffers or quantised tensors."""
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
    """A tensor in a file. ``offset``: position of its first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: int) -> Stored:
        """Its slice ``index`` along the first axis."""
        first = replace(self, shape=self.shape[1:])
        return replace(first, offset=self.offset + index * first.bytes)

    def read(self) -> Tensor:
        """A copy of its values."""
        raw = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(raw.numpy())
            while view and (done := file.readinto(view)):
                view = view[done:]
        return raw.view(self.dtype).view(self.shape)


def sliced(name: str) -> tuple[str, int | None]:
    """Name and slice on the first axis: ``("up", 3)`` of ``up[3]``, ``("up", None)`` of ``up``."""
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
        """The values of ``name``.

        Raises:
            KeyError: there is no such tensor.
        """
        return self[name].read()


def open_folder(folder: Path) -> Tensors:
    """The tensors in ``folder``.

    Raises:
        UserError: there are none, they are pickled, a file is missing or damaged, or a tensor is
            not in the file that the index says.
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
    """``shard`` if it is the name of a file next to the index.

    Raises:
        ValueError: it is a path, which could point anywhere, or no name at all.
    """
    path = shard in ("", ".", "..") or "/" in shard or "\0" in shard
    if path or len(os.fsencode(shard)) > 255:
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
            " in it, so they are refused\nget the safetensors of the same model, or write them if"
            " you trust the file:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    return (
        f"{folder} has no {SINGLE} and no {INDEX}\nHF= wants safetensors, as save_pretrained writes"
        " them; pickled weights are refused"
    )


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        # checks every entry of the header, and that the tensors fill the file without gaps
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}\nfetch it again") from None
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    base = _LENGTH.size + length
    unknown = {entry["dtype"] for entry in entries.values()} - set(DTYPES)
    if unknown:
        raise UserError(f"{path}: a tensor of dtype {min(unknown)}; known: {', '.join(DTYPES)}")
    return {
        name: Stored(
            path,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            base + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def _few(names: Iterable[str], n: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class SafetensorWriter:
    """Files with complete headers, whose tensors are filled in, in any order."""

    def __init__(self, places: Mapping[str, Stored], handles: Mapping[Path, int]) -> None:
        self._places, self._handles = Tensors(places), handles

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in ``name``, or with ``name[3]`` its slice 3."""
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
) -> Iterator[SafetensorWriter]:
    """Files in ``folder`` for ``tensors`` (name -> dtype, shape); several files get an index."""
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda kind: kind[0].itemsize * math.prod(kind[1]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    places: dict[str, Stored] = {}
    handles: dict[Path, int] = {}
    try:
        for file_name, shard in shards.filename_to_tensors.items():
            file = folder / file_name
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
            base = _LENGTH.size + len(header)
            os.pwrite(handles[file], _LENGTH.pack(len(header)) + header, 0)
            os.ftruncate(handles[file], base + offset)
            for name, entry in entries.items():
                places[name] = Stored(file, *tensors[name], base + entry["data_offsets"][0])
        yield SafetensorWriter(places, handles)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
