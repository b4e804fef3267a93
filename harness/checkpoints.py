"""Checkpoints on disk: which are whole, how large they are, what they hold, which may go. Needs no torch.

FOLDER/iter_0000100/                         the checkpoint of step 100, as upstream writes it
    __<rank>_<n>.distcp, .metadata           tensors, and which of them lies where
    metadata.json                            written last (torch_dist only): all of it is there
FOLDER/latest_checkpointed_iteration.txt     upstream's note of the newest
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

STEP_FOLDER = re.compile(r"iter_(\d{7,})")
REMOVING = ".removing-"
"""Prefix of a checkpoint that is on its way out: no longer one, whatever is still there of it."""
TRACKER, METADATA = "latest_checkpointed_iteration.txt", ".metadata"
NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer|.*_extra_state|rng_state|rerun_state|common_state")
"""Keys of a checkpoint that are no parameters of the model."""


@dataclass(frozen=True)
class Saving:
    """How a run keeps checkpoints: ``every`` so many steps, all or the newest ``keep``; no folder: in its run directory."""

    every: int
    keep: int | None = None
    folder: Path | None = None

    def in_run(self, run_dir: Path) -> Path:
        """The folder of the run in ``run_dir``."""
        return self.folder or run_dir / "checkpoints"


@dataclass(frozen=True)
class Loading:
    """A checkpoint to begin with: the one of ``step`` in ``folder``, or only its weights."""

    folder: Path
    step: int
    only_weights: bool = False


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says it holds: bytes it needs in each file, shapes of the model's tensors."""

    bytes_of: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    has_optimizer: bool

    @property
    def parameters(self) -> int:
        """Numbers in the model's tensors."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk; ``damage`` says why it cannot be used, None where it is whole."""

    path: Path
    step: int
    size_bytes: int
    damage: str | None
    contents: Contents | None = None

    @property
    def gib(self) -> float:
        return self.size_bytes / 2**30


def in_folder(folder: Path) -> tuple[Checkpoint, ...]:
    """Every checkpoint in ``folder`` by step, whole or not; an imported one (``release``) counts as step 0."""
    steps = [(int(found[1]), path) for path in _entries(folder) if (found := STEP_FOLDER.fullmatch(path.name))]
    release = [(0, folder / "release")] if (folder / "release").is_dir() else []
    return tuple(examine(path, step) for step, path in sorted(steps + release))


def examine(path: Path, step: int) -> Checkpoint:
    """The checkpoint of ``step`` in ``path``: every byte its metadata names must be there. Tensors are not read."""
    sizes = {entry.name: entry.stat().st_size for entry in _entries(path)}
    size_bytes = sum(sizes.values())
    try:
        contents = read_contents(path / METADATA)
        damage = _damage(path, step, sizes, contents)
    except FileNotFoundError:
        contents, damage = None, "it was not written to its end"
    except ValueError as error:
        contents, damage = None, str(error)
    return Checkpoint(path, step, size_bytes, damage, contents)


def newest_whole(folder: Path, tell: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that can be used, or None; ``tell`` hears of each newer one that cannot."""
    for found in reversed(in_folder(folder)):
        if found.damage is None:
            return found
        tell(f"checkpoint of step {found.step} skipped: {found.damage}")
    return None


def read_contents(metadata: Path) -> Contents:
    """Read a ``.metadata`` of torch.distributed.checkpoint. It is a pickle: only data is taken from it, no code is run.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    with metadata.open("rb") as file:
        try:
            state = _Unpickler(file).load().state
            bytes_of: dict[str, int] = {}
            for info in state["storage_data"].values():
                name, end = info.state["relative_path"], info.state["offset"] + info.state["length"]
                bytes_of[name] = max(bytes_of.get(name, 0), end)
            tensors = {key: value.state for key, value in state["state_dict_metadata"].items() if "size" in value.state}
            shapes = {key: tuple(tensor["size"].args[0]) for key, tensor in tensors.items() if not NOT_WEIGHTS.match(key)}
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f".metadata is damaged ({type(error).__name__})") from None
    keys = state["state_dict_metadata"]
    return Contents(bytes_of, shapes, any(re.match(r"(chained_\d+\.)?optimizer", key) for key in keys))


def prune(folder: Path, keep: int) -> list[int]:
    """Delete all but the newest ``keep`` whole checkpoints, and what broken saves left before the newest; their steps.

    At least one whole checkpoint stays, always. What is deleted stops being a checkpoint at once: a kill half-way leaves
    nothing that looks like one.
    """
    found = in_folder(folder)
    whole = [c for c in found if c.damage is None and c.path.name != "release"]
    kept = whole[-max(keep, 1) :]
    if not kept:
        return []
    gone = [c for c in found if c.path.name != "release" and c.step < kept[-1].step and c not in kept]
    for checkpoint in gone:
        remove(checkpoint.path)
    sweep(folder)
    return [c.step for c in gone]


def remove(path: Path) -> None:
    """Delete a checkpoint, or what is left of one."""
    away = path.with_name(REMOVING + path.name)
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Finish deletions that a kill interrupted."""
    for path in _entries(folder):
        if path.name.startswith(REMOVING):
            shutil.rmtree(path, ignore_errors=True)


def _damage(path: Path, step: int, sizes: dict[str, int], contents: Contents) -> str | None:
    for name, needed in contents.bytes_of.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] < needed:
            return f"{name} has {sizes[name]:,} bytes of {needed:,}"
    if "metadata.json" in sizes:
        try:
            json.loads((path / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError):
            return "metadata.json is damaged"
    elif not any(key.startswith("model.") for key in contents.shapes):  # fsdp_dtensor, of one step, needs none
        return "it was not written to its end"
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


class _Data(dict):
    """Stands for any class in a pickle: keeps what it was made from, does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = MappingProxyType({})

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and state and isinstance(state[0], dict) else state

    __hash__ = object.__hash__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Data]:
        return type(name, (_Data,), {})
