"""Writes a synthetic corpus to files: folder/00000.jsonl …, one {"text": …} a line."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from harness.data.disk import resumable
from harness.data.progress import ShowProgress
from harness.data.synthetic.corpus import Corpus
from harness.data.synthetic.language import table
from harness.system.files import atomic, locked
from harness.system.workers import map_in_order

DOCUMENTS_PER_SHARD = 16384
_PLAIN = Corpus()


def generate(
    folder: Path,
    size_bytes: int,
    corpus: Corpus = _PLAIN,
    processes: int | None = None,
    progress: ShowProgress = lambda what, done, total: None,
) -> tuple[Path, ...]:
    """Write documents of ``corpus`` until they have ``size_bytes``; the last one is complete.

    Each shard appears complete or not at all; a killed call resumes and gives the same bytes.
    ``folder`` must be new, or of the same corpus and size.

    Returns:
        The shards, in order.
    Raises:
        UserError: the package wordfreq is missing, or the disk is full.
    """
    table()
    with resumable(f"synthetic text into {folder}"), locked(folder):
        return tuple(_shards(folder, size_bytes, corpus, processes, progress))


def _shards(
    folder: Path,
    size_bytes: int,
    corpus: Corpus,
    processes: int | None,
    progress: ShowProgress,
) -> list[Path]:
    shards: list[Path] = []
    done = 0
    tasks = ((corpus, folder, number, size_bytes) for number in count())
    with map_in_order(_write_shard, tasks, processes) as sizes:
        while done < size_bytes:
            size = next(sizes)
            shards.append(folder / f"{len(shards):05}.jsonl")
            done += size if done + size < size_bytes else _cut(shards[-1], size_bytes - done)
            progress("synthetic", done, size_bytes)
    for ahead in {*folder.glob("[0-9]*.jsonl")} - {*shards}:
        ahead.unlink()
    return shards


def _write_shard(corpus: Corpus, folder: Path, number: int, limit_bytes: int) -> int:
    """Write a shard unless it exists, and return its size.

    The document that reaches ``limit_bytes`` is its last.
    """
    path = folder / f"{number:05}.jsonl"
    if path.exists():
        return path.stat().st_size
    first, size = number * DOCUMENTS_PER_SHARD, 0
    with atomic(path) as file:
        for line, _ in corpus.lines(first, first + DOCUMENTS_PER_SHARD):
            size += file.write(line)
            if size >= limit_bytes:
                break
    return size


def _cut(shard: Path, size_bytes: int) -> int:
    """Cut a shard after the document that reaches ``size_bytes``, and return its size."""
    size = 0
    with shard.open("rb") as file:
        while size < size_bytes:
            size += len(file.readline())
    os.truncate(shard, size)
    return size
