"""Damaged files of programs: whatever a reader finds, it answers with a value or a sentence for people, never a traceback.

Each case damages a file that readers accept, in ways drawn from a seed, so that a failure names how to see it again.
"""

import json
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import ROOT
from harness.data import data_sets, header, manifest
from harness.errors import UserError
from harness.evidence import results, tables
from harness.evidence.references import load_references
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import divisors
from harness.run import directory, schema
from harness.system.files import json_object, read_object

EXPERIMENTS, RECORDS = ROOT / "experiments", ROOT / "experiments" / "records"
QUICK, LONG = 30, 500
"""Damaged versions of each file, in ``make test`` and in ``make test-full``."""
STUCK_S = 120
"""A reader that works for so long on a few kB has hung, however busy the machine is."""

# What people and killed programs leave where something else belongs.
HOSTILE = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**70,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "0",
    "-1",
    "\u0661",
    "nan",
    "cpu",
    "../..",
    "a\x00b",
    "\ud800",
    "x" * 5000,
    [],
    [None],
    ["x"],
    [1, 2, 3],
    [[1]],
    {},
    {"every": 1},
    {"x": {"y": []}},
    {"": 0},
)
# Fragments of text with a meaning of their own in YAML or JSON.
FRAGMENTS = (
    "? [a]\n: b\n",
    "? {a: 1}\n",
    "&a [*a]",
    "*none",
    "!!python/object/apply:os.getcwd []",
    "!!binary 'AA=='",
    "!!set {a}",
    "2026-01-01",
    "<<: 3\n",
    "<<: [x]\n",
    "1: 2\n",
    "~: x\n",
    "[1]: x\n",
    "0x10",
    "1e400",
    "- ",
    "%YAML 9.9\n---\n",
    "---\na: b\n",
    "\t",
    "'",
    "{",
    "}",
    ",",
    "[" * 3000,
    "NaN",
    "\\ud800",
    "null",
    "\x00",
    "\u2028",
    "9" * 5000,
)


def damaged_values(value: Any, rng: random.Random) -> Any:
    """A copy of a tree of dicts and lists with one place changed: another value, a key gone, or one that does not belong."""
    tree = json.loads(json.dumps(value)) if not isinstance(value, str) else value
    places = list(nodes(tree))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("x", "", "0", "\x00"))] = holder.pop(key)
        case 2:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case _:
            holder[key] = rng.choice(HOSTILE)
    return tree


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as the holder and its key."""
    keys = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in list(keys):
        yield tree, key
        yield from nodes(value)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a byte flipped, a range zeroed or gone, cut off, or with a fragment inside."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 8, 512))
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
        case 2:
            return data[:at] + data[at + size :]
        case 3:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 4:
            return data[:at] + rng.randbytes(size) + data[at:]
        case _:
            starts = [m.end() for m in re.finditer(rb"\n *|: |\[|, ", data)] or [0]
            at = rng.choice(starts)
            return data[:at] + rng.choice(FRAGMENTS).encode("utf-8", "surrogatepass") + data[at:]


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    return json.dumps(damaged_values(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """A .jsonl with one line damaged."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join(
        [*lines[:at], damaged_json(lines[at], rng).strip(b"\n") + b"\n", *lines[at + 1 :]]
    )


def damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    return yaml.dump(
        damaged_values(string_keys(yaml.safe_load(data)), rng), allow_unicode=True
    ).encode("utf-8", "surrogatepass")


def string_keys(tree: Any) -> Any:
    return {str(k): string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its length, its header or its tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    match rng.randrange(4):
        case 0:
            return (
                struct.pack(
                    "<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
                )
                + data[8:]
            )
        case 1:
            return damaged_bytes(data, rng)
        case _:
            head = damaged_json(data[8 : 8 + length].rstrip(), rng)
            return struct.pack("<Q", len(head)) + head + data[8 + length :]


@dataclass(frozen=True)
class Case:
    """A file ``path`` below a folder that ``build`` fills, how it is damaged, and who reads it.

    ``allowed``: what the reader's docstring says it raises.
    """

    path: str
    build: Callable[[Path], Any]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]
    allowed: tuple[type[Exception], ...] = (UserError,)


def chapter(folder: Path) -> None:
    for name in ("models.yaml", "400-pipeline-parallel.yaml", "600-models.yaml"):
        shutil.copy(EXPERIMENTS / name, folder)


def read_catalog(folder: Path) -> None:
    """Read it, and use of every row what listing uses."""
    for e in load_catalog.__wrapped__(folder).experiments:
        assert all((e.name, e.label, e.layout, e.world_size))


def record(folder: Path) -> None:
    (folder / "h200-141gb").mkdir()
    for name in ("101.json", "101.metrics.jsonl"):
        shutil.copy(RECORDS / "h200-141gb" / name, folder / "h200-141gb")


def read_records(folder: Path) -> tuple[str, ...]:
    """As tables show them; returns the warnings."""
    return shown(results.collect_records(folder, references()))


@cache
def references() -> results.References:
    return load_references()


def shown(found: results.Results) -> tuple[str, ...]:
    for kind in ("terminal", "json"):
        tables.render(found.rows, kind, titles=load_catalog().chapters)
    return found.warnings


def run_directory(outdir: Path) -> None:
    """A run with every file that readers know, of a record."""
    kept = json.loads((RECORDS / "h200-141gb/101.json").read_text())
    run = outdir / "101-run"
    (run / "ranks").mkdir(parents=True)
    (run / "experiment.json").write_text(
        json.dumps(
            {
                **kept["experiment"],
                "device": "cuda",
                "commit": "c",
                "saving": {"every": 5, "keep": 2, "folder": None},
            }
        )
    )
    (run / "result.json").write_text(
        json.dumps({k: v for k, v in kept.items() if k in schema.Result.model_fields})
    )
    (run / "environment.json").write_text(json.dumps(kept["environment"]))
    shutil.copy(RECORDS / "h200-141gb/101.metrics.jsonl", run / "metrics.jsonl")
    (run / "validation.jsonl").write_text(
        '{"step": 5, "split": "valid", "loss": 3.5, "time": 1.0}\n'
    )
    (run / "saves.jsonl").write_text(
        '{"step": 5, "asynchronous": true, "blocked_ms": 3.5, "whole_after_s": 1.0, "whole_at_step": 6, '
        '"gib": 1.5, "time": 1.0}\n'
    )
    (run / "running.json").write_text(
        '{"pid": 1, "host": "h", "started": 1.0, "rendezvous": "h:1", "resumed_at": [4]}'
    )
    (run / "ranks/0.json").write_text(
        json.dumps(
            {
                "rank": 0,
                "local_rank": 0,
                "pid": 1,
                "host": "h",
                "device": "cuda:0",
                "coordinates": {"tp": 0},
                "allocated_peak_gib": 1.5,
                "reserved_peak_gib": 2.5,
                "nvml_used_gib": None,
                "rss_peak_gib": 3.0,
                "gc_ms": {"3": 1.5},
                "step": 9,
            }
        )
    )
    (run / "ranks/0.error.json").write_text(
        '{"rank": 0, "type": "E", "message": "m", "traceback": "t", "time": 1.0, "step": 3}'
    )


def read_run(outdir: Path) -> tuple[str, ...]:
    """All that tables, checkpoints and stop ask of a run; returns the warnings."""
    warnings = shown(results.collect_runs(outdir, references()))
    run = directory.RunDir(outdir / "101-run")
    assert isinstance(run.checkpoints, Path)
    for ask in (
        run.read_saving,
        run.read_running,
        run.read_metrics,
        run.read_validation,
        run.read_saves,
        run.read_ranks,
        run.read_rank_errors,
        run.stacks,
    ):
        ask()
    for ask in (run.state, run.read_result, run.read_experiment, run.read_device):
        with_value_error(ask)
    return warnings


def with_value_error(ask: Callable[[], Any]) -> None:
    """Ask what may answer with a ValueError, by its docstring."""
    with suppress(ValueError):
        ask()


def data_set(folder: Path) -> None:
    """A prepared pair of two documents, with its manifest."""
    home = folder / "mine"
    home.mkdir()
    prefix = data_sets.prefix_of("mine", folder)
    lengths, pointers, documents = (3, 2), (0, 6), (0, 1, 2)
    header.bin_path(prefix).write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    header.idx_path(prefix).write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 2, 3)
        + struct.pack("<2i", *lengths)
        + struct.pack("<2q", *pointers)
        + struct.pack("<3q", *documents)
    )
    kept = {
        "name": "mine",
        "recipe": "r",
        "created": 1.0,
        "append_eod": True,
        "chat": None,
        "seconds": {"write": 1.0},
        "versions": {"numpy": "2"},
        "source": {
            "kind": "files",
            "asked": {"paths": ["a"]},
            "commit": None,
            "skipped": {"empty": 1},
            "files": [{"name": "a", "bytes": 3, "sha256": None}],
        },
        "cleaned": {
            "rules": "r",
            "documents_in": 2,
            "documents_out": 2,
            "bytes_in": 5,
            "bytes_out": 5,
            "dropped": {},
            "changed": {},
        },
        "counted": {
            "records": 2,
            "documents": 2,
            "empty": 0,
            "sequences": 2,
            "tokens": 5,
            "skipped": {},
        },
        "tokenizer": {
            "type": "NullTokenizer",
            "name": "bytes",
            "sha256": "",
            "vocab_size": 256,
            "eod": 0,
            "by": "b",
        },
        "written": {
            "dtype": "uint16",
            "bin_bytes": 10,
            "bin_sha256": "b",
            "idx_bytes": 74,
            "idx_sha256": "i",
        },
    }
    (home / manifest.FILE).write_text(json.dumps(kept))


def read_data(folder: Path) -> None:
    manifest.read_manifest(folder / "mine")
    data_sets.prepared_names(folder)
    data_sets.blend("mine", folder)


INDEX = "model.safetensors.index.json"


def open_shards(folder: Path) -> None:
    pytest.importorskip("torch", reason="the set-up stage `heavy` is not installed")
    from harness.convert.safetensor_files import open_folder

    open_folder(folder)


def sharded_model(folder: Path) -> None:
    """A tensor in each of two shards, with an index."""
    for n, name in enumerate(("a", "b")):
        head = json.dumps(
            {
                "__metadata__": {"format": "pt"},
                name: {"dtype": "F32", "shape": [2, n + 1], "data_offsets": [0, 8 * (n + 1)]},
            }
        ).encode()
        (folder / f"model-{n}.safetensors").write_bytes(
            struct.pack("<Q", len(head)) + head + bytes(range(8 * (n + 1)))
        )
    (folder / INDEX).write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
        )
    )


CASES = {
    "experiments": Case("400-pipeline-parallel.yaml", chapter, damaged_yaml, read_catalog),
    "record": Case("h200-141gb/101.json", record, damaged_json, read_records),
    "record's metrics": Case("h200-141gb/101.metrics.jsonl", record, damaged_lines, read_records),
    "experiment.json": Case("101-run/experiment.json", run_directory, damaged_json, read_run),
    "result.json": Case("101-run/result.json", run_directory, damaged_json, read_run),
    "environment.json": Case("101-run/environment.json", run_directory, damaged_json, read_run),
    "running.json": Case("101-run/running.json", run_directory, damaged_json, read_run),
    "metrics.jsonl": Case("101-run/metrics.jsonl", run_directory, damaged_lines, read_run),
    "validation.jsonl": Case("101-run/validation.jsonl", run_directory, damaged_lines, read_run),
    "saves.jsonl": Case("101-run/saves.jsonl", run_directory, damaged_lines, read_run),
    "rank": Case("101-run/ranks/0.json", run_directory, damaged_json, read_run),
    "rank's error": Case("101-run/ranks/0.error.json", run_directory, damaged_json, read_run),
    "manifest": Case("mine/manifest.json", data_set, damaged_json, read_data),
    "idx": Case("mine/mine_text_document.idx", data_set, damaged_bytes, read_data),
    "safetensors": Case("model-1.safetensors", sharded_model, damaged_safetensors, open_shards),
    "safetensors index": Case(INDEX, sharded_model, damaged_json, open_shards),
}

WARNING = [name for name, case in CASES.items() if case.read in (read_records, read_run)]
"""Those that leave out, with a warning, what is damaged."""


@pytest.mark.parametrize("name", CASES)
def test_readers_accept_what_is_whole(name, tmp_path):
    case = CASES[name]
    case.build(tmp_path)
    assert case.read(tmp_path) in (None, ()) or name not in WARNING


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "seeds",
    [range(QUICK), pytest.param(range(QUICK, LONG), marks=pytest.mark.full)],
    ids=["quick", "long"],
)
def test_readers_say_what_is_damaged(name, seeds, tmp_path):
    case = CASES[name]
    case.build(tmp_path)
    path = tmp_path / case.path
    whole, wrong = path.read_bytes(), {}
    previous = signal.signal(signal.SIGALRM, stuck)
    try:
        for seed in seeds:
            path.write_bytes(case.damage(whole, random.Random(f"{name} {seed}")))
            signal.alarm(STUCK_S)
            try:
                case.read(tmp_path)
            except case.allowed:
                pass
            except Exception as error:
                wrong.setdefault(f"{type(error).__name__}: {str(error)[:200]}", []).append(seed)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert not wrong, wrong


def stuck(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"the reader did not answer within {STUCK_S} s")


# What this found, one by one.


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (f"gbs: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
        ("gbs: 100000000000", "less than or equal to 2147483647"),
        (f"mbs: {'[' * 3000}", "400-pipeline-parallel.yaml is"),
        ("shows: 2026-02-30", "is not valid YAML"),
    ],
)
def test_a_row_is_refused_with_what_is_wrong_in_it(tmp_path, row, said):
    chapter(tmp_path)
    path = tmp_path / "400-pipeline-parallel.yaml"
    path.write_text(
        re.sub(r"(?m)^experiments:\n", f"experiments:\n  499:\n    {row}\n", path.read_text())
    )
    with pytest.raises(UserError, match=re.escape(said)):
        load_catalog.__wrapped__(tmp_path)


def test_divisors_of_a_large_number_come_at_once():
    assert divisors(2**31 - 1) == [1, 2**31 - 1]
    for n in (1, 2, 36, 48, 97, 1024, 5040):
        assert divisors(n) == [k for k in range(1, n + 1) if n % k == 0]


def test_json_that_is_nested_too_deeply_is_no_object(tmp_path):
    assert json_object("[" * 100_000) is None
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize("shard", ["x" * 5000, "a\x00b"])
def test_a_shard_that_cannot_be_a_file_is_damage(tmp_path, shard):
    sharded_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"is damaged|shards are missing"):
        open_shards(tmp_path)
