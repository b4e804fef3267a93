"""Runs, records and references joined into rows."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.evidence.columns import values
from harness.evidence.records import metrics_of
from harness.evidence.references import load_references
from harness.evidence.results import Results, collect
from harness.evidence.rows import Row, losses
from harness.evidence.tables import render
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.planning.miniature import miniature
from harness.predict.flops import share_of_upstreams
from harness.run import directory, writing
from harness.run.schema import Result, StepMetrics
from harness.run.step_statistics import measure
from harness.system.files import write_json

CATALOG = load_catalog()
REFERENCES = load_references()
H200 = "NVIDIA H200"


def experiment(id_="111", **settings):
    return overrides.apply(CATALOG.find(id_), settings)


def result(status="ok", **changes):
    return {
        "status": status,
        "exit_code": 0,
        "started": 100.0,
        "finished": 200.0,
        "steps": 20,
        "steps_done": 20,
        "window": [6, 20],
        "tflops": 400.0,
        "step_ms": {
            "median": 376.3,
            "q1": 375.0,
            "q3": 377.6,
            "mean": 376.3,
            "stdev": 1.5,
            "min": 370.0,
            "max": 380.0,
            "n": 15,
        },
        "memory_gib": {"allocated": 70.1, "reserved": 74.0, "nvml": 76.3},
        "loss": {"first": 10.9, "last": 9.1},
        "data": "mock",
        "device": "cuda",
        "gpu": H200,
        "gpus": [0],
    } | changes


def write_run(outdir: Path, e, outcome: dict | None, steps: int = 20) -> directory.RunDir:
    run = writing.create(outdir, e.label)
    run.freeze_experiment(e, "cpu" if e.miniature else "cuda", "abc")
    write_json(run.environment, {"gpu": None if e.miniature else H200})
    lines = [
        StepMetrics(step=n, loss=11 - n / 10, step_ms=376.3, tflops=400.0, time=1.0)
        for n in range(1, steps + 1)
    ]
    run.metrics.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    if outcome:
        complete = Result.model_validate({**outcome, **measure(e, lines, None)})
        write_json(run.result, complete.model_dump(mode="json"))
    return run


def write_record(records: Path, e, outcome: dict) -> Path:
    """A record as a run of ``e`` would have left it, its metrics beside it."""
    path = records / "h200-141gb" / f"{e.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        StepMetrics(step=n, loss=9.5, step_ms=376.3, tflops=400.0, time=1.0)
        for n in range(1, e.steps + 1)
    ]
    metrics_of(path).write_text("".join(f"{step.model_dump_json()}\n" for step in steps))
    complete = Result.model_validate({**outcome, "steps": e.steps, **measure(e, steps, None)})
    write_json(path, {**complete.model_dump(mode="json"), "experiment": e.model_dump(mode="json")})
    return path


def gather(tmp_path, against=None) -> Results:
    return collect(tmp_path / "outdir", tmp_path / "records", REFERENCES, against)


def row(id_="111", status="ok", gpu=H200, settings=None, **changes) -> Row:
    e = experiment(id_, **(settings or {}))
    return Row(
        label=e.label,
        experiment=e,
        state=status,
        device="cuda",
        origin=Path("outdir", e.label),
        kind="run",
        gpu_name=gpu,
        result=Result.model_validate(result(status, **changes)),
        published=REFERENCES.published.matching(id_),
        against=REFERENCES.published,
    )


def lora_run(outdir: Path, lines: list[StepMetrics], counted: str):
    """A run of 811 with these metrics, whose result states TFLOP/s as ``counted``."""
    e = experiment("811", STEPS=str(len(lines)))
    run = writing.create(outdir, e.label)
    run.freeze_experiment(e, "cuda", "abc")
    run.metrics.write_text(
        "".join(f"{line.model_dump_json(exclude_none=True)}\n" for line in lines)
    )
    content = Result.model_validate(
        {
            **result(),
            "steps": len(lines),
            **measure(e, lines, 989.5, counted=counted),
            "peak_tflops": 989.5,
        }
    )
    content = content.model_dump(mode="json")
    write_json(
        run.result,
        {key: value for key, value in content.items() if key != "counted" or value == "model"},
    )
    return run, e


def step(n: int, **rates: float) -> StepMetrics:
    return StepMetrics(step=n, loss=9.5, step_ms=2500.0, time=1.0, **rates)


def test_older_runs_with_frozen_weights_are_read_with_the_count_of_what_they_computed(tmp_path):
    """Upstream counted 667 TFLOP/s, as if all weights were trained; what the run wrote stays."""
    run, e = lora_run(
        tmp_path / "outdir", [step(n, tflops=667.0) for n in range(1, 21)], "upstream"
    )
    stated = json.loads(run.result.read_text())
    assert (stated["tflops"], stated["mfu"]) == (
        667.0,
        pytest.approx(0.674, abs=1e-3),
    ) and "counted" not in stated
    (found,) = gather(tmp_path).rows
    assert found.tflops == pytest.approx(667 * share_of_upstreams(e)) and 440 < found.tflops < 470
    assert found.mfu == pytest.approx(found.tflops / 989.5)
    assert {"tflops": found.tflops, "mfu": found.mfu}.items() <= values(found).items()
    assert f"{found.mfu:.1%}" in render([found]) and "67.4%" not in render([found])
    assert json.loads(run.result.read_text()) == stated


def test_newer_runs_with_frozen_weights_state_that_count_themselves(tmp_path):
    e = experiment("811")
    share = share_of_upstreams(e)
    lines = [step(n, tflops=667.0 * share, upstream_tflops=667.0) for n in range(1, 21)]
    lora_run(tmp_path / "outdir", lines, "model")
    (found,) = gather(tmp_path).rows
    assert found.result.counted == "model" and found.tflops == found.result.tflops == pytest.approx(
        667 * share
    )
    resumed = [step(n, tflops=667.0) for n in range(1, 11)] + lines[
        10:
    ]  # by a newer harness, from step 11 on
    assert measure(e, resumed, 989.5)["tflops"] == pytest.approx(667 * share)
    assert measure(e, resumed, 989.5, counted="upstream")["tflops"] == 667.0


def test_nothing_gives_no_rows(tmp_path):
    assert gather(tmp_path) == Results((), ())


def test_a_run_stands_beside_its_published_row(tmp_path):
    write_run(tmp_path / "outdir", experiment(), result())
    (only,) = gather(tmp_path).rows
    assert (only.id, only.kind, only.state, only.hardware) == ("111", "run", "ok", H200)
    assert (only.reference.step_ms, only.reference.memory_gib) == (393, 76.7)
    assert only.step_ratio == pytest.approx(376.3 / 393)
    assert only.memory_ratio == pytest.approx(76.3 / 76.7)
    assert only.mfu == pytest.approx(400 / 989.5)
    assert only.as_published is True


def test_another_group_of_references_can_stand_beside_it(tmp_path):
    write_run(tmp_path / "outdir", experiment(), result())
    assert gather(tmp_path, "h200-4gpu").rows[0].reference.step_ms == 376.3
    with pytest.raises(UserError, match="no references called h200; did you mean h200"):
        gather(tmp_path, "h200")


def test_a_record_reads_like_a_run_and_shows_once(tmp_path):
    write_record(tmp_path / "records", experiment(), result())
    (record,) = gather(tmp_path).rows
    assert (record.kind, record.label) == ("record", "h200-141gb/111")
    assert record.step_ratio == pytest.approx(376.3 / 393)
    write_run(tmp_path / "outdir", experiment(), result())
    assert [row.kind for row in gather(tmp_path).rows] == ["run"]
    write_run(tmp_path / "outdir", experiment(), result(started=300.0))
    assert [row.label.rpartition("-")[2] for row in gather(tmp_path).rows] == ["80GB", "80GB.2"]


def test_losses_come_from_the_metrics_of_run_and_record(tmp_path):
    write_run(tmp_path / "outdir", experiment(), result(), steps=3)
    assert losses(gather(tmp_path).rows[0]) == {1: 10.9, 2: 10.8, 3: 10.7}
    record = write_record(tmp_path / "records", experiment("101"), result())
    found = gather(tmp_path).find("h200-141gb/101")
    assert losses(found) == dict.fromkeys(range(1, 101), 9.5)
    record.with_name("101.metrics.jsonl").unlink()
    assert losses(found) == {}


def test_what_is_corrupt_is_left_out_with_a_warning(tmp_path):
    good = write_run(tmp_path / "outdir", experiment(), result())
    for name, text in [("half", "{"), ("other", '{"status": "fine"}'), ("empty", "")]:
        bad = write_run(tmp_path / "outdir", experiment("101"), None)
        bad.path.rename(bad.path.with_name(name))
        bad.path.with_name(name).joinpath("result.json").write_text(text)
    record = write_record(tmp_path / "records", experiment("101"), result())
    record.write_text("[]")
    record.with_name("102.json").write_text('{"status": "ok"}')
    record.with_name("104.json").write_text('{"experiment": {"id": "104"}}')
    results = gather(tmp_path)
    assert [row.label for row in results.rows] == [good.label]
    assert len(results.warnings) == 6
    assert all("skipped" in warning for warning in results.warnings)
    assert any("102.json: no 'experiment'" in warning for warning in results.warnings)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:12], "it says 20 steps, its metrics end at step 12: truncated"),
        (lambda lines: [], "it says 20 steps, its metrics end at step 0: truncated"),
        (
            lambda lines: [*lines[:-1], lines[-1][:-30]],
            "it says 20 steps, its metrics end at step 19: truncated",
        ),
        (
            lambda lines: [line.replace("376.3", "370.0") for line in lines],
            "step_ms.median is stated as 376.3, its metrics give 370.0",
        ),
        (lambda lines: lines[7:], "window is stated as [6, 20], its metrics give [8, 20]"),
    ],
)
def test_a_run_that_contradicts_its_metrics_is_left_out_with_a_warning(tmp_path, edit, message):
    good = write_run(tmp_path / "outdir", experiment("101", STEPS="20"), result())
    bad = write_run(tmp_path / "outdir", experiment("111", STEPS="20"), result())
    assert not gather(tmp_path).warnings
    bad.metrics.write_text("\n".join(edit(bad.metrics.read_text().splitlines())) + "\n")
    results = gather(tmp_path)
    assert [row.label for row in results.rows] == [good.label]
    assert results.warnings == (f"{bad.path}: skipped: result.json: {message}",)


@pytest.mark.parametrize("status", ["nan", "killed"])
def test_a_run_without_steps_or_with_a_loss_that_is_no_number_is_kept(tmp_path, status):
    run = write_run(tmp_path / "outdir", experiment(STEPS="20"), None)
    lines = (
        [] if status == "killed" else [StepMetrics(step=1, loss=math.nan, step_ms=1.0, time=1.0)]
    )
    run.metrics.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    outcome = Result.model_validate(result(status) | measure(experiment(STEPS="20"), lines, None))
    write_json(run.result, outcome.model_dump(mode="json"))
    results = gather(tmp_path)
    assert not results.warnings and [row.state for row in results.rows] == [status]


def test_a_run_without_a_result_says_how_far_it_came(tmp_path):
    write_run(tmp_path / "outdir", experiment(), None, steps=7)
    (killed,) = gather(tmp_path).rows
    assert (killed.state, killed.steps_done, killed.hardware) == ("killed", 7, H200)
    assert killed.as_published is None and killed.step_ratio is None


def test_an_unfinished_run_already_knows_its_upstream(tmp_path):
    run = write_run(tmp_path / "outdir", experiment(), None, steps=7)
    assert gather(tmp_path).rows[0].software == "Megatron-LM of unknown version"
    write_json(
        run.environment, {"gpu": H200, "upstream": {"version": "0.19.1", "commit": "5be96267"}}
    )
    assert gather(tmp_path).rows[0].software == "Megatron-LM core 0.19.1"


def test_a_miniature_is_on_its_own_and_compared_with_nothing(tmp_path):
    e = miniature(experiment())
    write_run(tmp_path / "outdir", e, result(device="cpu", gpu=None, miniature=True, tflops=None))
    (small,) = gather(tmp_path).rows
    assert small.hardware == "CPU miniature"
    assert (small.published, small.peak_tflops, small.mfu, small.as_published) == (
        None,
        None,
        None,
        None,
    )


@pytest.mark.parametrize("settings", [{"MBS": "5"}, {"ARGS": "--lr 1e-4"}, {"RECOMPUTE": "full"}])
def test_changed_work_is_compared_with_nothing(tmp_path, settings):
    write_run(tmp_path / "outdir", experiment(**settings), result())
    assert gather(tmp_path).rows[0].published is None


@pytest.mark.parametrize("settings", [{"STEPS": "20"}, {"CARD": "h100-80gb"}])
def test_the_same_work_over_other_steps_is_still_compared(tmp_path, settings):
    write_run(tmp_path / "outdir", experiment(**settings), result())
    assert gather(tmp_path).rows[0].reference.id == "111"


@pytest.mark.parametrize(
    ("id_", "status", "gpu", "settings", "expected"),
    [
        ("111", "ok", H200, {}, True),
        ("111", "oom", H200, {}, False),
        ("111", "oom", "NVIDIA A100-SXM4-40GB", {}, None),  # a smaller card may run out
        ("111", "oom", "NVIDIA H100 80GB HBM3", {}, False),
        ("111", "oom", "NVIDIA X1", {}, False),
        ("111", "crash", H200, {}, False),
        ("111", "nan", H200, {}, False),
        ("111", "killed", H200, {}, None),
        ("121", "oom", H200, {"CARD": "h100-80gb"}, True),
        ("121", "oom", "NVIDIA H100 80GB HBM3", {}, True),
        ("121", "ok", H200, {}, None),  # a larger card may hold it
        ("121", "ok", H200, {"CARD": "h100-80gb"}, False),
        ("121", "crash", H200, {}, False),
        ("443", "ok", H200, {}, True),
        ("115", "ok", H200, {}, None),  # what was published is in doubt
        ("458", "ok", H200, {}, None),  # nothing was published that ran the same
        ("219", "ok", H200, {}, None),
    ],
)
def test_as_published(id_, status, gpu, settings, expected):
    assert row(id_, status, gpu, settings).as_published is expected


def test_doubtful_and_failed_rows_have_no_ratio():
    assert row("115").reference.step_ms == 415
    assert row("115").step_ratio is None
    assert row("111", "crash").step_ratio is None
    assert row("121").memory_ratio is None


def test_a_gpu_of_unknown_model_has_no_mfu():
    assert row(gpu="NVIDIA X1").mfu is None
    assert row(gpu="Tesla V100-SXM2-32GB").mfu is None  # no bf16
    assert replace(row(), gpu_name=None).hardware == "GPU of unknown model"


def test_rows_are_chosen_by_chapter_id_and_hardware():
    results = Results((row("101"), row("111"), row("408"), row("408", gpu="NVIDIA L40S")))
    assert [r.id for r in results.select(chapter=100).rows] == ["101", "111"]
    assert [r.id for r in results.select(ids=["111", "408"], hardware="h200-141gb").rows] == [
        "111",
        "408",
    ]
    assert [r.gpu_name for r in results.select(400, hardware="l40s").rows] == ["NVIDIA L40S"]
    assert Results(()).select(chapter=700) == Results(())
    with pytest.raises(
        UserError, match=r"no run of chapter 700\nthere are runs of chapter 100, 400"
    ):
        results.select(chapter=700)


def test_find_means_the_best_run_of_an_experiment():
    plain, later = (
        row(),
        replace(row(started=300.0), label="111-later", origin=Path("outdir/111-later")),
    )
    failed, other = row(status="crash", started=900.0), row(settings={"MBS": "5"}, started=900.0)
    results = Results((plain, later, replace(failed, label="111-failed"), other))
    assert results.find("111") is later
    capped = row(settings={"CARD": "h100-80gb"}, started=900.0)
    assert Results((capped, later)).find("111") is later, (
        "a record on the whole card goes before one with less memory"
    )
    assert results.find("111-gpt2xl-dp1-fit-80GB") is plain
    assert results.find("111-gpt2xl-dp1-fit-80GB_mbs5") is other
    assert results.find("111-failed").state == "crash"
    with pytest.raises(
        UserError, match=r"no run or record is called 111-faild; did you mean 111-failed"
    ):
        results.find("111-faild")
    with pytest.raises(UserError, match=r"no runs yet: make 101"):
        Results(()).find("111")


def test_a_record_is_read_once(tmp_path, monkeypatch):
    """It was read a second time for its launch rate."""
    path = write_record(tmp_path / "records", experiment(), result())
    content = json.loads(path.read_text())
    launch = {"add_us": 7.1, "operation_us": 4.5}
    write_json(path, content | {"environment": {"launch": launch}})
    opened = []
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: opened.append(self) or read_text(self, **how)
    )
    (found,) = gather(tmp_path).rows
    assert opened.count(path) == 1 and found.launch.operation_us == 4.5
