"""Tokenises documents into a .bin/.idx pair: one pass, all cores, bounded memory.

One thread at a time reads a block; each parses and encodes its own (the tokenizers release the
GIL). Blocks are appended in the order they were read. Every few seconds the state on the disk is
recorded, from which a killed run resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from harness.data import indexed
from harness.data.disk import resumable
from harness.data.documents import (
    BEGIN,
    BLOCK_BYTES,
    Block,
    Reader,
    ReadPosition,
    Text,
    TextFile,
    TextLayout,
)
from harness.data.indexed import FormatError, Marks, Pair, PairWriter
from harness.data.manifest import Counted, by_rule
from harness.data.tokenizer import CACHE_MIB, Encoder, Tokenizer
from harness.errors import UserError
from harness.system.files import write_json

Watch = Callable[[int, int, int], None]
"""Called with the bytes of the input that are read, all of them, and the tokens so far."""

CHECKPOINT_S = 10.0
MOST_WORKERS = 8
_MIB_A_WORKER = 100
_WATCH_S = 0.25
_FORMAT = 1
"""Increased when the code changes in such a way that an unfinished run must not be resumed."""


@dataclass(frozen=True)
class Job:
    """What to tokenise, how, and where the pair goes (``prefix``.bin and .idx)."""

    files: tuple[TextFile, ...]
    layout: TextLayout
    tokenizer: Tokenizer
    append_eod: bool
    prefix: Path

    @property
    def dtype(self) -> np.dtype:
        return indexed.best_dtype(self.tokenizer.vocab_size)

    @property
    def state(self) -> Path:
        """The file with the state of an unfinished run."""
        return self.prefix.with_name(self.prefix.name + ".state.json")

    def key(self) -> str:
        """Changes with everything that determines the pair's bytes."""
        known = [
            _FORMAT,
            [(*file.version, file.kind, file.packing) for file in self.files],
            asdict(self.layout),
            self.tokenizer.kind,
            self.tokenizer.sha256,
            self.append_eod,
        ]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@dataclass(frozen=True)
class Done:
    """A finished pair. ``source_sha256``: by name, of the input files that were read completely."""

    pair: Pair
    counts: Counted
    source_sha256: dict[str, str]


def tokenize(job: Job, watch: Watch = lambda *now: None, workers: int | None = None) -> Done:
    """Write the pair of ``job``; resumes where a run of the same job stopped.

    Args:
        watch: called a few times a second.
        workers: threads; by default one a core, 8 at most.

    Raises:
        UserError: an input cannot be read or changed meanwhile, it has no document, or the disk is
            full.
    """
    if job.append_eod and job.tokenizer.eod is None:
        raise UserError(
            f"tokenizer {job.tokenizer.name} has no end-of-document token\nset eos_token in its"
            " tokenizer_config.json"
        )
    with resumable(f"tokenising into {job.prefix.parent}"):
        return _Run(job, workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))).finish(watch)


class _Run:
    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers, self.key = job, workers, job.key()
        self.counts, place, marks = self._resumed()
        self.place = place
        self.writer = PairWriter(job.prefix, job.dtype, marks)
        self.reader = Reader(job.files, job.layout, place)
        self._reading = threading.Lock()
        self._heavy = threading.Lock()
        self._turn = threading.Condition()
        self._next_read = self._next_written = 0
        self._waiting: dict[int, tuple[Block, _Encoded]] = {}
        self._failure: BaseException | None = None

    def finish(self, watch: Watch) -> Done:
        all_bytes = sum(file.path.stat().st_size for file in self.job.files)
        threads = [
            threading.Thread(target=self._work, name=f"tokenize-{n}", daemon=True)
            for n in range(self.workers)
        ]
        try:
            for thread in threads:
                thread.start()
            noted, alive = time.monotonic(), True
            while alive:
                next((thread for thread in threads if thread.is_alive()), threads[0]).join(_WATCH_S)
                alive, now = any(thread.is_alive() for thread in threads), time.monotonic()
                watch(self.reader.read_bytes, all_bytes, self.counts.tokens)
                if alive and now - noted > CHECKPOINT_S and self._failure is None:
                    self._checkpoint()
                    noted = now
        except BaseException as error:
            self._fail(error)
        if self._failure is not None:
            for thread in threads:
                thread.join()
            with contextlib.suppress(OSError):
                self._checkpoint()
            self.writer.close()
            raise self._failure
        if self.job.key() != self.key:
            self._discard()
            raise UserError(
                "an input changed while it was read; start again when it no longer does"
            )
        if not self.counts.documents:
            self._discard()
            found = by_rule(self.counts.skipped) or "nothing at all"
            raise UserError(f"no document in {_named(self.job.files)}: {found}")
        pair = self.writer.finish()
        self.job.state.unlink(missing_ok=True)
        return Done(pair, self.counts, self.reader.sha256)

    def _work(self) -> None:
        try:
            encoder = self.job.tokenizer.encoder(
                CACHE_MIB + _MIB_A_WORKER * max(0, self.workers - 2)
            )
            while self._failure is None:
                with self._reading:
                    block = self.reader.next()
                    number, self._next_read = self._next_read, self._next_read + 1
                if block is None:
                    return
                with self._heavy if block.size > 2 * BLOCK_BYTES else contextlib.nullcontext():
                    found = block.find()
                    encoded = _encode(found.texts, encoder, self.job)
                del found.texts[:]
                encoded.skipped.update(found.skipped)
                self._append(number, block, encoded)
                del block, found, encoded
        except BaseException as error:
            self._fail(error)

    def _append(self, number: int, block: Block, encoded: _Encoded) -> None:
        """Write the block once all earlier ones are written, and those that waited for it."""
        # A large block waits for its turn; other threads may be a few small blocks ahead.
        ahead = 1 if block.size > 2 * BLOCK_BYTES else 2 * self.workers
        with self._turn:
            self._turn.wait_for(
                lambda: number < self._next_written + ahead or self._failure is not None
            )
            self._waiting[number] = block, encoded
            while self._failure is None and self._next_written in self._waiting:
                self._write(*self._waiting.pop(self._next_written))
                self._next_written += 1
                self._turn.notify_all()

    def _write(self, block: Block, encoded: _Encoded) -> None:
        self.writer.append(encoded.ids, encoded.lengths, encoded.document_ends)
        self.place = block.end
        self.counts.records = block.end.records
        self.counts.documents += len(encoded.document_ends)
        self.counts.empty += encoded.empty
        self.counts.sequences += len(encoded.lengths)
        self.counts.tokens += len(encoded.ids)
        self.counts.skipped.update(encoded.skipped)

    def _fail(self, error: BaseException) -> None:
        with self._turn:
            self._failure = self._failure or error
            self._turn.notify_all()

    def _checkpoint(self) -> None:
        with self._turn:
            marks, counts = asdict(self.writer.marks), self.counts.model_dump()
            state = {"key": self.key, "place": self.place, "marks": marks, "counts": counts}
        self.writer.sync()
        write_json(self.job.state, state)

    def _resumed(self) -> tuple[Counted, ReadPosition, Marks | None]:
        try:
            state = json.loads(self.job.state.read_text(encoding="utf-8"))
            if state["key"] == self.key:
                counts = Counted(**state["counts"])
                marks = Marks(**state["marks"])
                PairWriter(self.job.prefix, self.job.dtype, marks).close()
                return counts, ReadPosition(*state["place"]), marks
        except (OSError, ValueError, KeyError, TypeError, FormatError):
            pass
        return Counted(), BEGIN, None

    def _discard(self) -> None:
        self.writer.discard()
        self.job.state.unlink(missing_ok=True)


@dataclass
class _Encoded:
    ids: np.ndarray
    lengths: np.ndarray
    document_ends: np.ndarray
    empty: int
    skipped: Counter[str] = field(default_factory=Counter)


def _encode(texts: Sequence[Text], encoder: Encoder, job: Job) -> _Encoded:
    """Ids, sequence lengths and document ends, as upstream's tools/preprocess_data.py has them."""
    if any(type(text) is list for text in texts):
        return _encode_sentences(
            [[text] if type(text) is str else text for text in texts], encoder, job
        )
    ids, lengths = encoder.encode(texts, job.append_eod)
    readable = lengths >= 0
    ends = np.cumsum(lengths > 0)[readable]
    skipped = Counter({"no ids": len(texts) - len(ends)}) if len(ends) < len(texts) else Counter()
    return _Encoded(
        ids.astype(job.dtype),
        lengths[lengths > 0],
        ends,
        int(np.count_nonzero(lengths == 0)),
        skipped,
    )


def _encode_sentences(texts: Sequence[list[str]], encoder: Encoder, job: Job) -> _Encoded:
    """As ``_encode``, for documents that are lists of sentences: each becomes a sequence.

    Sentences without tokens become none.
    """
    ids, lengths = encoder.encode(list(chain.from_iterable(texts)), False)
    first = np.concatenate(([0], np.cumsum([len(sentences) for sentences in texts])))
    at = np.concatenate(([0], np.cumsum(np.maximum(lengths, 0))))
    parts, sequences, ends, empty, skipped = [], [], [], 0, Counter()
    for begin, end in pairwise(first):
        own = lengths[begin:end]
        if (own < 0).any():
            skipped["no ids"] += 1
            continue
        kept = own[own > 0].tolist()
        parts.append(ids[at[begin] : at[end]])
        if kept and job.append_eod:
            parts.append([job.tokenizer.eod])
            kept[-1] += 1
        sequences += kept
        ends.append(len(sequences))
        empty += not kept
    joined = (
        np.concatenate([np.asarray(part, job.dtype) for part in parts])
        if parts
        else np.empty(0, job.dtype)
    )
    return _Encoded(joined, np.array(sequences, np.int64), np.array(ends, np.int64), empty, skipped)


def _named(files: Sequence[TextFile]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} files"
