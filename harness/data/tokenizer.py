"""Finds tokenizers, and encodes text as upstream's own class would, as fast as possible.

The reference is what upstream runs: transformers' AutoTokenizer, sentencepiece, or upstream's
NullTokenizer. The package gigatoken is many times faster. It is used for a tokenizer if its ids
were equal on all ``hard_texts``, on this machine and with the installed versions; otherwise the
reference is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness import ROOT
from harness.data.data_sets import DataSet
from harness.data.tiktoken_files import is_tiktoken, tiktoken_folder
from harness.data.tokenizer_files import (
    DECIDING,
    DESCRIPTION,
    OTHERS,
    SENTENCE_PIECE,
    Kind,
    tokenizer_sha256,
)
from harness.data.vocabulary import gpt2_folder
from harness.errors import UserError, first_line, nearest
from harness.machine.provenance import package_version
from harness.system.files import expanded, write_json

CACHE_MIB = 600
"""Resident memory above which gigatoken's cache of words is dropped: it has no limit of its own."""

CHOICES = ("gpt2", "bytes", "null:50257")
"""Examples of tokenizers that have a name."""

_FORGET_AFTER_BYTES = 16 << 20
_FACTS = ("vocab_size", "eod", "fast", "slow_because", "before", "after", "end", "joined")


class Encoder(Protocol):
    """Turns texts into ids. One thread uses it at a time."""

    def encode(self, texts: Sequence[str], closed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, and the number of ids of each text (int64).

        The number is -1 for a text that cannot be encoded. ``closed`` appends the end-of-document
        token to each text with tokens.
        """


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what ``examine`` found out about it.

    Attributes:
        kind: upstream's name (``--tokenizer-type``).
        name: ``gpt2``, ``null``, or the name of its folder or file.
        model: upstream's ``--tokenizer-model``: a folder with tokenizer.json, or a SentencePiece
            model; None for ``null``.
        sha256: of everything that determines the ids.
        vocab_size: as upstream counts it; ids are below it.
        eod: the end-of-document token; None if there is none.
        fast: the package that gives the same ids faster, with its version.
        slow_because: why there is no ``fast``.
        before, after: special tokens that upstream puts around every text.
        end: the text of ``eod``.
        joined: whether the fast package gives the same ids for many texts in one string.
    """

    kind: Kind
    name: str
    model: Path | None
    sha256: str
    vocab_size: int
    eod: int | None
    fast: str | None = None
    slow_because: str | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    end: str | None = None
    joined: bool = False

    @property
    def by(self) -> str:
        """The package that makes the ids, with its version."""
        packages = {"HuggingFaceTokenizer": "tokenizers", "SentencePieceTokenizer": "sentencepiece"}
        package = packages.get(self.kind)
        return self.fast or (f"{package} {versions()[package]}" if package else "harness")

    def encoder(self, cache_mib: int = CACHE_MIB) -> Encoder:
        """A new encoder for one thread; ``cache_mib``: see CACHE_MIB."""
        if self.kind == "NullTokenizer":
            return _Null(self.vocab_size, self.eod)
        if self.kind == "HuggingFaceTokenizer":
            description = (self.model / DESCRIPTION).read_text(encoding="utf-8")
            if not self.fast:
                return Tokenizers(description, self.eod)
        elif not self.fast:
            return SentencePiece(self.model)
        else:
            description = described(self.model)
        return Gigatoken(description, self.before, self.after, self.end, self.joined, cache_mib)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        match self.kind:
            case "NullTokenizer":
                return " ".join(map(str, ids))
            case "SentencePieceTokenizer":
                return SentencePiece(self.model).processor.decode([int(i) for i in ids])
            case _:
                from tokenizers import Tokenizer as Backend

                backend = Backend.from_file(str(self.model / DESCRIPTION))
                return backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def install(self, home: Path) -> Tokenizer:
        """Copy its files into the folder ``home``; returns the tokenizer that uses the copies."""
        home.mkdir(parents=True, exist_ok=True)
        model, sources = None, {}
        if self.kind == "HuggingFaceTokenizer":
            model, sources = home, {name: self.model / name for name in (*DECIDING, *OTHERS)}
        elif self.kind == "SentencePieceTokenizer":
            model, sources = home / SENTENCE_PIECE, {SENTENCE_PIECE: self.model}
        for name in (*DECIDING, *OTHERS, SENTENCE_PIECE):
            source = sources.get(name)
            if source is None or not source.is_file():
                (home / name).unlink(missing_ok=True)
                continue
            part = home / f".{name}.part"
            shutil.copyfile(source, part)
            part.replace(home / name)
        return replace(self, model=model)


def find_tokenizer(wanted: str, home: Path) -> Tokenizer:
    """The tokenizer of ``TOKENIZER=wanted``.

    Args:
        wanted: ``gpt2``; ``bytes``, a token a byte; ``null:SIZE``, for texts that are ids; a folder
            with tokenizer.json or tokenizer.model, or one of these files. A .model is
            SentencePiece's or Llama 3's.
        home: folder of vocabularies and examination results.

    Raises:
        UserError: there is no such tokenizer, or it cannot be loaded.
    """
    if wanted == "null" or wanted.startswith("null:"):
        size = wanted.removeprefix("null").removeprefix(":")
        if not size.isascii() or not size.isdigit() or not 1 < int(size) < 2**31:
            raise UserError(f"TOKENIZER={wanted}: give the vocabulary's size, such as null:50257")
        digest = hashlib.sha256(f"null:{int(size)}".encode()).hexdigest()
        return Tokenizer("NullTokenizer", "null", None, digest, int(size), int(size) - 1)
    if wanted == "gpt2":
        return _examined("HuggingFaceTokenizer", "gpt2", gpt2_folder(home), home)
    if wanted == "bytes":
        from harness.data.chat.byte_tokenizer import byte_folder

        return _examined("HuggingFaceTokenizer", "bytes", byte_folder(home), home)
    path = expanded(wanted)
    if path.name == DESCRIPTION and path.is_file():
        path = path.parent
    if (path / DESCRIPTION).is_file():
        return _examined("HuggingFaceTokenizer", path.resolve().name, path.resolve(), home)
    if path.is_dir() and (path / SENTENCE_PIECE).is_file():
        path /= SENTENCE_PIECE
    if path.suffix == ".model" and path.is_file() and is_tiktoken(path):
        return _examined(
            "HuggingFaceTokenizer", path.resolve().parent.name, tiktoken_folder(path, home), home
        )
    if path.suffix == ".model" and path.is_file():
        return _examined("SentencePieceTokenizer", path.stem, path.resolve(), home)
    if path.exists():
        raise UserError(
            f"TOKENIZER={wanted}: neither a folder with tokenizer.json nor a SentencePiece or Llama"
            " 3 .model"
        )
    raise UserError(
        f"no tokenizer {wanted}; {nearest(wanted, CHOICES)}\n"
        "or give a folder with tokenizer.json, or a .model of SentencePiece or Llama 3"
    )


def tokenizer_of(chosen: DataSet) -> Tokenizer:
    """The tokenizer of a prepared data set; what ``examine`` finds out is unknown."""
    return Tokenizer(
        chosen.tokenizer_type,
        chosen.name,
        chosen.tokenizer_model,
        chosen.tokenizer_sha256,
        chosen.vocab_size,
        None,
    )


def _examined(kind: Kind, name: str, model: Path, home: Path) -> Tokenizer:
    """The tokenizer with its properties, which are examined once and then read from ``home``."""
    digest = tokenizer_sha256(kind, model)
    facts_of = json.dumps([digest, versions(), _machine(), _FACTS])
    known = home / "examined" / f"{hashlib.sha256(facts_of.encode()).hexdigest()[:16]}.json"
    try:
        facts = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = _examine(kind, model)
        known.parent.mkdir(parents=True, exist_ok=True)
        about = {"tokenizer": name, "sha256": digest, "versions": versions(), "machine": _machine()}
        write_json(known, facts | about)
    around = {key: tuple(facts[key]) for key in ("before", "after")}
    return Tokenizer(kind, name, model, digest, **{key: facts[key] for key in _FACTS} | around)


def _examine(kind: Kind, model: Path) -> dict[str, Any]:
    """The result of harness.data.examine, in another process: transformers' imports are large."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "harness.data.examine", kind, str(model)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        complaint = done.stderr.strip() or f"{model} cannot be examined"
        raise UserError(complaint.removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


class Gigatoken:
    """gigatoken's Rust tokenizer, with special tokens ``before`` and ``after`` each text.

    ``joined`` encodes texts as one string, separated by the end-of-document token: faster, and with
    most tokenizers the ids are the same.
    """

    def __init__(
        self,
        description: str,
        before: Sequence[str],
        after: Sequence[str],
        end: str | None,
        joined: bool = True,
        cache_mib: int = CACHE_MIB,
    ) -> None:
        from gigatoken.gigatoken_rs import BytesSource, PadTruncate, load_hf_json

        self._load = lambda: load_hf_json(description)
        self._rust = self._load()
        self._source, self._unpadded = BytesSource, PadTruncate(0)
        self._before, self._after, self._end = tuple(before), tuple(after), end
        self._joined = joined and end is not None and not _overlaps_itself(end)
        self._cache_mib, self._seen_bytes = cache_mib, 0
        for token in {*before, *after, *([] if end is None else [end])}:
            if len(self._rust.encode(token)) != 1:
                raise ValueError(f"{token!r} is not one token of its own")
        self._end_id = None if end is None else int(self._rust.encode(end)[0])

    def encode(self, texts: Sequence[str], closed: bool) -> tuple[np.ndarray, np.ndarray]:
        if closed and self._end is None:
            raise ValueError("no end-of-document token")
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        self._forget()
        around = (*self._before, None, *self._after, *([self._end] if closed else []))
        rows: list[str | None] = [None] * (len(around) * len(texts))
        for place, token in enumerate(around):
            rows[place :: len(around)] = texts if token is None else [token] * len(texts)
        as_one = self._as_one(rows, len(texts)) if closed and self._joined else None
        ids, lengths = as_one or self._each(rows, len(around))
        self._seen_bytes += 4 * len(ids)
        if closed and len(around) == 2 and (bare := lengths == 1).any():
            ids, lengths = np.delete(ids, np.cumsum(lengths)[bare] - 1), np.where(bare, 0, lengths)
        return ids, lengths

    def _as_one(self, rows: Sequence[str], texts: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and lengths; None if a text contains the end-of-document token, which separates."""
        # Given a list of str, gigatoken imports awkward first, which takes 0.25 s.
        whole = self._source(b"".join(map(str.encode, rows)))
        matrix, _ = self._rust.encode_batch_padded(whole, self._unpadded, parallel=False)
        ends = np.flatnonzero(matrix[0] == self._end_id)
        return (matrix[0], np.diff(ends, prepend=-1)) if len(ends) == texts else None

    def _each(self, rows: Sequence[str], rows_of_a_text: int) -> tuple[np.ndarray, np.ndarray]:
        layout = self._rust.encode_batch(rows, parallel=False).layout
        return np.asarray(layout.content.data), np.diff(
            np.asarray(layout.offsets.data)[::rows_of_a_text]
        )

    def _forget(self) -> None:
        if self._seen_bytes > _FORGET_AFTER_BYTES and resident_mib() > self._cache_mib:
            self._rust = None
            self._rust = self._load()
            self._seen_bytes = 0
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)


class Tokenizers:
    """The package tokenizers, which transformers runs."""

    def __init__(self, description: str, eod: int | None) -> None:
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_str(description)
        self.backend.no_truncation()
        self.backend.no_padding()
        self._eod = eod

    def encode(self, texts: Sequence[str], closed: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = [
            found.ids
            for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=True)
        ]
        return _joined(rows, self._eod if closed else None)

    def frame(self) -> tuple[list[str], list[str]]:
        """Special tokens that the template puts before and after every text."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        return [self.token(i) for i in whole[:before]], [
            self.token(i) for i in whole[before + len(bare) :]
        ]

    def token(self, number: int | None) -> str | None:
        return None if number is None else self.backend.id_to_token(number)


class SentencePiece:
    """The package sentencepiece, as upstream's SentencePieceTokenizer calls it."""

    def __init__(self, model: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model} is no SentencePiece model: {first_line(error)}") from None

    def encode(self, texts: Sequence[str], closed: bool) -> tuple[np.ndarray, np.ndarray]:
        return _joined(
            self.processor.encode_as_ids(list(texts)), self.processor.eos_id() if closed else None
        )


class _Null:
    """Upstream's NullTokenizer: a text is a list of ids, in decimal, separated by one space."""

    def __init__(self, vocab_size: int, eod: int | None) -> None:
        self._vocab_size, self._eod = vocab_size, eod

    def encode(self, texts: Sequence[str], closed: bool) -> tuple[np.ndarray, np.ndarray]:
        rows, lengths = [], []
        for text in texts:
            ids = self._ids(text)
            lengths.append(-1 if ids is None else len(ids) + closed)
            if ids is not None:
                rows.append(np.append(ids, self._eod) if closed else ids)
        return np.concatenate(rows) if rows else np.empty(0, np.int64), np.array(lengths, np.int64)

    def _ids(self, text: str) -> np.ndarray | None:
        try:
            ids = np.array([int(word) for word in text.split(" ")], np.int64)
        except (ValueError, OverflowError):
            return None
        return ids if ids.min() >= 0 and ids.max() < self._vocab_size else None


@functools.cache
def described(model: Path) -> str:
    """A SentencePiece model as a tokenizer.json.

    Raises:
        ValueError: gigatoken cannot convert this kind of model.
    """
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    return sentencepiece_to_tokenizer_json(model.read_bytes())


def _joined(rows: list[list[int]], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    if end is not None:
        rows = [[*row, end] if row else row for row in rows]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum())), lengths


def _overlaps_itself(token: str) -> bool:
    """Whether a suffix of ``token`` is a prefix: then a text before it could shift the match."""
    return any(token.startswith(token[start:]) for start in range(1, len(token)))


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that encode."""
    packages = ("gigatoken", "tokenizers", "transformers", "sentencepiece")
    return {name: package_version(name) for name in packages}


def _machine() -> str:
    """The processor's features, by which gigatoken chooses its code paths."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {hashlib.sha256(line.encode()).hexdigest()[:12]}"
    return f"{platform.machine()} {platform.processor()}"
