"""Records are what runs measured: every number of one can be computed again from the metrics beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness import ROOT
from harness.errors import UserError
from harness.evidence.records import folder_of, metrics_of, read, record, same_work
from harness.evidence.references import REFERENCES, load_references
from harness.evidence.results import collect_records
from harness.evidence.tables import render
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.hardware import find_card, peak_tflops
from harness.predict.flops import share_of_upstreams, tflops_per_gpu
from harness.run.directory import RunDir
from harness.run.schema import Result, StepMetrics
from harness.run.step_statistics import BETWEEN_RUNS, measure, step_noise_ms
from harness.system.files import write_json

RECORDS = ROOT / "experiments" / "records"
FILES = sorted(RECORDS.glob("*/*.json"))
CATALOG = load_catalog()
KEPT = RECORDS / "h200-141gb"
every_record = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}"
)


@every_record
def test_a_record_states_what_its_metrics_say(path: Path) -> None:
    """All that follows from the metrics: steps, window, spread of the step time, TFLOP/s, tokens/s, MFU, loss."""
    experiment, result, _ = read(path)
    lines = metrics_of(path).read_text().splitlines()
    steps = [StepMetrics.model_validate_json(line) for line in lines]
    assert [m.step for m in steps] == list(range(1, result.steps_done + 1))
    computed = measure(experiment, steps, result.peak_tflops, counted=result.counted)
    assert len(computed) == 10
    for name, value in computed.items():
        assert getattr(result, name) == value, name
    assert result.peak_tflops == peak_tflops(result.gpu, experiment.precision)
    assert result.status == "oom" or result.step_ms.n >= 2


@every_record
def test_the_metrics_of_a_record_are_of_one_piece(path: Path) -> None:
    """Step time, TFLOP/s and tokens/s of a step are three views of one clock; in other units they do not fit together."""
    experiment, result, _ = read(path)
    if result.counted:
        pytest.skip("conversations differ in length: a step's work is what it counted")
    for line in metrics_of(path).read_text().splitlines():
        m = StepMetrics.model_validate_json(line)
        share = share_of_upstreams(experiment) if m.upstream_tflops is None else 1
        assert m.tflops * share == pytest.approx(tflops_per_gpu(experiment, m.step_ms), rel=1e-3)
        assert m.tokens_per_s == pytest.approx(
            experiment.global_batch_size * experiment.seq_length / (m.step_ms / 1000), rel=1e-3
        )


@every_record
def test_memory_is_nested_and_fits_the_card(path: Path) -> None:
    result = read(path).result
    memory = result.memory_gib
    held = [gib for gib in (memory.allocated, memory.reserved, memory.nvml) if gib is not None]
    assert held == sorted(held) or result.status == "oom", (
        "a run that fails at once may end between two readings of NVML"
    )
    assert (
        held[0] > 0
        and memory.nvml is not None
        and memory.nvml * 1024 < find_card(result.gpu).memory_mib
    )


@every_record
def test_a_record_says_where_it_comes_from(path: Path) -> None:
    content = json.loads(path.read_text())
    assert path.parent.name == folder_of(content["gpu"]) == folder_of(content["environment"]["gpu"])
    assert not content["miniature"]
    assert content["environment"]["commit"] and content["environment"]["dirty"] in (True, False)
    assert content["upstream"]["commit"] or content["upstream"]["version"]
    assert content["upstream"] == content["environment"]["upstream"]


@every_record
def test_a_record_is_of_the_catalogues_experiment(path: Path) -> None:
    """A row of the catalogue whose sizes change needs another record."""
    experiment = read(path).experiment
    assert path.stem.split("_")[0].split(".")[0] == experiment.id
    changed = {"card": experiment.card, "extra_args": experiment.extra_args}
    unchanged = {"STEPS", "DATA", "CARD", "ARGS"}.issuperset(experiment.overrides)
    assert not unchanged or same_work(
        with_changes(CATALOG.find(experiment.id), **changed), experiment
    )


def test_no_metrics_without_their_record() -> None:
    lines = [path.name for path in RECORDS.glob("*/*.jsonl")]
    assert {
        name.removesuffix(".metrics.jsonl")
        for name in lines
        if not name.endswith(".validation.jsonl")
    } == {p.stem for p in FILES}
    assert {
        name.removesuffix(".validation.jsonl")
        for name in lines
        if name.endswith(".validation.jsonl")
    } <= {p.stem for p in FILES}


def test_all_records_are_read_and_stand_beside_what_was_published() -> None:
    found = collect_records(RECORDS, load_references())
    assert not found.warnings
    assert len(found.rows) == len(FILES)
    assert all(row.as_published is not False for row in found.rows)


def test_every_reference_names_its_source_and_is_possible() -> None:
    """A step time in seconds, or of another experiment, would need a GPU faster than its peak."""
    for group in load_references().groups:
        assert group.source and group.hardware and group.method
        for row in group.rows:
            assert row.source == group.source
            if row.step_ms and row.stands_for:
                tflops = tflops_per_gpu(CATALOG.find(row.stands_for), row.step_ms)
                assert 0.02 < tflops / peak_tflops(group.gpu, "bf16") < 0.6, row.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda group: group["rows"][0].update(memory_gib=32500.0),
            "101: 32500 GiB of 79.6 on this GPU",
        ),
        (
            lambda group: group["rows"][0].update(step_ms=0.22),
            "0.22 ms: memory_gib is in GiB (MiB / 1024), step_ms in milli",
        ),
        (lambda group: group["rows"][0].update(memory_gib=-1.0), "-1 GiB of"),
        (lambda group: group.update(source=""), "source = ''"),
        (lambda group: group.pop("source"), "source = None"),
        (lambda group: group.pop("method"), "method"),
    ],
)
def test_a_reference_in_other_units_or_without_its_source_is_refused(
    tmp_path: Path, change: Callable, message: str
) -> None:
    content = yaml.safe_load(REFERENCES.read_text())
    change(content["h100-tutorial"])
    path = tmp_path / "references.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        load_references(path)
    assert message in str(caught.value)


def copy(tmp_path: Path, name: str = "111", folder: str = "h200-141gb", **changes: object) -> Path:
    """A committed record in a folder of its own, some of its statements changed."""
    path = tmp_path / "records" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics_of(path).write_text(metrics_of(KEPT / path.name).read_text())
    write_json(path, json.loads((KEPT / path.name).read_text()) | changes)
    return path


def warning(path: Path) -> str:
    """Why ``path`` enters no table."""
    found = collect_records(path.parents[1], load_references())
    assert not found.rows
    return found.warnings[0]


STEP_MS = {
    "median": 370.0,
    "mean": 400.3,
    "q1": 375.1,
    "q3": 377.5,
    "stdev": 92.8,
    "min": 372.9,
    "max": 735.6,
    "n": 15,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_ms": STEP_MS}, "step_ms.median is stated as 370.0, its metrics give 3"),
        ({"tflops": 500.0}, "tflops is stated as 500.0, its metrics give 4"),
        ({"mfu": 0.5}, "mfu is stated as 0.5, its metrics give 0.4"),
        ({"loss": {"first": 10.8, "last": 1.0}}, "loss.last is stated as 1.0, its metrics give 9."),
        ({"window": [1, 20]}, "window is stated as [1, 20], its metrics give [6, 20]"),
        ({"steps_done": 21}, "it says 21 steps, its metrics hold 20: truncated"),
        ({"memory_gib": {"allocated": 68.4, "reserved": 73.9, "nvml": None}}, "no NVML reading"),
        (
            {"memory_gib": {"allocated": 70041.6, "reserved": 75673.6, "nvml": 78745.6}},
            "78,745.6 GiB used of a card of 140",
        ),
        (
            {"gpu": "NVIDIA H100 80GB HBM3"},
            "measured on NVIDIA H100 80GB HBM3, but in the folder of h200-141gb",
        ),
        ({"miniature": True}, "a miniature or a CPU run is no record"),
        ({"gpu": None, "device": "cpu"}, "a miniature or a CPU run is no record"),
        ({"experiment": None}, "no 'experiment'"),
        ({"status": "fine"}, "111.json: status: Input should be 'ok', 'oom'"),
    ],
)
def test_a_record_that_contradicts_its_metrics_enters_no_table(
    tmp_path: Path, changes: dict, message: str
) -> None:
    assert message in warning(copy(tmp_path, **changes))


def test_metrics_that_are_missing_truncated_or_torn_are_told(tmp_path: Path) -> None:
    path = copy(tmp_path)
    assert read(path).result.step_ms.n == 15
    lines = metrics_of(path).read_text().splitlines(keepends=True)
    metrics_of(path).write_text("".join(lines[:-1]))
    assert "it says 20 steps, its metrics hold 19: truncated" in warning(path)
    metrics_of(path).write_text("".join(lines)[:-40])
    assert "line 20 is torn" in warning(path)
    slower = [json.dumps(json.loads(line) | {"step_ms": 900.0}) + "\n" for line in lines]
    metrics_of(path).write_text("".join(slower))
    assert "step_ms.median is stated as 3" in warning(path)
    metrics_of(path).unlink()
    assert "111.metrics.jsonl is missing" in warning(path)


def test_other_hardware_and_other_upstream_have_tables_of_their_own(tmp_path: Path) -> None:
    copy(tmp_path)
    other = json.loads((KEPT / "112.json").read_text())["upstream"] | {
        "version": "0.14.0",
        "commit": "f" * 40,
    }
    copy(tmp_path, "112", upstream=other)
    copy(tmp_path, "114", folder="h100-80gb", gpu="NVIDIA H100 80GB HBM3")
    text = render(collect_records(tmp_path / "records", load_references()).rows, "markdown")
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "### NVIDIA H100 80GB HBM3",
        "### NVIDIA H200, Megatron-LM core 0.14.0",
        "### NVIDIA H200, Megatron-LM core 0.19.1",
    ]
    parts = text.split("###")[1:]
    assert ["| 11" + id_ in part for part, id_ in zip(parts, "421", strict=True)] == [True] * 3
    assert all(part.count("| 11") == 1 for part in parts)


def run_of(tmp_path: Path, label: str = "101-gpt2xl-dp1-gbs1-bf16", **changes: object) -> RunDir:
    """A run directory that holds what 101's record was made of."""
    content = json.loads((KEPT / "101.json").read_text()) | changes
    run = RunDir(tmp_path / "outdir" / label)
    run.ranks.mkdir(parents=True)
    write_json(run.experiment_json, {**content["experiment"], "device": content["device"]})
    write_json(run.environment, content["environment"])
    write_json(run.result, {key: content[key] for key in Result.model_fields if key in content})
    run.metrics.write_text((KEPT / "101.metrics.jsonl").read_text())
    write_json(
        run.ranks / "0.json",
        {
            "rank": 0,
            "local_rank": 0,
            "pid": 1,
            "host": "vm",
            "allocated_peak_gib": 29.4,
            "gc_ms": {"1": 310.0},
        },
    )
    return run


def test_a_run_becomes_the_same_record_again(tmp_path: Path) -> None:
    kept = record(run_of(tmp_path), tmp_path / "records")
    assert kept == tmp_path / "records" / "h200-141gb" / "101.json"
    assert read(kept) == read(KEPT / "101.json")
    (rank,) = json.loads(kept.read_text())["ranks"]
    assert (rank["rank"], rank["allocated_peak_gib"], rank["gc_ms"]) == (
        0,
        29.4,
        {"1": 310.0},
    ) and "pid" not in rank
    assert record(run_of(tmp_path, "again"), tmp_path / "records") == kept


def test_the_record_of_another_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    kept = record(run_of(tmp_path), tmp_path / "records")
    before = {path.name: path.read_bytes() for path in kept.parent.iterdir()}
    other = run_of(
        tmp_path, "later", started=json.loads((KEPT / "101.json").read_text())["started"] + 3600
    )
    with pytest.raises(
        UserError,
        match=r"101.json is the record of another run, 101-gpt2xl-dp1-gbs1-bf16\nFORCE=1 replaces it",
    ):
        record(other, tmp_path / "records")
    assert {path.name: path.read_bytes() for path in kept.parent.iterdir()} == before
    assert record(other, tmp_path / "records", force=True) == kept
    assert json.loads(kept.read_text())["label"] == "later"


def test_records_that_differ_in_arguments_do_not_replace_each_other(tmp_path: Path) -> None:
    experiment = json.loads((KEPT / "101.json").read_text())["experiment"]
    names = []
    for number, args in enumerate(["--lr 1e-4", "--lr 2e-4", "--lr 1e-4"]):
        changed = experiment | {"overrides": {"ARGS": args}, "extra_args": args.split()}
        names.append(record(run_of(tmp_path, str(number), experiment=changed), tmp_path).name)
    assert names == ["101_args.json", "101_args.2.json", "101_args.json"]
    assert len(collect_records(tmp_path, load_references()).rows) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "crash"}, "ended as crash"),
        ({"gpu": None}, "ran on a CPU"),
        ({"memory_gib": {"allocated": 29.4}}, "no NVML reading"),
        ({"steps_done": 30}, "truncated"),
        ({"tflops": 500.0}, "tflops is stated as 500.0"),
    ],
)
def test_only_finished_gpu_runs_whose_parts_agree_become_records(
    tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        record(run_of(tmp_path, **changes), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_an_unfinished_run_or_none_is_no_record(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    environment = run.environment.read_text()
    run.environment.unlink()
    with pytest.raises(UserError, match="No such file"):
        record(run, tmp_path)
    run.environment.write_text(environment)
    run.result.unlink()
    with pytest.raises(UserError, match="ended as killed"):
        record(run, tmp_path)
    with pytest.raises(UserError, match="no run nothing"):
        record(RunDir(tmp_path / "nothing"), tmp_path)


def test_the_noise_of_a_median_follows_the_steps_and_not_one_slow_step() -> None:
    calm = [100.0, 101, 99, 102, 98, 100, 101, 99, 100, 101, 99, 100, 102, 98, 100]
    hiccup = [*calm[:-1], 400.0]
    assert step_noise_ms(calm) == pytest.approx(step_noise_ms(hiccup), rel=0.01)
    assert step_noise_ms([100.0] * 15) == pytest.approx(100 * BETWEEN_RUNS)
    wide = [100 + 10 * (step - 100) for step in calm]
    assert step_noise_ms(wide) == pytest.approx(
        (0.5**2 + (1.2533 * 14.826 / 15**0.5) ** 2) ** 0.5, rel=1e-3
    )
