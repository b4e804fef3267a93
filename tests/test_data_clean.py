"""Cleaning a corpus: what is kept, counted and sampled; bad input; a kill at any moment."""

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="needs numpy")
pytest.importorskip("orjson", reason="needs orjson")

from harness.data.clean import clean, load_rules, pipeline  # noqa: E402
from harness.errors import UserError  # noqa: E402

ROOT = Path(__file__).parent.parent
RULES = ROOT / "data" / "rules-sv.yaml"
UNIT_BYTES = 1 << 16


@pytest.fixture(scope="module")
def rules():
    return load_rules(RULES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1.5 MB of a crawl in two files: its shards and what becomes of them."""
    pytest.importorskip("wordfreq", reason="needs wordfreq")
    from harness.data.synthetic.corpus import DAMAGED, Corpus
    from harness.data.synthetic.files import generate

    folder = tmp_path_factory.mktemp("corpus")
    (shard,) = generate(folder, 1_500_000, Corpus(1, DAMAGED), processes=1)
    lines = shard.read_bytes().splitlines(True)
    parts = folder / "a.jsonl", folder / "b.jsonl"
    parts[0].write_bytes(b"".join(lines[:200]))
    parts[1].write_bytes(b"".join(lines[200:]))
    output = folder / "out"
    clean(parts, output, load_rules(RULES), processes=1, unit_bytes=UNIT_BYTES)
    return parts, output


def files(folder):
    """Name -> checksum of every file that a run leaves, but for what it needs to know its inputs again."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("state.json", ".lock")
    }


def texts(folder):
    return [
        json.loads(line)["text"]
        for path in sorted(folder.glob("0*.jsonl"))
        for line in path.open("rb")
    ]


def write(path, *documents):
    lines = (
        d if isinstance(d, bytes) else json.dumps({"text": d}).encode() + b"\n" for d in documents
    )
    path.write_bytes(b"".join(lines))
    return path


def only(tmp_path, *entries):
    import yaml

    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": list(entries)}))
    return load_rules(path)


def test_every_document_is_accounted_for(corpus):
    parts, output = corpus
    report = json.loads((output / "manifest.json").read_text())
    lines = [line for part in parts for line in part.open("rb")]
    decisions = np.load(output / "decisions.npy")
    assert len(lines) == len(decisions) == report["documents_in"]
    assert report["documents_in"] == report["documents_out"] + sum(report["dropped"].values())
    assert report["documents_out"] == len(texts(output)) == (decisions == 0).sum()
    assert report["bytes_in"] == sum(part.stat().st_size for part in parts)
    assert report["bytes_out"] == sum(path.stat().st_size for path in output.glob("0*.jsonl"))
    for number, (rule, dropped) in enumerate(report["dropped"].items(), start=1):
        assert (decisions == number).sum() == dropped
        samples = [json.loads(line) for line in (output / "dropped" / f"{rule}.jsonl").open()]
        assert len(samples) == min(dropped, pipeline.SAMPLES)
    sums = files(output)
    assert all(sums[shard["name"]] == shard["sha256"] for shard in report["shards"])
    assert report["language_model"]["file"] == "lid.176.ftz"
    assert not (output / "work").exists()


def test_samples_lead_to_their_documents(corpus):
    parts, output = corpus
    content = {part.name: part.read_bytes() for part in parts}
    decisions = np.load(output / "decisions.npy")
    starts = [(name, at) for name, data in content.items() for at in line_starts(data)]
    rules = [*json.loads((output / "manifest.json").read_text())["dropped"]]
    for path in (output / "dropped").glob("*.jsonl"):
        for sample in map(json.loads, path.open()):
            number = starts.index((sample["file"], sample["offset"]))
            assert rules[decisions[number] - 1] == sample["rule"] == path.stem
            if path.stem.endswith("duplicates"):
                name, at = sample["why"].split()[-1].split(":")
                twin = starts.index((name, int(at)))
                assert twin < number
                assert decisions[twin] == 0 or path.stem == "near-duplicates"


def line_starts(data):
    at = 0
    for line in data.splitlines(True):
        yield at
        at += len(line)


def test_output_is_in_order_and_clean(corpus, rules):
    _, output = corpus
    kept = texts(output)
    assert len(set(kept)) == len(kept)
    for rule in rules.documents:
        if rule.key != "language":
            assert rule.apply(kept).texts == kept
    inputs = [
        json.loads(line.decode(errors="replace"))["text"]
        for part in corpus[0]
        for line in part.open("rb")
    ]
    sound = [" ".join(text.split()) for text in inputs]
    same = [text for text in kept if text in set(sound)]
    assert len(same) > 0.8 * len(kept)
    positions = [sound.index(text) for text in same]
    assert positions == sorted(positions)


def test_the_same_with_two_processes_and_other_units(corpus, rules, tmp_path):
    parts, output = corpus
    clean(parts, tmp_path / "two", rules, processes=2, unit_bytes=UNIT_BYTES)
    assert files(tmp_path / "two") == files(output)
    clean(parts, tmp_path / "large", rules, processes=1)
    assert texts(tmp_path / "large") == texts(output)
    assert (
        np.load(tmp_path / "large" / "decisions.npy") == np.load(output / "decisions.npy")
    ).all()


def test_what_is_done_is_not_done_again(corpus, rules, tmp_path):
    parts, _ = corpus
    said = []
    first = clean(parts, tmp_path, rules, lambda *progress: said.append(progress), 1, UNIT_BYTES)
    size = sum(part.stat().st_size for part in parts)
    assert said[0] == ("filter", 0, size)
    assert ("filter", size, size) in said
    assert [what for what, done, total in said if done == total] == ["filter", "compare", "write"]
    said.clear()
    assert (
        clean(parts, tmp_path, rules, lambda *progress: said.append(progress), 1, UNIT_BYTES)
        == first
    )
    assert not said


def test_other_rules_or_inputs_start_afresh(tmp_path):
    source = write(tmp_path / "in.jsonl", "ett", "ett två", "ett två tre")
    short = only(tmp_path, {"length": {"min_characters": 4, "max_characters": 99}})
    longer = only(tmp_path, {"length": {"min_characters": 8, "max_characters": 99}})
    output = tmp_path / "out"
    assert clean([source], output, short, processes=1).documents_out == 2
    assert clean([source], output, longer, processes=1).documents_out == 1
    write(source, "ett två tre", "fyra fem sex", "sju")
    assert clean([source], output, longer, processes=1).documents_out == 2
    assert texts(output) == ["ett två tre", "fyra fem sex"]
    assert not (output / "dropped" / "language.jsonl").exists()


def test_unreadable_lines_are_counted_and_say_why(tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        "bra",
        b'{"text": "\xff\xfe"}\n',
        b'{"txt": "x", "id": 1}\n',
        b'{"text": 5}\n',
        b"[1]\n",
        b"{not json\n",
        b'{"text": "\\ud800"}\n',
        b"\n",
        b"   \n",
        b'{"text": "nul\\u0000"}\n',
        b"\x00\n",
        b'{"text": "slut"}',
    )
    report = clean([source], tmp_path / "out", only(tmp_path), processes=1)
    assert (report.documents_in, report.documents_out, report.dropped) == (10, 3, {"unreadable": 7})
    assert texts(tmp_path / "out") == ["bra", "nul\0", "slut"]
    why = [
        json.loads(line)["why"]
        for line in (tmp_path / "out" / "dropped" / "unreadable.jsonl").open()
    ]
    for part in (
        "UTF-8",
        'no "text" among the keys txt, id',
        "\"text\" is '5'",
        "no JSON object but '[1]'",
    ):
        assert any(part in reason for reason in why), (part, why)


def test_a_line_too_long_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr("harness.data.clean.units.LONGEST_LINE_BYTES", 1000)
    source = write(tmp_path / "in.jsonl", "x" * 5000, "kort")
    report = clean([source], tmp_path / "out", only(tmp_path), processes=1, unit_bytes=700)
    assert (report.dropped, texts(tmp_path / "out")) == ({"unreadable": 1}, ["kort"])
    assert "longer than" in (tmp_path / "out" / "dropped" / "unreadable.jsonl").read_text()


@pytest.mark.full
def test_a_line_of_200_mb(tmp_path, rules):
    source = tmp_path / "in.jsonl"
    good = "Regeringen föreslår att bidraget höjs från och med nästa år, eftersom priserna stigit mycket. "
    write(source, b'{"text": "%s"}\n' % ("å".encode() * 100_000_000), good * 3 + "Så är det.")
    report = clean([source], tmp_path / "out", rules, processes=2)
    assert (report.dropped["length"], report.documents_out) == (1, 1)


def test_odd_documents_do_no_harm(tmp_path):
    """Characters of all planes, and bytes that are no text, through every rule."""
    generator = random.Random(9)

    def odd():
        if generator.random() < 0.1:
            return generator.randbytes(generator.randrange(200)).replace(b"\n", b"") + b"\n"
        most = generator.choice([0x180, 0x3000, 0x110000])
        codes = (generator.randrange(generator.choice([0x180, most])) for _ in range(120))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)[
            : generator.randrange(120)
        ]

    rules = only(
        tmp_path,
        *(
            {"length": {"min_characters": 1, "max_characters": 90}}
            if "length" in entry
            else {"language": {"name": "Swedish", "above": 0}}
            if "language" in entry
            else entry
            for entry in load_rules(RULES).dump()
        ),
    )
    source = write(tmp_path / "in.jsonl", "Ett par ord.", *(odd() for _ in range(3000)))
    report = clean([source], tmp_path / "out", rules, processes=1)
    assert report.documents_in == report.documents_out + sum(report.dropped.values())
    assert report.dropped["unreadable"] > 200
    assert report.dropped["length"] > 20
    assert report.dropped["alphabet"] > 200
    assert report.documents_out > 200
    allowed = next(rule for rule in rules.documents if rule.key == "alphabet")
    assert allowed.apply(kept := texts(tmp_path / "out")).texts == kept


def test_no_documents_at_all(tmp_path):
    empty, wrong = tmp_path / "empty.jsonl", tmp_path / "wrong.jsonl"
    empty.write_bytes(b"")
    wrong.write_bytes(b'{"content": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        clean([empty], tmp_path / "out", only(tmp_path), processes=1)
    with pytest.raises(UserError, match="no such file"):
        clean([tmp_path / "missing.jsonl"], tmp_path / "out", only(tmp_path), processes=1)
    for _ in range(2):
        with pytest.raises(
            UserError, match='none of 3 lines is a document; no "text" among the keys content'
        ):
            clean([wrong], tmp_path / "out", only(tmp_path), processes=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_file_among_others_does_no_harm(tmp_path):
    empty, good = tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", "ett")
    empty.write_bytes(b"")
    assert clean([empty, good], tmp_path / "out", only(tmp_path), processes=1).documents_out == 1


def test_all_documents_may_be_dropped(tmp_path, rules):
    source = write(
        tmp_path / "in.jsonl", "kort", "The weather is nice today, and so are we, my friends. " * 3
    )
    report = clean([source], tmp_path / "out", rules, processes=1)
    assert (report.documents_out, report.dropped["length"], report.dropped["language"]) == (0, 1, 1)
    assert [shard.bytes for shard in report.shards] == [0]


def test_one_at_a_time(tmp_path):
    source = write(tmp_path / "in.jsonl", "ett")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            clean([source], tmp_path / "out", only(tmp_path), processes=1)


def test_a_full_disk_is_told_and_survived(corpus, rules, tmp_path, monkeypatch):
    """The disk takes so many files, then no more."""
    parts, output = corpus
    real, left = os.fsync, 0

    def fsync(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for left in (0, 3, 40, 80):  # noqa: B007
        with pytest.raises(UserError, match="the disk is full"):
            clean(parts, tmp_path, rules, processes=1, unit_bytes=UNIT_BYTES)
        assert not (tmp_path / "manifest.json").exists()
    left = 10**6
    clean(parts, tmp_path, rules, processes=1, unit_bytes=UNIT_BYTES)
    assert files(tmp_path) == files(output)


def command(parts, output):
    """Clean in a process of its own."""
    program = (
        "import sys; from pathlib import Path; from harness.data.clean import clean, load_rules\n"
        "if __name__ == '__main__':\n"
        f"    clean([*map(Path, sys.argv[2:])], Path(sys.argv[1]), load_rules(Path({str(RULES)!r})), processes=2,"
        f" unit_bytes={UNIT_BYTES})\n"
    )
    return [sys.executable, "-c", program, str(output), *map(str, parts)]


def kill_and_resume(parts, output, kills, seed):
    """Start, kill the parent of all its processes after a random time, start again; then let it finish."""
    generator = random.Random(seed)
    killed = 0
    longest_s = 8.0
    while killed < kills:
        started = time.monotonic()
        process = subprocess.Popen(command(parts, output), cwd=ROOT)
        try:
            process.wait(generator.uniform(0.2, longest_s))
            assert process.returncode == 0
            # It was done in less: begin again, and kill earlier.
            longest_s = time.monotonic() - started
            (output / "manifest.json").unlink()
            (output / "state.json").unlink()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run(command(parts, output), cwd=ROOT, check=True)


def test_killed_it_resumes_to_the_same_bytes(corpus, tmp_path):
    kill_and_resume(corpus[0], tmp_path, kills=2, seed=1)
    assert files(tmp_path) == files(corpus[1])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_killed_often_it_resumes_to_the_same_bytes(corpus, tmp_path, seed):
    kill_and_resume(corpus[0], tmp_path, kills=25, seed=seed)
    assert files(tmp_path) == files(corpus[1])


@pytest.mark.full
def test_a_killed_worker_is_told_and_survived(corpus, tmp_path):
    psutil = pytest.importorskip("psutil")
    parts = [corpus[0][1]] * 20
    for number, part in enumerate(parts):
        parts[number] = tmp_path / f"{number}.jsonl"
        parts[number].symlink_to(part)
    process = subprocess.Popen(
        command(parts, tmp_path / "out"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "out").glob("work/*.npz")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = [
        p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())
    ]
    workers[0].kill()
    assert process.wait(60) != 0
    assert "UserError: cleaning into" in (error := process.stderr.read())
    assert "a process was killed" in error
    subprocess.run(command(parts, tmp_path / "out"), cwd=ROOT, check=True)


def test_workers_die_with_their_parent(tmp_path):
    program = (
        "import os, time, sys; from harness.system.workers import map_in_order\n"
        "if __name__ == '__main__':\n"
        "    with map_in_order(time.sleep, [(600,)] * 2, 2) as results:\n"
        "        next(results)\n"
    )
    psutil = pytest.importorskip("psutil")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    for _ in range(600):
        children = psutil.Process(process.pid).children()
        if sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2:
            break
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert len(gone) >= 2


def test_measured_precision_and_recall(tmp_path, rules, monkeypatch):
    pytest.importorskip("wordfreq", reason="needs wordfreq")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from clean_quality import measure

    found = measure(tmp_path, 6_000_000, rules, processes=1)
    precision = {score.rule: score.precision for score in found.rules}
    recall = {score.defect: score.recall for score in found.defects}
    assert set(precision) == {*found.report.dropped} - {"normalise", "one-line"}
    assert min(precision.values()) > 0.85
    assert min(p for rule, p in precision.items() if rule not in ("language", "length")) == 1
    assert min(r for defect, r in recall.items() if defect != "near-duplicate") > 0.9
    assert found.clean_dropped < 0.06 * found.clean_documents
    alike = [score for score in found.near_duplicates if score.least >= 0.85]
    unlike = [score for score in found.near_duplicates if score.most <= 0.7]
    assert sum(score.dropped for score in alike) > 0.9 * sum(score.pairs for score in alike) > 10
    assert sum(score.dropped for score in unlike) < 0.05 * sum(score.pairs for score in unlike)
