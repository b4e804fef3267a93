"""Checkpoints on disk: whether complete, their size, contents and deletion. Needs no torch.

FOLDER/iter_0000100/                         the checkpoint of step 100, as upstream writes it
    __<rank>_<n>.distcp, .metadata           tensors, and where each of them is
    metadata.json                            written after them (torch_dist only)
    integrity.json                           written last: checksums of all files (``checksums``)
FOLDER/latest_checkpointed_iteration.txt     upstream's tracker: the newest step
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pydantic.dataclasses
from pydantic import Field

from harness.errors import UserError
from harness.run import checksums, pickles
from harness.system.files import (
    json_object,
    sync_file,
    sync_folder,
    sync_tree,
    text_lines,
    write_json,
)

STEP_FOLDER = re.compile(r"iter_(\d{7,})")
REMOVING = ".removing-"
"""Prefix of a checkpoint that is being deleted, and counts as deleted."""
UNFINISHED = "it was not written to its end"
FAILED = "load_failed.json"
"""File in the folder of a checkpoint that upstream could not load: the reason and the time."""
TRACKER, METADATA = "latest_checkpointed_iteration.txt", ".metadata"
NOT_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer|.*_extra_state|rng_state|rerun_state|common_state"
)
"""Keys of a checkpoint that are not parameters of the model."""
LARGE_BYTES = 8 * 2**30
"""Reading more than this takes long enough to print a line."""


@pydantic.dataclasses.dataclass(frozen=True)
class Saving:
    """How a run keeps checkpoints: ``every`` so many steps, all of them or the newest ``keep``.

    Without a ``folder`` they are in the run directory.
    """

    every: Annotated[int, Field(ge=1)]
    keep: Annotated[int, Field(ge=1)] | None = None
    folder: Path | None = None

    def in_run(self, run_dir: Path) -> Path:
        """The folder of the run in ``run_dir``."""
        return self.folder or run_dir / "checkpoints"


@dataclass(frozen=True)
class Loading:
    """A checkpoint to start from: that of ``step`` in ``folder``, or only its weights."""

    folder: Path
    step: int
    only_weights: bool = False


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's metadata lists: bytes needed in each file, shapes of the model's tensors.

    ``objects``: pickled objects other than tensors, as (file, offset, length) in bytes.
    """

    bytes_of: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    has_optimizer: bool
    objects: tuple[tuple[str, int, int], ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in the model's tensors."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk; ``damage`` says why it cannot be used, None where it is complete.

    ``has_checksums``: without them (upstream's own checkpoints, old ones) a changed bit is not
    noticed.
    """

    path: Path
    step: int
    size_bytes: int
    damage: str | None
    contents: Contents | None = None
    has_checksums: bool = False

    @property
    def gib(self) -> float:
        return self.size_bytes / 2**30


def in_folder(folder: Path) -> tuple[Checkpoint, ...]:
    """Every checkpoint in ``folder`` by step, complete or not; ``release`` (imported) is step 0."""
    steps = _steps_in(folder)
    release = [(0, folder / "release")] if (folder / "release").is_dir() else []
    return tuple(examine(path, step) for step, path in sorted(steps + release))


def examine(path: Path, step: int) -> Checkpoint:
    """The checkpoint in ``path``, by its metadata and file sizes; tensors are not read."""
    sizes = {entry.name: entry.stat().st_size for entry in _entries(path)}
    size_bytes = sum(sizes.values())
    contents = None
    try:
        contents = read_contents(path / METADATA)
        damage = _damage(path, sizes, contents)
    except FileNotFoundError:
        damage = UNFINISHED
    except ValueError as error:
        damage = str(error)
    damage = damage or _failed_to_load(path)
    return Checkpoint(path, step, size_bytes, damage, contents, checksums.NAME in sizes)


def verify(found: Checkpoint) -> Checkpoint:
    """``found``, with its damage where bytes changed since the save, or a pickle holds code.

    With checksums every byte is read, by several threads; without, pickles alone.
    """
    if found.damage is not None:
        return found
    if found.size_bytes > LARGE_BYTES and found.has_checksums:
        print(
            f"reading {found.path} ({found.gib:.0f} GiB) to check it", file=sys.stderr, flush=True
        )
    try:
        known = checksums.read(found.path)
        changed = checksums.differing(found.path, known) if known else []
        if changed:
            return replace(
                found, damage=f"{', '.join(changed[:3])}: not the bytes that were saved (checksum)"
            )
        _check_pickles(found)
    except (ValueError, OSError, pickles.NotData) as error:
        return replace(found, damage=str(error))
    return found


def require_whole(found: Checkpoint) -> Checkpoint:
    """``found``, after reading it completely (``verify``). Raises UserError where it is damaged."""
    found = verify(found)
    if found.damage:
        raise UserError(
            f"{found.path}: {found.damage}\nmake checkpoints lists those that are whole"
        )
    return found


def newest_whole(folder: Path, report: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint in ``folder`` that can be used, read completely (``verify``), or None.

    Args:
        report: called with a line about each newer one that cannot be used.
    """
    for found in reversed(in_folder(folder)):
        found = verify(found)
        if found.damage is None:
            return found
        report(f"checkpoint of step {found.step} skipped: {found.damage}")
    return None


def tracked(folder: Path) -> tuple[Path, int] | None:
    """The checkpoint that upstream's tracker in ``folder`` names, and its step; None without one.

    Upstream writes the tracker in place and does not sync it: a power cut leaves it empty or full
    of NUL, which counts as none.

    Raises:
        UserError: it holds anything but an iteration.
    """
    try:
        named = (
            (folder / TRACKER)
            .read_text(encoding="utf-8", errors="replace")
            .strip("\0 \n\t\r\ufffd")
        )
    except OSError:
        return None
    if named == "release":
        return folder / "release", 0
    if named and not named.isdecimal():
        raise UserError(f"{folder / TRACKER} names no iteration: {named[:40]!r}")
    return (folder / f"iter_{int(named):07d}", int(named)) if named else None


def read_contents(metadata: Path) -> Contents:
    """Read a ``.metadata`` of torch.distributed.checkpoint, a pickle, without running code from it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or names code.
    """
    with metadata.open("rb") as file:
        try:
            read = pickles.stand_ins(file, METADATA)
            if file.read(1):
                raise pickles.NotData(f"{METADATA} has bytes after its pickle: refused")
            state = read.state
            bytes_of: dict[str, int] = {}
            objects = []
            for index, info in state["storage_data"].items():
                name, offset, length = (
                    info.state[key] for key in ("relative_path", "offset", "length")
                )
                bytes_of[name] = max(bytes_of.get(name, 0), offset + length)
                if (
                    type(state["state_dict_metadata"][index.state["fqn"]]).__name__
                    != "TensorStorageMetadata"
                ):
                    objects.append((name, offset, length))
            tensors = {
                key: value.state
                for key, value in state["state_dict_metadata"].items()
                if "size" in value.state
            }
            shapes = {
                key: tuple(tensor["size"].args[0])
                for key, tensor in tensors.items()
                if not NOT_WEIGHTS.match(key)
            }
        except pickles.NotData as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{METADATA} is damaged ({type(error).__name__})") from None
    keys = state["state_dict_metadata"]
    has_optimizer = any(re.match(r"(chained_\d+\.)?optimizer", key) for key in keys)
    return Contents(bytes_of, shapes, has_optimizer, tuple(objects))


def settle(path: Path) -> None:
    """Sync the checkpoint in ``path``, which upstream has written, and write its checksums.

    Upstream syncs tensors alone: a power cut left metadata.json empty in finished checkpoints.
    """
    sync_tree(path)
    checksums.write(path, checksums.READERS_DURING_TRAINING, nice=10)
    sync_file(path.parent / TRACKER)
    for folder in (path.parent, path.parent.parent):
        sync_folder(folder)


def check_room(saving: Saving, saves: int, size_bytes: float, free_bytes: float) -> None:
    """Raise UserError where the checkpoints of a whole run do not fit the disk.

    Args:
        saving: where and how they are kept; existing checkpoints in its folder need no more room.
        saves: number of checkpoints the run will make.
        size_bytes: of one of them.
        free_bytes: on the disk. While the newest is written, ``keep`` + 1 of them exist.
    """
    there = len(_steps_in(saving.folder))
    at_once = (
        max(min(saves, saving.keep + 1 - min(there, saving.keep)), 1) if saving.keep else saves
    )
    if at_once * size_bytes <= free_bytes:
        return
    fitting = int(free_bytes // size_bytes)
    way_out = f"KEEP={fitting - 1}, " if fitting > 1 and not there else ""
    raise UserError(
        f"{saving.folder}: {at_once} checkpoint{'s' * (at_once > 1)} of {gib(size_bytes)} need"
        f" {gib(at_once * size_bytes)}, {gib(free_bytes)} are free\n{way_out}a larger SAVE_EVERY=,"
        " or SAVE= a folder on another disk"
    )


def gib(size_bytes: float) -> str:
    """``size_bytes`` as text, in GiB or MiB."""
    return (
        f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.1f} MiB"
    )


def prune(folder: Path, keep: int) -> list[int]:
    """Delete all but the newest ``keep`` whole checkpoints, and incomplete ones before the newest.

    At least one whole checkpoint stays. A folder is renamed before it is deleted, so that a kill
    leaves nothing that looks like a checkpoint.

    Returns:
        the deleted steps.
    """
    found = in_folder(folder)
    whole = [c for c in found if c.damage is None and c.path.name != "release"]
    kept = whole[-max(keep, 1) :]
    if not kept:
        return []
    gone = [
        c for c in found if c.path.name != "release" and c.step < kept[-1].step and c not in kept
    ]
    for checkpoint in gone:
        remove(checkpoint.path)
    sweep(folder)
    return [c.step for c in gone]


def remove(path: Path) -> None:
    """Delete a checkpoint, complete or not."""
    away = path.with_name(REMOVING + path.name)
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Finish deletions that a kill interrupted."""
    for path in _entries(folder):
        if path.name.startswith(REMOVING):
            shutil.rmtree(path, ignore_errors=True)


def _damage(path: Path, sizes: dict[str, int], contents: Contents) -> str | None:
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
    # only fsdp_dtensor has no metadata.json; its keys start with "model."
    elif not any(key.startswith("model.") for key in contents.shapes):
        return UNFINISHED
    known = checksums.read(path)
    if known is not None and (unknown := {METADATA, *contents.bytes_of} - set(known)):
        return f"{checksums.NAME} does not know {min(unknown)}"
    return None


def mark_failed(path: Path, detail: str) -> None:
    """Write to the checkpoint's folder why it could not be loaded; it then counts as damaged."""
    write_json(path / FAILED, {"detail": detail, "time": time.time()})


def _failed_to_load(path: Path) -> str | None:
    """The damage of a checkpoint that upstream could not load; a new save replaces its folder."""
    if not (path / FAILED).exists():
        return None
    known = json_object("\n".join(text_lines(path / FAILED))) or {}
    return (
        f"it could not be loaded ({known.get('detail', 'no reason is known')}); rm {path / FAILED}"
        " makes RESUME= try it again"
    )


def _check_pickles(found: Checkpoint) -> None:
    """Raise NotData where a pickled object in ``found``, or a file of PyTorch's in it, holds code.

    Tensors are not checked: PyTorch reads them with ``weights_only`` (torch.distributed.checkpoint,
    filesystem.py).
    """
    for name, offset, length in found.contents.objects if found.contents else ():
        with (found.path / name).open("rb") as file:
            file.seek(offset)
            pickles.check(io.BytesIO(file.read(length)), f"an object in {name}")
    for path in sorted(found.path.rglob("*")):
        if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt"):
            pickles.check_file(path)


def _steps_in(folder: Path) -> list[tuple[int, Path]]:
    return [
        (int(found[1]), path)
        for path in _entries(folder)
        if (found := STEP_FOLDER.fullmatch(path.name))
    ]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
