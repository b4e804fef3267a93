"""Cleans a corpus: filters each unit, compares all documents, writes those that are kept.

    output_dir/00000.jsonl …        kept documents in the order of the input, one {"text": …} a line
    output_dir/dropped/RULE.jsonl   up to 100 documents that a rule dropped, evenly drawn: where,
                                    why, and how they begin
    output_dir/decisions.npy        for each document of the input: 0 kept, n dropped by the n-th of
                                    the report's rules
    output_dir/manifest.json        the report, written last
    output_dir/work/                files of an unfinished run

Units are independent except for the comparison, and every file appears complete or not at all. No
output depends on time or on the number of processes: a killed run resumes and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict

from harness.data.clean import identification
from harness.data.clean.documents import Language
from harness.data.clean.duplicates import exact_duplicates, near_duplicates
from harness.data.clean.rules import UNREADABLE, Rules
from harness.data.clean.units import LONGEST_LINE_BYTES, UNIT_BYTES, Unit, cut
from harness.data.disk import resumable
from harness.data.progress import ShowProgress
from harness.errors import UserError
from harness.system.files import atomic, locked, read_object, write_json
from harness.system.workers import map_in_order

SAMPLES = 100
_SAMPLE_CHARACTERS = 1000
_BATCH_BYTES = 1 << 20
_STATE = "state.json"
_OWN = (_STATE, "manifest.json", "decisions.npy", "dropped", "work", "text", ".lock")
_SHARD_NAME = re.compile(r"\d{5,}\.jsonl|\..*\.tmp")
"""Names of files that a cleaning writes into its folder."""
_FORMAT = 1
"""Increased when the code changes so that files of an earlier run must not be used."""

_VERDICT = np.dtype(
    [("decision", np.uint8), ("unit", np.int32), ("offset", np.int64), ("likeness", np.float32)]
)
"""Of a document that passed the filter: the decision, and the earlier document it duplicates."""


class CleanShard(BaseModel):
    """A file of kept documents."""

    model_config = ConfigDict(frozen=True)
    name: str
    documents: int
    bytes: int
    sha256: str


class CleanReport(BaseModel):
    """Documents and bytes of JSON Lines, in and out; dropped and changed documents by rule."""

    model_config = ConfigDict(frozen=True)
    documents_in: int
    bytes_in: int
    documents_out: int
    bytes_out: int
    dropped: dict[str, int]
    changed: dict[str, int]
    shards: tuple[CleanShard, ...]
    rules: tuple[dict[str, Any], ...]
    language_model: dict[str, str] | None
    versions: dict[str, str]


def clean(
    inputs: Sequence[Path],
    output_dir: Path,
    rules: Rules,
    progress: ShowProgress = lambda what, done, total: None,
    processes: int | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> CleanReport:
    """Apply ``rules`` to the documents of ``inputs`` (JSON Lines with "text").

    The documents that are kept go to ``output_dir``, a shard for each ``unit_bytes`` of an input.
    A call with the same rules and inputs resumes an interrupted one. It takes 300 MiB a process,
    and in this process 160 bytes a document.

    Raises:
        UserError: an input is missing, none has a readable document, another process writes to
            ``output_dir``, or its disk is full.
    """
    try:
        with resumable(f"cleaning into {output_dir}"):
            units = _units(inputs, unit_bytes)
            with locked(output_dir):
                return _Cleaning(units, output_dir, rules, progress, processes).resume()
    except BrokenProcessPool:
        raise UserError(
            f"cleaning into {output_dir}: a process was killed, perhaps for lack of memory\n"
            "start again: it resumes where it stopped"
        ) from None


def check_output(
    inputs: Sequence[Path], output_dir: Path, rules: Rules, force: bool = False
) -> Path:
    """The folder to write to: ``output_dir``, or with ``force`` one that shall replace it.

    Without inputs, this only checks whether ``output_dir`` may be written to at all.

    Raises:
        UserError: ``output_dir`` has files that no cleaning wrote; or, without ``force``, the
            results of other inputs or rules.
    """
    try:
        there = {path.name for path in output_dir.iterdir()}
    except FileNotFoundError:
        return output_dir
    except OSError as error:
        raise UserError(f"OUT={output_dir}: {error.strerror}; name a folder") from None
    own = {".lock"}
    if _STATE in there:
        own = {name for name in there if name in _OWN or _SHARD_NAME.fullmatch(name)}
    if foreign := sorted(there - own):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        shown = ", ".join(foreign[:3]) + more
        raise UserError(
            f"OUT={output_dir} holds files that no cleaning wrote: {shown}\n"
            "name a folder that is new or empty"
        )
    if (
        _STATE not in there
        or not inputs
        or noted_state(output_dir) == _state(_units(inputs, UNIT_BYTES), rules)
    ):
        return output_dir
    if not force:
        raise UserError(
            f"OUT={output_dir} holds the results of other inputs or other rules\n"
            "name another folder; FORCE=1 replaces this one once the new one is whole"
        )
    return output_dir.with_name(f".{output_dir.name}.new")


def noted_state(output_dir: Path) -> dict[str, Any] | None:
    """The state of the run that wrote to ``output_dir``; None if it is missing or damaged."""
    try:
        return read_object(output_dir / _STATE)
    except ValueError:
        return None


def _units(inputs: Sequence[Path], unit_bytes: int) -> tuple[Unit, ...]:
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise UserError(f"no such file: {', '.join(missing)}")
    if not (units := cut(inputs, unit_bytes)):
        raise UserError(f"nothing to clean: {', '.join(map(str, inputs)) or 'no input'} is empty")
    return units


@dataclass(frozen=True)
class _Cleaning:
    """One call of ``clean``, under the lock of its output folder."""

    units: tuple[Unit, ...]
    output_dir: Path
    rules: Rules
    progress: ShowProgress
    processes: int | None

    @property
    def work(self) -> Path:
        return self.output_dir / "work"

    def resume(self) -> CleanReport:
        manifest, state = self.output_dir / "manifest.json", _state(self.units, self.rules)
        if noted_state(self.output_dir) != state:
            _clear(self.output_dir)
            write_json(self.output_dir / _STATE, state)
        if not manifest.exists():
            self.work.mkdir(exist_ok=True)
            if not (self.work / "verdicts.npy").exists():
                self._filter_all()
                compare(self.units, self.work, self.rules, self.progress)
            self._write_all()
            self._finish()
        shutil.rmtree(self.work, ignore_errors=True)
        return CleanReport.model_validate_json(manifest.read_bytes())

    def _filter_all(self) -> None:
        done, total = 0, sum(unit.bytes for unit in self.units)
        self.progress("filter", 0, total)
        tasks = ((unit, self.work, self.rules) for unit in self.units)
        with map_in_order(_filter, tasks, self.processes) as finished:
            for unit, _ in zip(self.units, finished, strict=True):
                done += unit.bytes
                self.progress("filter", done, total)
        filtered = [_marker(self.work, unit) for unit in self.units]
        documents = sum(found["documents"] for found in filtered)
        if documents == sum(found["dropped"][UNREADABLE] for found in filtered):
            whys = (sample["why"] for found in filtered for sample in found["samples"])
            raise UserError(
                f"none of {documents:,} lines is a document; {next(whys, 'there is none')}\n"
                'lines must be like {"text": "…"}'
            )

    def _write_all(self) -> None:
        lengths = [len(_array(self.work, unit, "offsets")) for unit in self.units]
        firsts = np.cumsum([0, *lengths[:-1]]).tolist()
        tasks = (
            (unit, self.output_dir, self.rules, self.units, first)
            for unit, first in zip(self.units, firsts, strict=True)
        )
        with map_in_order(_write, tasks, self.processes) as finished:
            for done, _ in enumerate(finished, start=1):
                self.progress("write", done, len(self.units))

    def _finish(self) -> None:
        """Merge the results of the units, and write the report last."""
        units, output_dir, rules, work = self.units, self.output_dir, self.rules, self.work
        filtered = [_marker(work, unit) for unit in units]
        written = [json.loads((work / f"{unit.name}.done.json").read_text()) for unit in units]
        (output_dir / "dropped").mkdir(exist_ok=True)
        parts = (*filtered, *written)
        samples = [sample for part in parts for sample in part["samples"]]
        for name in rules.names:
            with atomic(output_dir / "dropped" / f"{name}.jsonl") as file:
                for sample in _least(sample for sample in samples if sample["rule"] == name):
                    del sample["draw"]
                    file.write(orjson.dumps(sample, option=orjson.OPT_APPEND_NEWLINE))
        dropped, changed = Counter(), Counter(dict.fromkeys((r.key for r in rules.documents), 0))
        for part in parts:
            dropped.update(part["dropped"])
            changed.update(part.get("changed", {}))
        decisions = np.concatenate([_array(work, unit, "decisions") for unit in units])
        decisions[decisions == 0] = np.load(work / "verdicts.npy")["decision"]
        with atomic(output_dir / "decisions.npy") as file:
            np.save(file, decisions)
        shards = tuple(CleanShard(**part["shard"]) for part in written)
        model = None
        if any(isinstance(rule, Language) for rule in rules.documents):
            model = {
                "file": identification.MODEL,
                "sha256": identification.SHA256,
                "looks_at": "the whole document",
            }
        report = CleanReport(
            documents_in=len(decisions),
            bytes_in=sum(unit.bytes for unit in units),
            documents_out=sum(shard.documents for shard in shards),
            bytes_out=sum(shard.bytes for shard in shards),
            dropped=dropped,
            changed=changed,
            shards=shards,
            rules=tuple(rules.dump()),
            language_model=model,
            versions=_versions(),
        )
        write_json(output_dir / "manifest.json", report.model_dump(mode="json"))


def _state(units: Sequence[Unit], rules: Rules) -> dict[str, Any]:
    """Everything that the results of a run depend on."""
    return {
        "format": _FORMAT,
        "rules": rules.dump(),
        "units": [
            [str(unit.path.resolve()), unit.path.stat().st_mtime_ns, unit.start, unit.end]
            for unit in units
        ],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import unicodedata

    return {
        "numpy": np.__version__,
        "orjson": orjson.__version__,
        "unicode": unicodedata.unidata_version,
    }


def _clear(output_dir: Path) -> None:
    """Remove another run's files, the report first, so that they never look complete."""
    (output_dir / "manifest.json").unlink(missing_ok=True)
    for folder in ("work", "dropped"):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    for path in (*output_dir.glob("[0-9]*.jsonl"), output_dir / "decisions.npy"):
        path.unlink(missing_ok=True)


def _filter(unit: Unit, work: Path, rules: Rules) -> None:
    """Apply the rules for single documents to a unit.

    Writes work/N.jsonl (what passes), N.npz (``decisions`` of all its documents; ``offsets`` in the
    input, ``ends`` in N.jsonl, ``hashes`` and ``signatures`` of those that pass) and, last, N.json
    (counts and samples).
    """
    if (work / f"{unit.name}.json").exists():
        return
    changed: Counter[str] = Counter()
    samples = _Samples(unit)
    with atomic(work / f"{unit.name}.jsonl") as file:
        decisions = [np.empty(0, np.uint8)]
        passed = [_write_batch(file, [], [], rules)]
        for offsets, lines in _batches(unit):
            decision = np.zeros(len(lines), np.uint8)
            texts, alive = _parse(offsets, lines, decision, samples)
            for number, rule in enumerate(rules.documents, start=2):
                outcome = rule.apply(texts)
                for position, why in outcome.dropped.items():
                    decision[alive[position]] = number
                    samples.add(rule.key, offsets[alive[position]], why, texts[position])
                left = [
                    position for position in range(len(texts)) if position not in outcome.dropped
                ]
                changed[rule.key] += sum(
                    texts[at] is not new for at, new in zip(left, outcome.texts, strict=True)
                )
                alive, texts = [alive[at] for at in left], outcome.texts
            decisions.append(decision)
            passed.append(_write_batch(file, [offsets[i] for i in alive], texts, rules))
    offsets, sizes, hashes, signatures = map(np.concatenate, zip(*passed, strict=True))
    decided = np.concatenate(decisions)
    with atomic(work / f"{unit.name}.npz") as file:
        np.savez(
            file,
            decisions=decided,
            offsets=offsets,
            ends=np.cumsum(sizes),
            hashes=hashes,
            signatures=signatures,
        )
    counts = np.bincount(decided, minlength=len(rules.names) + 1).tolist()
    write_json(
        work / f"{unit.name}.json",
        {
            "documents": len(decided),
            "dropped": dict(zip(rules.names, counts[1:], strict=True)),
            "changed": changed,
            "samples": samples.chosen(),
        },
    )


def _batches(unit: Unit) -> Iterator[tuple[list[int], list[bytes]]]:
    offsets, lines, size = [], [], 0
    for offset, line in unit.lines():
        offsets.append(offset)
        lines.append(line)
        size += len(line)
        if size >= _BATCH_BYTES:
            yield offsets, lines
            offsets, lines, size = [], [], 0
    if lines:
        yield offsets, lines


def _parse(
    offsets: list[int], lines: list[bytes], decision: np.ndarray, samples: _Samples
) -> tuple[list[str], list[int]]:
    """The texts of readable lines, and the numbers of these lines."""
    texts, alive = [], []
    for i, line in enumerate(lines):
        text, why = _text(line)
        if why:
            decision[i] = 1
            beginning = line[: 4 * _SAMPLE_CHARACTERS].decode(errors="replace")
            samples.add(UNREADABLE, offsets[i], why, beginning)
        else:
            texts.append(text)
            alive.append(i)
    return texts, alive


def _text(line: bytes) -> tuple[str, str | None]:
    """The text of a line, or the reason why it has none."""
    if len(line) > LONGEST_LINE_BYTES:
        return "", f"line longer than {LONGEST_LINE_BYTES >> 20} MiB"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return "", f"no JSON in UTF-8: {str(error)[:200]}"
    if not isinstance(value, dict):
        return "", f"no JSON object but {str(value)[:50]!r}"
    text = value.get("text")
    if isinstance(text, str):
        return text, None
    if text is None:
        return "", f'no "text" among the keys {", ".join(value)[:200]}'
    return "", f'"text" is {str(text)[:50]!r}'


def _write_batch(
    file, offsets: list[int], texts: list[str], rules: Rules
) -> tuple[np.ndarray, ...]:
    """Write ``texts``; returns offsets in the input, sizes of lines, hashes and signatures."""
    lines = [orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in texts]
    file.writelines(lines)
    encoded = [text.encode() for text in texts]
    hashes = (
        b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded)
        if rules.exact
        else b""
    )
    signatures = (
        rules.near.signatures(encoded) if rules.near else np.empty((len(texts), 0), np.uint8)
    )
    return (
        np.array(offsets, np.int64),
        np.array([len(line) for line in lines], np.int64),
        np.frombuffer(hashes, "<u8"),
        signatures,
    )


def signature_bytes(rules: Rules) -> int:
    """Bytes of a document's signature."""
    return rules.near.bands * rules.near.rows if rules.near else 0


def compare(units: Sequence[Unit], work: Path, rules: Rules, progress: ShowProgress) -> None:
    """Write work/verdicts.npy: a ``_VERDICT`` for each document that passed the filter."""
    kept = [_array(work, unit, "offsets") for unit in units]
    offsets = np.concatenate(kept)
    unit_of = np.repeat(np.arange(len(units), dtype=np.int32), [len(of_unit) for of_unit in kept])
    verdicts = np.zeros(len(offsets), _VERDICT)
    verdicts["unit"] = -1
    if rules.exact and len(offsets):
        twin = exact_duplicates(np.concatenate([_array(work, unit, "hashes") for unit in units]))
        _decide(verdicts, twin, rules, rules.exact.key, unit_of, offsets)
        verdicts["likeness"][twin >= 0] = 1
    if rules.near and len(offsets):
        signatures = np.empty((len(offsets), signature_bytes(rules)), np.uint8)
        start = 0
        for unit in units:
            of_unit = _array(work, unit, "signatures")
            signatures[start : start + len(of_unit)] = of_unit
            start += len(of_unit)
        left = np.flatnonzero(verdicts["decision"] == 0)
        twin = near_duplicates(
            rules.near, signatures, left, lambda *done: progress("compare", *done)
        )
        _decide(verdicts, twin, rules, rules.near.key, unit_of, offsets)
        later = np.flatnonzero(twin >= 0)
        verdicts["likeness"][later] = rules.near.likeness(signatures, twin[later], later)
    with atomic(work / "verdicts.npy") as file:
        np.save(file, verdicts)


def _decide(
    verdicts: np.ndarray,
    twin: np.ndarray,
    rules: Rules,
    key: str,
    unit_of: np.ndarray,
    offsets: np.ndarray,
) -> None:
    later = np.flatnonzero(twin >= 0)
    verdicts["decision"][later] = 1 + rules.names.index(key)
    verdicts["unit"][later] = unit_of[twin[later]]
    verdicts["offset"][later] = offsets[twin[later]]


def _write(unit: Unit, output_dir: Path, rules: Rules, units: Sequence[Unit], first: int) -> None:
    """Copy the kept documents of a unit to its shard, and its counts to work/N.done.json."""
    work = output_dir / "work"
    done = work / f"{unit.name}.done.json"
    filtered = work / f"{unit.name}.jsonl"
    if not done.exists():
        ends = _array(work, unit, "ends")
        verdicts = np.load(work / "verdicts.npy", mmap_mode="r")[first : first + len(ends)]
        keep = verdicts["decision"] == 0
        data = memoryview(filtered.read_bytes())
        digest = hashlib.sha256()
        starts = np.concatenate(([0], ends))
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False))
        with atomic(output_dir / f"{unit.name}.jsonl") as file:
            for start, end in starts[edges].reshape(-1, 2).tolist():
                digest.update(data[start:end])
                file.write(data[start:end])
            size = file.tell()
        samples = _Samples(unit)
        offsets = _array(work, unit, "offsets")
        for i in np.flatnonzero(~keep).tolist():
            verdict = verdicts[i]
            twin = f"{units[verdict['unit']].path.name}:{verdict['offset']}"
            why = f"{verdict['likeness']:.2f} like the one at {twin}"
            text = orjson.loads(data[starts[i] : starts[i + 1]])["text"]
            samples.add(rules.names[verdict["decision"] - 1], int(offsets[i]), why, text)
        shard = CleanShard(
            name=f"{unit.name}.jsonl",
            documents=int(keep.sum()),
            bytes=size,
            sha256=digest.hexdigest(),
        )
        dropped = np.bincount(verdicts["decision"], minlength=len(rules.names) + 1).tolist()[1:]
        write_json(
            done,
            {
                "shard": shard.model_dump(),
                "dropped": dict(zip(rules.names, dropped, strict=True)),
                "samples": samples.chosen(),
            },
        )
    filtered.unlink(missing_ok=True)


def _marker(work: Path, unit: Unit) -> dict[str, Any]:
    return json.loads((work / f"{unit.name}.json").read_text())


def _array(work: Path, unit: Unit, name: str) -> np.ndarray:
    with np.load(work / f"{unit.name}.npz") as arrays:
        return arrays[name]


class _Samples:
    """An even draw of the documents that each rule drops from a unit, equal in every run."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._found: dict[str, list[dict[str, Any]]] = {}

    def add(self, rule: str, offset: int, why: str, text: str) -> None:
        draw = hashlib.blake2b(f"{self._unit.number} {offset}".encode(), digest_size=7).digest()
        found = self._found.setdefault(rule, [])
        found.append(
            {
                "draw": int.from_bytes(draw),
                "rule": rule,
                "file": self._unit.path.name,
                "offset": offset,
                "why": why,
                "text": text[:_SAMPLE_CHARACTERS],
            }
        )
        if len(found) > 8 * SAMPLES:
            found[:] = _least(found)

    def chosen(self) -> list[dict[str, Any]]:
        return [sample for found in self._found.values() for sample in _least(found)]


def _least(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nsmallest(SAMPLES, found, key=lambda sample: sample["draw"])
