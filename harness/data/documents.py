"""Reads documents from JSON Lines, Parquet and plain text, also compressed with gzip or zstd.

Files are read once, sequentially, in blocks of about 2 MiB, which many threads then parse. A line
or row without a document is skipped and counted under the rule that it breaks.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from harness.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    import pyarrow

RULES = {
    "blank": "a line of white space",
    "no UTF-8": "bytes that are no UTF-8",
    "no JSON": "a line that is no JSON",
    "no text": "JSON or a row without text under the key",
    "surrogate": "text with an unpaired surrogate, which UTF-8 cannot encode",
    "too long": "a line, row or file longer than LONGEST MiB",
    "no ids": "text that a null tokenizer cannot read",
}
"""Rules by which records are skipped. An empty text is not skipped: it becomes a document without
tokens, as in upstream's tools/preprocess_data.py."""

LONGEST_MIB = 16
"""The longest line or row. Tokenising a document takes up to 40 times its size in memory."""

BLOCK_BYTES = 2 << 20

Kind = Literal["jsonl", "parquet", "text"]
Text = str | list[str]
"""A document: its text, or a list of sentences, each of which becomes a sequence, as in upstream's
tools/preprocess_data.py."""

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary")
"""Arrow's types of text."""


@dataclass(frozen=True)
class TextFile:
    """A file of documents. ``name`` is its name in the manifest."""

    path: Path
    name: str
    kind: Kind
    packing: str = ""

    @property
    def version(self) -> tuple[str, int, int]:
        """Path, size in bytes and time of change in ns: another where the content is another."""
        stat = self.path.stat()
        return str(self.path), stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class TextLayout:
    """How documents are stored in files.

    Attributes:
        key: the JSON key, or Parquet column, of the text.
        each: what of a plain text file is a document: each ``line``, or the whole ``file``.
        longest: longest line, row or file in bytes; longer ones are skipped.
        limit: read only the first ``limit`` lines, rows or files.
    """

    key: str = "text"
    each: Literal["line", "file"] = "line"
    longest: int = LONGEST_MIB << 20
    limit: int | None = None


class ReadPosition(NamedTuple):
    """How far reading is.

    Attributes:
        file: number of the current file.
        offset: bytes (decompressed) or Parquet rows of it that are done.
        records: lines or rows of all files that are done.
    """

    file: int = 0
    offset: int = 0
    records: int = 0


BEGIN = ReadPosition()


@dataclass
class Found:
    """The content of a block."""

    texts: list[Text] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Block:
    """``size`` bytes of lines or rows, which ``find`` parses; the next block begins at ``end``."""

    find: Callable[[], Found]
    size: int
    end: ReadPosition


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def text_file(path: Path, name: str | None = None) -> TextFile:
    """``path`` with its kind and compression, by the suffix of ``name``.

    Raises:
        UserError: the suffix is unknown.
    """
    named = Path(name or path.name)
    packing = named.suffix if named.suffix in _CODECS else ""
    kind = _KINDS.get(Path(named.stem).suffix if packing else named.suffix)
    if kind is None or (kind == "parquet" and packing):
        raise UserError(
            f"{path}: unknown kind of file\n"
            f"known endings: {' '.join(_KINDS)}; all but .parquet also compressed, with"
            f" {' or '.join(_CODECS)} appended"
        )
    return TextFile(path, name or str(path), kind, packing)


def has_surrogate(text: str) -> bool:
    """Whether ``text`` has an unpaired surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class Reader:
    """Reads files in order. Only one thread at a time may call ``next``."""

    def __init__(
        self, files: Sequence[TextFile], layout: TextLayout, start: ReadPosition = BEGIN
    ) -> None:
        self.sha256: dict[str, str] = {}
        """By name, of the files that were read completely."""
        self.read_bytes = 0
        """Bytes read from the disk, compressed or not."""
        self._blocks = self._all(tuple(files), layout, start)

    def next(self) -> Block | None:
        """The next block; None after the last.

        Raises:
            UserError: a file is missing, truncated, or not of the kind that its suffix says.
        """
        return next(self._blocks, None)

    def _all(
        self, files: tuple[TextFile, ...], layout: TextLayout, place: ReadPosition
    ) -> Iterator[Block]:
        for number, file in enumerate(files):
            if layout.limit is not None and place.records >= layout.limit:
                return
            done = number < place.file
            place = place if number <= place.file else ReadPosition(number, 0, place.records)
            if file.kind == "parquet":
                read = _parquet
            else:
                read = _whole if file.kind == "text" and layout.each == "file" else _lines
            try:
                with file.path.open("rb", buffering=0) as raw:
                    counted = _Counted(raw, self)
                    if not done:
                        for block in read(file, counted, layout, place):
                            yield block
                            place = block.end
                    if layout.limit is None or place.records < layout.limit:
                        _skip(counted)
                        self.sha256[file.name] = counted.sha.hexdigest()
            except (OSError, ValueError) as error:
                raise UserError(f"{file.path} cannot be read: {_reason(error)}") from None


class _Counted:
    """A file whose bytes are counted and hashed while they are read."""

    closed = False  # Arrow asks

    def __init__(self, raw: _Stream, reader: Reader) -> None:
        self._raw, self._reader, self.sha = raw, reader, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.sha.update(data)
        self._reader.read_bytes += len(data)
        return data

    def close(self) -> None:
        """Arrow closes a stream that it no longer needs; the rest of the file is still hashed."""


def _decompressed(file: TextFile, raw: _Counted) -> _Stream:
    """The content of ``raw``. Arrow's streams report a truncated last frame, unlike zstandard's."""
    if not file.packing:
        return raw
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), _CODECS[file.packing])


def _lines(
    file: TextFile, raw: _Counted, layout: TextLayout, place: ReadPosition
) -> Iterator[Block]:
    """Blocks of whole lines; a line that is too long is never in memory as a whole."""
    stream = _decompressed(file, raw)
    _skip(stream, place.offset)
    find = partial(_text_lines, longest=layout.longest)
    if file.kind == "jsonl":
        find = partial(_json_lines, key=layout.key, longest=layout.longest)
    rest = data = b""
    while data or (data := stream.read(BLOCK_BYTES)):
        if place.offset == 0 and not rest and file.kind == "jsonl":
            _refuse_array(file, data)
        if whole := data.rfind(b"\n") + 1:
            block = _block(b"".join((rest, memoryview(data)[:whole])), find, layout, place)
            rest, data = data[whole:], b""
        elif len(rest) + len(data) <= layout.longest:
            rest, data = rest + data, b""
            continue
        else:
            size, rest = len(rest), b""
            while data and b"\n" not in data:
                size += len(data)
                data = stream.read(BLOCK_BYTES)
            line, newline, data = data.partition(b"\n")
            end = place.offset + size + len(line) + len(newline)
            block = Block(_too_long, 0, ReadPosition(place.file, end, place.records + 1))
        yield block
        place = block.end
        if _full(layout, place):
            return
    if rest:
        yield _block(rest, find, layout, place)


def _whole(
    file: TextFile, raw: _Counted, layout: TextLayout, place: ReadPosition
) -> Iterator[Block]:
    """The file as one document."""
    data = b"" if place.offset else _decompressed(file, raw).read(layout.longest + 1)
    if data:
        find = partial(_text_lines, data, longest=layout.longest, whole=True)
        if len(data) > layout.longest:
            find = _too_long
        yield Block(find, len(data), ReadPosition(place.file, len(data), place.records + 1))


def _parquet(
    file: TextFile, raw: _Counted, layout: TextLayout, place: ReadPosition
) -> Iterator[Block]:
    """Blocks of rows."""
    import pyarrow
    from pyarrow import parquet

    _skip(raw)
    try:
        with parquet.ParquetFile(file.path, buffer_size=1 << 20) as table:
            _check_column(file, table.schema_arrow, layout.key)
            row = 0
            for group in range(table.metadata.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row + rows <= place.offset:
                    row += rows
                    continue
                at_once = max(
                    1, rows * BLOCK_BYTES // max(1, _column_bytes(table, group, layout.key))
                )
                for batch in table.iter_batches(at_once, [group], [layout.key], use_threads=False):
                    done = max(0, place.offset - row)
                    row += len(batch)
                    left = len(batch) if layout.limit is None else layout.limit - place.records
                    new = min(len(batch) - done, left)
                    if new <= 0:
                        continue
                    column = batch.column(0).slice(done, new)
                    place = ReadPosition(place.file, place.offset + new, place.records + new)
                    yield Block(
                        partial(_rows, column, longest=layout.longest), column.nbytes, place
                    )
                    if _full(layout, place):
                        return
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def _block(
    data: bytes, find: Callable[[bytes], Found], layout: TextLayout, place: ReadPosition
) -> Block:
    """A block of whole lines, without those beyond the limit."""
    records = data.count(b"\n") + (not data.endswith(b"\n"))
    if layout.limit is not None and place.records + records > layout.limit:
        records = layout.limit - place.records
        data = b"".join(line + b"\n" for line in data.split(b"\n", records)[:records])
    end = ReadPosition(place.file, place.offset + len(data), place.records + records)
    if place.offset == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    return Block(partial(find, data), len(data), end)


def _json_lines(data: bytes, key: str, longest: int) -> Found:
    import orjson

    found, loads, view, start = Found(), orjson.loads, memoryview(data), 0
    add, end_of_line = found.texts.append, data.find
    while start < len(data):
        end = end_of_line(b"\n", start)
        end = len(data) if end < 0 else end
        if end - start > longest:
            found.skipped["too long"] += 1
        else:
            try:
                text = loads(view[start:end])[key]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                text = None
            if type(text) is str:
                add(text)
            else:
                _json_line(bytes(view[start:end]), key, found)
        start = end + 1
    return found


def _json_line(line: bytes, key: str, found: Found) -> None:
    """Parse a line that orjson refuses, or without plain text, as Python's json does.

    Upstream's tools/preprocess_data.py uses the latter, which accepts more (NaN, big integers), and
    takes a bare carriage return as the end of a line.
    """
    try:
        parts = line.removesuffix(b"\r").decode().split("\r")
    except UnicodeDecodeError:
        found.skipped["no UTF-8"] += 1
        return
    for part in parts:
        if not part.strip():
            found.skipped["blank"] += len(parts) == 1
            continue
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            found.skipped["no JSON"] += 1
            continue
        text = value.get(key) if isinstance(value, dict) else None
        sentences = [text] if isinstance(text, str) else text
        if not isinstance(sentences, list) or not all(
            isinstance(sentence, str) for sentence in sentences
        ):
            found.skipped["no text"] += 1
        elif any(has_surrogate(sentence) for sentence in sentences):
            found.skipped["surrogate"] += 1
        else:
            found.texts.append(text)


def _text_lines(data: bytes, longest: int, whole: bool = False) -> Found:
    found = Found()
    for line in [data] if whole else data.removesuffix(b"\n").split(b"\n"):
        if len(line) > longest:
            found.skipped["too long"] += 1
        elif not line.strip():
            found.skipped["blank"] += 1
        else:
            try:
                found.texts.append((line if whole else line.removesuffix(b"\r")).decode())
            except UnicodeDecodeError:
                found.skipped["no UTF-8"] += 1
    return found


def _rows(column: pyarrow.Array, longest: int) -> Found:
    found = Found()
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(row) for row in column]
    for value in values:
        sentences = value if isinstance(value, list) else [value]
        try:
            sentences = [text.decode() if isinstance(text, bytes) else text for text in sentences]
        except UnicodeDecodeError:
            found.skipped["no UTF-8"] += 1
            continue
        if not all(isinstance(text, str) for text in sentences):
            found.skipped["no text"] += 1
        elif sum(map(_bytes, sentences)) > longest:
            found.skipped["too long"] += 1
        else:
            found.texts.append(sentences if isinstance(value, list) else sentences[0])
    return found


def _value(row: pyarrow.Scalar) -> object:
    try:
        return row.as_py()
    except UnicodeDecodeError:
        return b"\xff"


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _too_long() -> Found:
    return Found(skipped=Counter({"too long": 1}))


def _refuse_array(file: TextFile, data: bytes) -> None:
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise UserError(
            f"{file.path} holds a JSON array; one object a line is needed:\n"
            f"    jq -c '.[]' {file.path.name} > {file.path.name.split('.')[0]}.jsonl"
        )


def _full(layout: TextLayout, place: ReadPosition) -> bool:
    return layout.limit is not None and place.records >= layout.limit


def _skip(stream: _Stream, size: int | None = None) -> None:
    """Read and discard ``size`` bytes, by default all that are left."""
    while size is None or size > 0:
        data = stream.read(BLOCK_BYTES if size is None else min(size, BLOCK_BYTES))
        if not data:
            if size is not None:
                raise ValueError("shorter than when it was read before")
            return
        size = None if size is None else size - len(data)


def _check_column(file: TextFile, schema: pyarrow.Schema, key: str) -> None:
    """Refuse a Parquet file without a column ``key`` of text."""
    if key not in schema.names:
        raise UserError(f"{file.path} has no column {key!r}; {nearest(key, schema.names)}")
    kind = schema.field(key).type
    if str(getattr(kind, "value_type", kind)) not in _TEXT_TYPES:
        raise UserError(f"{file.path}: column {key!r} is of type {kind}, not text")


def _column_bytes(table: pyarrow.parquet.ParquetFile, group: int, key: str) -> int:
    """Decompressed size of a column in a row group."""
    row_group = table.metadata.row_group(group)
    columns = (row_group.column(n) for n in range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.split(".")[0] == key
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
