"""Converts files of documents to JSON Lines with the key "text", the only format cleaning reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from harness.data.documents import Reader, TextFile, TextLayout
from harness.data.manifest import noted
from harness.data.progress import ShowProgress
from harness.system.files import atomic, write_json


class ConvertedFile(BaseModel):
    """The record of a converted file.

    Attributes:
        name, sha256: of the file that was read; no checksum if only its beginning was.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    sha256: str | None
    records: int
    skipped: Counter[str]


def as_json_lines(
    files: Sequence[TextFile], layout: TextLayout, folder: Path, progress: ShowProgress
) -> tuple[list[Path], dict[str, str | None], Counter[str]]:
    """The files themselves, or where necessary ``folder``/00000.jsonl and so on, made from them.

    A file is not written again if an earlier call did. A document that is a list of sentences
    becomes one text, a sentence a line.

    Returns:
        the paths; checksums by name of the files that were read, empty if none was; and the number
        of skipped records by rule.

    Raises:
        UserError: see ``Reader``.
        OSError: ``folder`` cannot be written.
    """
    plain = all(file.kind == "jsonl" and not file.packing for file in files)
    if plain and layout.limit is None and layout.key == "text":
        return [file.path for file in files], {}, Counter()
    folder.mkdir(parents=True, exist_ok=True)
    all_bytes = sum(file.path.stat().st_size for file in files)
    paths, shards, done_bytes, left = [], [], 0, layout.limit
    for number, file in enumerate(files):
        if left == 0:
            break
        path = folder / f"{number:05}.jsonl"
        shard = noted(path.with_suffix(".json"), ConvertedFile) if path.exists() else None
        if shard is None:
            watch = partial(_watch, progress, done_bytes, all_bytes)
            shard = _write(file, replace(layout, limit=left), path, watch)
        paths.append(path)
        shards.append(shard)
        done_bytes += file.path.stat().st_size
        left = None if left is None else left - shard.records
    skipped = sum((shard.skipped for shard in shards), Counter())
    return paths, {shard.name: shard.sha256 for shard in shards}, skipped


def _watch(progress: ShowProgress, before: int, total: int, read: int) -> None:
    progress("read", before + read, total)


def _write(
    file: TextFile, layout: TextLayout, path: Path, watch: Callable[[int], None]
) -> ConvertedFile:
    import orjson

    reader = Reader((file,), layout)
    records, skipped = 0, Counter()
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic(path) as out:
        while block := reader.next():
            found = block.find()
            texts = (text if isinstance(text, str) else "\n".join(text) for text in found.texts)
            out.writelines(
                orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in texts
            )
            records = block.end.records
            skipped += found.skipped
            watch(reader.read_bytes)
    shard = ConvertedFile(
        name=file.name, sha256=reader.sha256.get(file.name), records=records, skipped=skipped
    )
    write_json(path.with_suffix(".json"), shard.model_dump())
    return shard
