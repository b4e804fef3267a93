"""Checkpoints as upstream leaves them on the disk, made without torch."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path

from harness.run import checkpoints


# What torch.distributed.checkpoint pickles has these shapes. Other names than its own are refused, see ``as_torch_pickles``.
@dataclass(frozen=True)
class Index:
    fqn: str


@dataclass
class Info:
    relative_path: str
    offset: int
    length: int


class Size(tuple):
    def __reduce__(self):
        return Size, (tuple(self),)


@dataclass
class Tensor:
    size: Size


@dataclass
class Metadata:
    state_dict_metadata: dict = field(default_factory=dict)
    storage_data: dict = field(default_factory=dict)
    planner_data: object = None


class Object:
    """Of an entry that is no tensor."""


TORCH = {
    Index: "torch.distributed.checkpoint.metadata\nMetadataIndex",
    Info: "torch.distributed.checkpoint.filesystem\n_StorageInfo",
    Size: "torch\nSize",
    Tensor: "torch.distributed.checkpoint.metadata\nTensorStorageMetadata",
    Object: "torch.distributed.checkpoint.metadata\nBytesStorageMetadata",
    Metadata: "torch.distributed.checkpoint.metadata\nMetadata",
}


def as_torch_pickles(value) -> bytes:
    """The pickle of ``value``, its classes under the names that they have in torch.distributed.checkpoint."""
    pickled = pickle.dumps(value, protocol=2)  # names are plain lines in it
    for kind, name in TORCH.items():
        pickled = pickled.replace(
            f"c{kind.__module__}\n{kind.__name__}\n".encode(), f"c{name}\n".encode()
        )
    return pickled


def write(
    folder: Path, step: int, *, width: int = 100, optimizer: bool = True, data: int = 700
) -> Path:
    """A checkpoint as upstream leaves it, with ``data`` bytes in its one file of tensors."""
    path = folder / f"iter_{step:07d}"
    path.mkdir(parents=True)
    tensors = {"embedding.word_embeddings.weight": Tensor(Size((1024, width)))}
    tensors |= (
        {"optimizer.state.exp_avg.embedding.word_embeddings.weight": Tensor(Size((1024, width)))}
        if optimizer
        else {}
    )
    stored = {Index(key): Info("__0_0.distcp", 350 * n, 350) for n, key in enumerate(tensors)}
    (path / ".metadata").write_bytes(as_torch_pickles(Metadata(tensors, stored)))
    (path / "__0_0.distcp").write_bytes(b"x" * data)
    (path / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    (folder / checkpoints.TRACKER).write_text(str(step))
    return path
