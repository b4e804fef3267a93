"""Documents of any kind of file, written as JSON Lines with "text", which cleaning reads: a shard
for each file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from harness.data.documents import Layout, Reader, TextFile
from harness.data.manifest import noted
from harness.data.progress import ShowProgress
from harness.system.files import atomic, write_json


class Shard(BaseModel):
    """A file written anew. ``name`` and ``sha256`` are of the file that was read; none where only
    its front was."""

    model_config = ConfigDict(frozen=True)
    name: str
    sha256: str | None
    records: int
    skipped: dict[str, int]


def write_json_lines(
    files: Sequence[TextFile],
    layout: Layout,
    folder: Path,
    progress: ShowProgress,
) -> tuple[tuple[Path, ...], tuple[Shard, ...]]:
    """Write ``folder``/00000.jsonl and so on; what an earlier call finished stays.

    The sentences of a document that is a list of them become its lines.

    Raises:
        UserError: see ``Reader``.
        OSError: ``folder`` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    all_bytes = sum(file.path.stat().st_size for file in files)
    paths, shards, done_bytes, left = [], [], 0, layout.limit
    for number, file in enumerate(files):
        if left == 0:
            break
        path = folder / f"{number:05}.jsonl"
        shard = noted(path.with_suffix(".json"), Shard) if path.exists() else None
        if shard is None:
            before = done_bytes

            def watch(read: int, before: int = before) -> None:
                progress("read", before + read, all_bytes)

            shard = _write(file, replace(layout, limit=left), path, watch)
        paths.append(path)
        shards.append(shard)
        done_bytes += file.path.stat().st_size
        left = None if left is None else left - shard.records
    return tuple(paths), tuple(shards)


def _write(file: TextFile, layout: Layout, path: Path, watch: Callable[[int], None]) -> Shard:
    import orjson

    reader = Reader((file,), layout)
    records, skipped = 0, {}
    path.with_suffix(".json").unlink(missing_ok=True)
    with atomic(path) as out:
        while block := reader.next():
            found = block.find()
            texts = (text if isinstance(text, str) else "\n".join(text) for text in found.texts)
            out.writelines(
                orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in texts
            )
            records = block.end.records
            for rule, count in found.skipped.items():
                skipped[rule] = skipped.get(rule, 0) + count
            watch(reader.read_bytes)
    shard = Shard(
        name=file.name, sha256=reader.sha256.get(file.name), records=records, skipped=skipped
    )
    write_json(path.with_suffix(".json"), shard.model_dump())
    return shard
