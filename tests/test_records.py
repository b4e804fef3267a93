"""Records are what runs measured: every number of one can be computed again from the metrics beside it."""

import json
import statistics
from pathlib import Path

import pytest

from harness import ROOT
from harness.catalog import load_catalog
from harness.errors import UserError
from harness.measured import spread
from harness.records import record
from harness.results import collect, load_references
from harness.rundir import Result, RunDir, StepMetrics, write_json

RECORDS = ROOT / "experiments" / "records"
FILES = sorted(RECORDS.glob("*/*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_record_equals_its_metrics(path: Path) -> None:
    content = json.loads(path.read_text())
    result = Result.model_validate(content)
    lines = path.with_suffix(".metrics.jsonl").read_text().splitlines()
    metrics = [StepMetrics.model_validate_json(line) for line in lines]
    assert [m.step for m in metrics] == list(range(1, result.steps_done + 1))
    losses = [m.loss for m in metrics] or [None]
    assert (result.loss.first, result.loss.last) == (losses[0], losses[-1])
    window = [m for m in metrics if m.step >= content["experiment"]["window_first_step"]]
    assert result.step_ms == spread([m.step_ms for m in window])
    if window:
        assert result.window == (window[0].step, window[-1].step)
        assert result.tflops == statistics.median(m.tflops for m in window)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_record_says_where_it_comes_from(path: Path) -> None:
    content = json.loads(path.read_text())
    assert path.stem.split("_")[0] == content["experiment"]["id"]
    assert not content["miniature"] and content["gpu"]
    assert content["environment"]["commit"] and content["environment"]["dirty"] is False
    assert content["upstream"]["commit"] or content["upstream"]["version"]


def test_no_metrics_without_their_record() -> None:
    assert {p.name.removesuffix(".metrics.jsonl") for p in RECORDS.glob("*/*.jsonl")} == {p.stem for p in FILES}


def test_all_records_are_read_and_stand_beside_what_was_published() -> None:
    found = collect(ROOT / "none", RECORDS, load_references())
    assert not found.warnings
    assert len(found.rows) == len(FILES)
    assert all(row.as_published is not False for row in found.rows)


def test_only_finished_gpu_runs_become_records(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "outdir" / "101-gpt2xl-dp1-gbs1-bf16")
    run.ranks.mkdir(parents=True)
    experiment = load_catalog().find("101")
    run.freeze_experiment(experiment, "cuda", "abc")
    with pytest.raises(UserError, match="ended as killed"):
        record(run, tmp_path)
    content = json.loads((RECORDS / "h200-141gb" / "101.json").read_text())
    write_json(run.environment, content["environment"])
    write_json(run.result, content | {"gpu": None})
    with pytest.raises(UserError, match="ran on a CPU"):
        record(run, tmp_path)
    write_json(run.result, content)
    run.metrics.write_text((RECORDS / "h200-141gb" / "101.metrics.jsonl").read_text())
    kept = record(run, tmp_path / "records")
    assert kept == tmp_path / "records" / "h200-141gb" / "101.json"
    assert json.loads(kept.read_text())["step_ms"] == content["step_ms"]
    with pytest.raises(UserError, match="no run nothing"):
        record(RunDir(tmp_path / "nothing"), tmp_path)
