"""Writes and reads Megatron-LM's ``torch_dist`` checkpoints, one piece at a time.

The format is PyTorch's distributed checkpoint (torch.distributed.checkpoint), and so are writer and
reader. The planners below only create each tensor when it is its turn. Upstream adds a
``metadata.json``, and objects next to the tensors, one of them ``common_state``
(megatron/core/dist_checkpointing/serialization.py, strategies/torch.py).
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from harness.errors import UserError
from harness.run import checkpoints, checksums, pickles
from harness.run.checkpoints import METADATA, TRACKER

CONFIG = "metadata.json"
COMMON = "common_state/shard_0_1"
WRITERS = 2
BACKEND = "torch_dist"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, which ``make`` creates when it is written.

    Attributes:
        index: its position along the leading axes, where its size is 1.
        shape: of the part, without these axes.
        stacked: sizes of the leading axes of the whole tensor.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def offset(self) -> torch.Size:
        return torch.Size((*self.index, *(0 for _ in self.shape)))

    def item(self) -> WriteItem:
        """Its description for PyTorch's planner."""
        local = torch.Size((*(1 for _ in self.index), *self.shape))
        data = TensorWriteData(
            ChunkStorageMetadata(self.offset, local),
            TensorProperties(self.dtype),
            torch.Size((*self.stacked, *self.shape)),
        )
        return WriteItem(
            MetadataIndex(self.key, self.offset), WriteItemType.SHARD, tensor_data=data
        )


def write(folder: Path, pieces: Sequence[Piece], objects: Mapping[str, Any]) -> None:
    """Write a checkpoint of ``pieces`` and pickled ``objects`` into ``folder``.

    Only the pieces that are being written are in memory.
    """
    with _one_process():
        checkpoint.save(
            {},
            storage_writer=FileSystemWriter(folder, thread_count=WRITERS, per_thread_copy_ahead=0),
            planner=_SavePlanner(pieces, objects),
            no_dist=True,
        )
    (folder / CONFIG).write_text(
        json.dumps({"sharded_backend": BACKEND, "sharded_backend_version": 1})
    )
    checksums.write(folder)


@contextmanager
def _one_process() -> Iterator[None]:
    """Without PyTorch's warning that it works without process groups, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, pieces: Sequence[Piece], objects: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {(piece.key, piece.offset): piece for piece in pieces}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan([*items, *(piece.item() for piece in self._pieces.values())])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            written = io.BytesIO()
            torch.save([self._objects[index.fqn]], written)
            return written
        piece = self._pieces[index.fqn, index.offset]
        tensor = piece.make()
        if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
            raise ValueError(
                f"{piece.key}: {tuple(tensor.shape)} {tensor.dtype}, planned {piece.shape}"
                f" {piece.dtype}"
            )
        return tensor.contiguous().view(*(1 for _ in piece.index), *piece.shape)


class TorchDistCheckpoint:
    """A checkpoint on the disk, whose tensors are read in parts.

    Raises:
        UserError: ``folder`` has none, or one of another format, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).exists():
            raise UserError(f"{folder} has no {METADATA}: no checkpoint, or an interrupted save")
        try:
            backend = json.loads((folder / CONFIG).read_text())["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError):
            backend = None
        if backend != BACKEND:
            raise UserError(
                f"{folder} is a checkpoint of format {backend or 'unknown'}; this reads {BACKEND}\n"
                f'save with ARGS="--ckpt-format {BACKEND}"'
            )
        pickles.guard()
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except pickles.NotData as error:
            raise UserError(f"{folder / METADATA} {error}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"{folder / METADATA} is damaged: {type(error).__name__}: {error}"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        named = {info.relative_path for info in self._metadata.storage_data.values()}
        if missing := sorted(name for name in named if not (folder / name).exists()):
            raise UserError(
                f"{folder} lacks {', '.join(missing)}: saving or copying it was interrupted"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Part ``index`` of the tensor ``key`` along its leading axes, from all ranks' shards.

        Raises:
            UserError: a file is damaged.
        """
        entry = self._metadata.state_dict_metadata[key]
        shape = entry.size[len(index) :]
        part = ChunkStorageMetadata(
            torch.Size((*index, *(0 for _ in shape))), torch.Size((*(1 for _ in index), *shape))
        )
        target = torch.empty(part.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(key, entry, [part])
        self._read(LoadPlan(items), _LoadPlanner(target))
        return target.view(shape)

    def common(self) -> Mapping[str, Any]:
        """Upstream's common state: arguments, iteration and so on.

        Raises:
            UserError: it is missing, or cannot be opened safely.
        """
        try:
            if (folded := self._metadata.state_dict_metadata.get(COMMON)) is None:
                return torch.load(self.folder / "common.pt", map_location="cpu", weights_only=True)
            assert isinstance(folded, BytesStorageMetadata)
            loaded = {COMMON: io.BytesIO()}
            with _one_process():
                checkpoint.load(loaded, storage_reader=FileSystemReader(self.folder), no_dist=True)
            if isinstance(loaded[COMMON], io.BytesIO):
                loaded[COMMON].seek(0)
                return torch.load(loaded[COMMON], weights_only=True)[0]
            return loaded[COMMON][0]
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"{self.folder}: upstream's arguments cannot be read: {error}"
            ) from None

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:  # a truncated or damaged file can raise anything
            key = plan.items[0].dest_index.fqn
            raise UserError(f"{self.folder} is damaged: {key} cannot be read: {error}") from None


class _LoadPlanner(DefaultLoadPlanner):
    """Reads everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, start, length)
        return part


def latest(folder: Path) -> Path:
    """The checkpoint to read from ``folder``, after checking all of its bytes.

    It is ``folder`` itself, or the one that upstream's tracker names. If that is damaged, it is the
    newest complete one, and a warning says so.

    Raises:
        UserError: there is no complete checkpoint.
    """
    if (folder / METADATA).exists():
        return checkpoints.require_whole(checkpoints.examine(folder, 0)).path
    damages: list[str] = []
    named = checkpoints.tracked(folder)
    if named:
        found = checkpoints.verify(checkpoints.examine(*named))
        if found.damage is None:
            return found.path
        damages.append(f"{found.path} is not whole: {found.damage}")
    newest = checkpoints.newest_whole(folder)
    if newest is None:
        if named:
            TorchDistCheckpoint(named[0])  # raises an error that says more
        raise UserError(
            "\n".join(damages)
            or f"{folder} has no whole checkpoint: neither {METADATA} nor {TRACKER}"
        )
    damages = damages or [f"{folder / TRACKER} is missing or empty"]
    print(
        *(f"WARNING: {damage}" for damage in damages),
        f"  reading {newest.path.name}",
        sep="\n",
        file=sys.stderr,
    )
    return newest.path
