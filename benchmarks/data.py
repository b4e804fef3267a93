"""JSON Lines in, .bin/.idx out: this project's preparation beside upstream's
tools/preprocess_data.py.

    python benchmarks/data.py FOLDER [TEXT.jsonl]

Writes benchmarks/data.json and data.md. Without TEXT.jsonl the text is gathered from this machine
(translations, sources, manuals, documentation; up to 500 MB) and kept in FOLDER, which takes 3 GB.
Both sides get the same two cores, the same file in the page cache and the same tokenizer.json; a
run is timed from outside, from the start of its process to its end. Upstream: a tree of
core_v0.19.0 at MEGATRON_LM or megatron-lm/.
"""

from __future__ import annotations

import gettext
import gzip
import hashlib
import html
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from harness.data.data_sets import DATA, prefix_of  # noqa: E402
from harness.data.header import bin_path, idx_path  # noqa: E402
from harness.data.tokenizer import find_tokenizer  # noqa: E402
from harness.machine.provenance import package_version  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
CORES = 2
TEXT_BYTES = 500 * 10**6
REPEATS = 5
PIECE = 20_000
SHARES = {"translations": 0.35, "sources": 0.30, "manuals": 0.15, "documentation": 0.20}
GROWTH = (1, 2, 4, 8)
RANDOM_BYTES = 400 * 10**6


def main(folder: Path, text: Path | None = None) -> None:
    """Measure everything and write the results."""
    folder.mkdir(parents=True, exist_ok=True)
    composition: dict[str, int] | None = None
    if text is None:
        text, composition = gather(folder / "text.jsonl")
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    gpt2 = find_tokenizer("gpt2", DATA / "tokenizers")
    text.read_bytes()  # into the page cache
    warm_up(folder, text, gpt2.model)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "tokenizer alone": [], "upstream": []}
    for _ in range(REPEATS):
        runs["tokenizer alone"].append(timed([sys.executable, __file__, "alone", text]))
        shutil.rmtree(folder / "ours", ignore_errors=True)
        runs["ours"].append(timed([sys.executable, __file__, "prepare", folder, "ours", text]))
    runs["upstream"].append(timed(upstream(text, folder, gpt2.model)))
    same = pair(prefix_of("ours", folder)) == pair(folder / "upstream_text_document")
    bytes_in = text.stat().st_size
    rates = {
        name: bytes_in / 1e6 / statistics.median(run["seconds"] for run in each)
        for name, each in runs.items()
    }
    results = {
        "machine": {
            "cpu": cpu(),
            "cores": len(cores),
            "load_before": os.getloadavg()[0],
            "system": platform.platform(),
            "python": platform.python_version(),
            **{
                name: package_version(name)
                for name in ("gigatoken", "tokenizers", "transformers", "orjson", "numpy")
            },
        },
        "text": {
            "bytes": bytes_in,
            "lines": text.read_bytes().count(b"\n"),
            "sha256": digest(text),
            "composition": composition,
        },
        "tokens": idx_tokens(prefix_of("ours", folder)),
        "identical_to_upstream": same,
        "runs": runs,
        "mb_per_s": rates,
        "times_upstream": rates["ours"] / rates["upstream"],
        "times_tokenizer_alone": rates["tokenizer alone"] / rates["ours"],
        "memory": memory(folder, text),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(results))
    print(
        json.dumps(
            {key: results[key] for key in ("mb_per_s", "times_upstream", "times_tokenizer_alone")},
            indent=1,
        )
    )
    print(f"identical to upstream: {same}; {RESULTS.relative_to(ROOT)} written")


def markdown(results: dict[str, Any]) -> str:
    """benchmarks/data.md: what the results say."""
    machine, text, kinds = results["machine"], results["text"], results["text"]["composition"] or {}
    rows = []
    for name, runs in results["runs"].items():
        seconds = [run["seconds"] for run in runs]
        shown = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}, n={len(runs)})"
        memory = max(run["memory_mib"] for run in runs)
        rows.append(f"| {name} | {shown} | {results['mb_per_s'][name]:.1f} | {memory:,.0f} |")
    grown = [
        f"| {run['bytes'] / 1e9:.1f} | {run['seconds']:.1f} | {run['bytes'] / 1e6 / run['seconds']:.0f} | {run['memory_mib']:.0f} |"
        for run in results["memory"]["grown"]
    ]
    words = results["memory"]["words_that_never_come_again"]
    return f"""# Tokenise and write: JSON Lines in, .bin/.idx out

`python benchmarks/data.py FOLDER`, on {machine["cores"]} cores of {machine["cpu"]}, Python {machine["python"]}, gigatoken
{machine["gigatoken"]}, tokenizers {machine["tokenizers"]}. {text["bytes"] / 1e6:.0f} MB of text gathered from the machine
({", ".join(f"{size / 1e6:.0f} MB {kind}" for kind, size in kinds.items())}): {text["lines"]:,} documents, {results["tokens"]:,} tokens of GPT-2.
Every figure is from data.json.

**{results["times_upstream"]:.1f} times upstream's `tools/preprocess_data.py`** (its fastest tokenizer with GPT-2's ids, `--workers {machine["cores"]}`), and
{results["times_tokenizer_alone"]:.2f} times the tokenizer's own time on that text. Output identical to upstream's: {"yes" if results["identical_to_upstream"] else "NO"}.

| | seconds | MB/s | memory, MiB |
| --- | --- | --- | --- |
{chr(10).join(rows)}

*ours* and *upstream* are whole processes from cold start to exit, checksums, `fdatasync` and manifest included in ours; *tokenizer alone* is
one call of gigatoken with all texts in memory, nothing read, parsed or written.

## Growth

The same text several times over; cost grows linearly, memory does not grow.

| GB | seconds | MB/s | memory, MiB |
| --- | --- | --- | --- |
{chr(10).join(grown)}

On {words["bytes"] / 1e6:.0f} MB of random words that never come again, the worst case for the tokenizer's cache: {words["seconds"]:.1f} s, {words["memory_mib"]:.0f} MiB.
"""


def warm_up(folder: Path, text: Path, tokenizer: Path) -> None:
    """Run both once on little text: their modules are compiled and in the page cache then, as after
    an installation."""
    little = folder / "little.jsonl"
    with text.open("rb") as lines:
        little.write_bytes(b"".join(next(lines) for _ in range(50)))
    timed([sys.executable, __file__, "prepare", folder, "ours", little])
    timed(upstream(little, folder, tokenizer))


def upstream(text: Path, folder: Path, tokenizer: Path) -> list[Any]:
    """The command of upstream's tool, with the fastest of its tokenizers that gives GPT-2's ids."""
    from harness.machine.upstream import locate

    tree = locate()
    if tree is None:
        raise SystemExit(
            "no upstream tree: git submodule update --init megatron-lm, or set MEGATRON_LM="
        )
    return [
        sys.executable,
        tree / "tools" / "preprocess_data.py",
        "--input",
        text,
        "--output-prefix",
        folder / "upstream",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--append-eod",
        "--workers",
        CORES,
    ]


def memory(folder: Path, text: Path) -> dict[str, Any]:
    """Peak memory while the input grows, and on words that never come again; gigatoken remembers
    every word."""
    grown = []
    for times in GROWTH:
        run = timed([sys.executable, __file__, "prepare", folder, "grown", *[text] * times])
        grown.append({"bytes": times * text.stat().st_size, **run})
    run = timed(
        [
            sys.executable,
            __file__,
            "prepare",
            folder,
            "random",
            random_words(folder / "random.jsonl"),
        ]
    )
    return {"grown": grown, "words_that_never_come_again": {"bytes": RANDOM_BYTES, **run}}


def prepare(folder: str, name: str, *texts: str) -> None:
    """What ``make data-prepare`` does, into ``folder``; several texts are one after another."""
    from harness.data.prepare import Means, Recipe
    from harness.data.prepare import prepare as prepare_set

    inputs = [Path(text) for text in texts]
    if len(inputs) > 1:
        links = [Path(folder) / f"copy{n}.jsonl" for n in range(len(inputs))]
        for link, target in zip(links, inputs, strict=True):
            link.unlink(missing_ok=True)
            os.link(target, link)
        inputs = links
    recipe = Recipe(name, " ".join(map(str, inputs)))
    tokenizers = Path(folder) / "tokenizers"
    if not tokenizers.exists():
        tokenizers.symlink_to(DATA / "tokenizers")
    prepare_set(recipe, Means(folder=Path(folder), force=True))


def alone(text: str) -> None:
    """The tokenizer's own time: all texts in memory, one call, all cores; prints the seconds of the
    call."""
    import orjson
    from gigatoken.gigatoken_rs import load_hf_json

    texts = [orjson.loads(line)["text"] for line in Path(text).read_bytes().splitlines()]
    description = (DATA / "tokenizers" / "gpt2" / "tokenizer.json").read_bytes()
    begun = time.monotonic()
    load_hf_json(description).encode_batch(texts, parallel=True)
    print(json.dumps({"seconds": time.monotonic() - begun}))


def timed(command: list[Any]) -> dict[str, float]:
    """Seconds of a process, of its processors, and the peak of its memory and its children's in
    MiB.

    Where the process prints seconds of its own, these are meant.
    """
    begun = time.monotonic()
    environment = {
        key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"
    }
    environment |= {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": str(CORES), "PYTHONPATH": str(ROOT)}
    environment |= {
        "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "benchmark-data-pycache")
    }
    before = os.times()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=nowhere, env=environment
        )
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    after = os.times()
    said = process.stdout.read().decode().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"{command[1]} ended with {process.returncode}")
    own = json.loads(said[-1]) if said and said[-1].startswith("{") else {}
    cpu_seconds = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory_mib": peak / 2**20, **own}


def resident(pid: int) -> int:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def gather(path: Path) -> tuple[Path, dict[str, int]]:
    """Text of several languages and kinds that every Linux machine has, each document once."""
    note = path.with_suffix(".json")
    if path.exists() and note.exists():
        return path, json.loads(note.read_text())
    sizes = dict.fromkeys(SHARES, 0)
    seen: set[bytes] = set()
    with path.open("wb") as out:
        for kind, share in SHARES.items():
            for text in READERS[kind]():
                key = hashlib.md5(
                    text[:4000].encode(errors="replace"), usedforsecurity=False
                ).digest()
                if len(text) < 200 or key in seen:
                    continue
                seen.add(key)
                for start in range(0, len(text), PIECE):
                    row = {"text": text[start : start + PIECE]}
                    sizes[kind] += out.write(
                        json.dumps(row, ensure_ascii=key[0] < 80).encode() + b"\n"
                    )
                if sizes[kind] > share * TEXT_BYTES:
                    break
    note.write_text(json.dumps(sizes))
    return path, sizes


def files(*patterns: str) -> Iterator[Path]:
    roots = (
        Path("/usr/share"),
        Path("/usr/lib"),
        Path(sysconfig.get_path("purelib")),
        Path(sysconfig.get_path("stdlib")),
    )
    found = sorted(
        {
            path
            for root in roots
            for pattern in patterns
            for path in root.rglob(pattern)
            if path.is_file()
        }
    )
    return iter(
        sorted(
            found, key=lambda path: hashlib.md5(str(path).encode(), usedforsecurity=False).digest()
        )
    )


def read_each(read: Callable[[Path], str], *patterns: str) -> Iterator[str]:
    for path in files(*patterns):
        try:
            yield read(path)
        except (OSError, ValueError, EOFError, LookupError):
            continue


def translation(path: Path) -> str:
    with path.open("rb") as file:
        return "\n".join(map(str, gettext.GNUTranslations(file)._catalog.values()))


def manual(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return (
        html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", "", text))
        if path.suffix == ".html"
        else text
    )


READERS: dict[str, Callable[[], Iterator[str]]] = {
    "translations": lambda: read_each(translation, "*.mo"),
    "sources": lambda: read_each(
        lambda path: path.read_text(encoding="utf-8"), "*.py", "*.js", "*.h"
    ),
    "manuals": lambda: read_each(manual, "man*/*.gz"),
    "documentation": lambda: read_each(page, "*.md", "*.rst", "*.txt", "*.html"),
}


def random_words(path: Path) -> Path:
    import numpy as np

    if not path.exists():
        random = np.random.default_rng(0)
        with path.open("wb") as out:
            while out.tell() < RANDOM_BYTES:
                letters = random.integers(97, 123, 1_000_000, np.uint8)
                letters[random.random(len(letters)) < 0.1] = 32
                out.write(b'{"text": "' + letters.tobytes() + b'"}\n')
    return path


def pair(prefix: Path) -> tuple[str, str]:
    return digest(bin_path(prefix)), digest(idx_path(prefix))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def idx_tokens(prefix: Path) -> int:
    from harness.data.header import check_ends

    return check_ends(prefix)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", *words]:
            prepare(*words)
        case ["alone", text]:
            alone(text)
        case [folder]:
            main(Path(folder).resolve())
        case [folder, text]:
            main(Path(folder).resolve(), Path(text).resolve())
        case _:
            sys.exit(__doc__)
