"""Does a second run agree with its record: what agrees, what does not, and what cannot be compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT
from harness.cli import main
from harness.errors import UserError
from harness.evidence import columns, tables
from harness.evidence.compare import render_compare
from harness.evidence.records import read
from harness.evidence.references import load_references
from harness.evidence.results import collect, collect_records, collect_runs
from harness.evidence.rows import Row
from harness.launching import launch
from harness.launching.verify import choose, compare, render, verify
from harness.machine import gpus
from harness.machine.gpus import LocalGpu
from harness.run.directory import RunDir
from harness.run.schema import MemoryGib, StepMetrics, Upstream
from harness.run.step_statistics import measure
from harness.system.files import write_json

RECORDS = ROOT / "experiments" / "records"
KEPT = RECORDS / "h200-141gb"


def second_run(
    outdir: Path,
    label: str = "again",
    stem: str = "101",
    slower: float = 1.0,
    nvml: float = 1.0,
    steps: int | None = None,
    hiccup: float = 1.0,
    **changes: object,
) -> RunDir:
    """A run directory as another run of a record's work would have left it: ``slower`` and larger by these factors."""
    path = KEPT / f"{stem}.json"
    experiment, result, _ = read(path)
    content = json.loads(path.read_text())
    lines = path.with_suffix(".metrics.jsonl").read_text().splitlines()[:steps]
    metrics = [
        m.model_copy(update={"step_ms": m.step_ms * slower})
        for m in map(StepMetrics.model_validate_json, lines)
    ]
    metrics[-1:] = [m.model_copy(update={"step_ms": m.step_ms * hiccup}) for m in metrics[-1:]]
    again = result.model_copy(update=measure(experiment, metrics, result.peak_tflops)).model_dump(
        mode="json"
    )
    again["memory_gib"]["nvml"] = again["memory_gib"]["nvml"] * nvml if nvml else None
    run = RunDir(outdir / label)
    run.ranks.mkdir(parents=True)
    frozen = changes.pop("experiment", {})
    write_json(run.experiment_json, {**content["experiment"], **frozen, "device": again["device"]})
    write_json(run.environment, content["environment"])
    run.metrics.write_text("".join(f"{m.model_dump_json()}\n" for m in metrics))
    write_json(run.result, {**again, **changes})
    return run


def verified(tmp_path: Path, id_: str = "101", **settings: str) -> int:
    return verify(
        id_,
        {"RUN": "again", **settings},
        tmp_path,
        RECORDS,
        prepare=lambda: pytest.fail("nothing may run"),
    )


@pytest.mark.parametrize("wanted", ["101", "101-gpt2xl-dp1-gbs1-bf16"])
def test_an_id_stands_for_its_newest_run(
    tmp_path: Path, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started = read(KEPT / "101.json").result.started
    second_run(tmp_path, label="old", slower=3.0, started=started - 60)
    second_run(tmp_path, label="newest")
    second_run(tmp_path, stem="104", label="other", started=started + 60)
    assert verified(tmp_path, RUN=wanted) == 0
    assert capsys.readouterr().out.startswith("newest against h200-141gb/101")


def test_the_same_again_agrees_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_run(tmp_path)
    assert verified(tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].startswith("again against h200-141gb/101 of 2026-")
        and "NVIDIA H200, Megatron-LM core 0.19.1" in said[0]
    )
    median = f"{read(KEPT / '101.json').result.step_ms.median:,.1f}"
    assert (
        said[2].startswith("step time, ms")
        and said[2].split().count(median) == 2
        and said[2].endswith("agrees")
    )
    assert said[2].split()[-3] == "0.0"
    assert said[-1] == "101 agrees with its record"


@pytest.mark.parametrize(
    ("slower", "nvml", "agrees"),
    [
        (1.01, 1.0, True),
        (0.99, 1.0, True),
        (1.1, 1.0, False),
        (0.9, 1.0, False),
        (1.0, 1.009, True),
        (1.0, 1.011, False),
    ],
)
def test_it_agrees_within_the_noise_of_both_and_one_percent_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], slower: float, nvml: float, agrees: bool
) -> None:
    second_run(tmp_path, slower=slower, nvml=nvml)
    assert verified(tmp_path) == (0 if agrees else 1)
    said = capsys.readouterr().out
    assert ("DIFFERS" in said) != agrees
    assert (
        "101 agrees with its record" if agrees else "101 does not agree with its record"
    ) in said


def test_one_slow_step_does_not_widen_what_is_allowed(tmp_path: Path) -> None:
    """A step of twice the time, as 111 has one, makes the standard deviation a quarter of the median."""
    second_run(tmp_path)
    second_run(tmp_path, "hiccup", hiccup=2.0)
    rows = {row.label: row for row in collect_runs(tmp_path, load_references()).rows}
    assert rows["hiccup"].step.stdev > 0.2 * rows["hiccup"].step.median
    calm, hiccup = (
        float(compare(rows["again"], rows[label])[0].allowed) for label in ("again", "hiccup")
    )
    assert hiccup == pytest.approx(calm, rel=0.1)


def test_what_is_compared_is_what_the_metrics_say(tmp_path: Path) -> None:
    run = second_run(tmp_path)
    lines = [StepMetrics.model_validate_json(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text(
        "".join(
            f"{m.model_copy(update={'step_ms': m.step_ms / 1000}).model_dump_json()}\n"
            for m in lines
        )
    )
    with pytest.raises(
        UserError,
        match=r"again: skipped: result.json: step_ms.median is stated as \d+.* give 0\.\d+\nrun it again",
    ):
        verified(tmp_path)
    run.metrics.write_text("".join(f"{m.model_dump_json()}\n" for m in lines[:12]))
    with pytest.raises(UserError, match="it says 20 steps, its metrics end at step 12: truncated"):
        verified(tmp_path)


def test_out_of_memory_again_agrees_and_ok_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_run(tmp_path, stem="121_cardh100-80gb")
    assert verified(tmp_path, "121", CARD="h100-80gb") == 0
    second_run(tmp_path / "other", stem="121_cardh100-80gb", status="ok")
    assert verified(tmp_path / "other", "121", CARD="h100-80gb") == 1
    second_run(tmp_path / "third", status="crash")
    assert verified(tmp_path / "third") == 1
    assert "crash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gpu": "NVIDIA H100 80GB HBM3"},
            "101 is recorded on NVIDIA H200; NVIDIA H100 80GB HBM3 cannot verify that",
        ),
        (
            {"upstream": {"version": "0.14.0", "source": "submodule"}},
            "ran Megatron-LM core 0.14.0, the record Megatron-LM core 0.19.1",
        ),
        ({"packed_with": ["102"]}, "runs on the node: 2, but 1 in the record"),
        (
            {"experiment": {"attention_backend": "flash"}},
            "attention: flash, but auto in the record",
        ),
        (
            {"experiment": {"micro_batch_size": 2, "global_batch_size": 2}},
            "not of the work of h200-141gb/101",
        ),
        (
            {"experiment": {"miniature": True}},
            "again is a CPU miniature; h200-141gb/101 was measured on NVIDIA H200",
        ),
        ({"steps": 5}, "has no step in its averaging window"),
        ({"nvml": 0.0}, "has no NVML reading"),
        ({"status": "killed"}, "again is killed"),
    ],
)
def test_what_cannot_be_compared_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    second_run(tmp_path, **changes)
    assert main(["verify", "101", "RUN=again", f"OUTDIR={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which experiment?"),
        (["407"], "no experiment 407"),
        (["219"], "219-weak-scale-tp8-gpt2-8.3B-2nodes has no record\nmake 219 runs it"),
        (["111", "MBS=5"], "111-gpt2xl-dp1-fit-80GB_mbs5 has no record"),
        (["101", "RUN=nothing"], "RUN=nothing: no such run"),
        (["101", "RNU=nothing"], "unknown setting RNU"),
    ],
)
def test_mistakes_are_told(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def on(name: str | None) -> Callable[[], tuple[LocalGpu, ...]]:
    return lambda: (LocalGpu(0, name, "GPU-0", 143771.0),) if name else ()


@pytest.mark.parametrize(
    ("name", "said"), [(None, "a machine without a GPU"), ("NVIDIA L40S", "NVIDIA L40S")]
)
def test_other_hardware_says_what_the_record_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str | None, said: str
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", on(name))
    assert main(["verify", "101"]) == 2
    assert (
        f"101 is recorded on NVIDIA H200; {said} cannot verify that\nRUN=label"
        in capsys.readouterr().err
    )


def test_on_its_hardware_the_records_experiment_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the record's steps and overrides, and with what was asked for how to launch it."""
    planned = []

    def run_plan(plan, *, hang_seconds):
        planned.append((plan, hang_seconds))
        run = second_run(plan.outdir, f"launched{len(planned)}", stem="111_cardh100-80gb")
        return launch.Finished(run, run.read_result())

    monkeypatch.setattr(gpus, "list_gpus", on("NVIDIA H200"))
    monkeypatch.setattr(launch, "run_plan", run_plan)
    experiment, result, _ = read(KEPT / "111_cardh100-80gb.json")
    monkeypatch.setattr("harness.launching.verify.describe_upstream", lambda: result.upstream)
    ready = []
    settings = {"CARD": experiment.overrides["CARD"], "OUTDIR": str(tmp_path), "HANG": "77"}
    assert verify("111", settings, tmp_path, RECORDS, prepare=lambda: ready.append(True)) == 0
    ((plan, hang_seconds),) = planned
    assert ready and hang_seconds == 77
    assert plan.experiment == experiment and plan.device == "cuda"
    assert experiment.overrides["STEPS"] == "20"
    verify("111", settings | {"STEPS": "100"}, tmp_path, RECORDS, prepare=lambda: None)
    assert planned[1][0].experiment.steps == 100, "the row's own number was asked for"


def test_nothing_is_launched_on_another_megatron_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", on("NVIDIA H200"))
    monkeypatch.setattr(launch, "run_plan", lambda *_, **__: pytest.fail("nothing may run"))
    monkeypatch.setattr(
        "harness.launching.verify.describe_upstream",
        lambda: Upstream(version="0.18.0", source="submodule"),
    )
    with pytest.raises(
        UserError,
        match=r"here is Megatron-LM core 0.18.0, .* ran Megatron-LM core 0.19.1",
    ):
        verify("101", {"OUTDIR": str(tmp_path)}, tmp_path, RECORDS, prepare=lambda: None)


def test_what_the_driver_keeps_counts_on_both_sides_or_on_none() -> None:
    """A record made before the driver's own memory was told apart includes it."""
    row = next(
        row
        for row in collect_records(RECORDS, load_references()).rows
        if row.label == "h200-141gb/101"
    )

    def with_memory(**gib: float) -> Row:
        return replace(row, result=row.result.model_copy(update={"memory_gib": MemoryGib(**gib)}))

    old, new = with_memory(nvml=32.9), with_memory(nvml=32.3, driver=0.6)
    assert all(
        line.agrees for pair in ((old, new), (new, old), (new, new)) for line in compare(*pair)
    )
    assert not all(line.agrees for line in compare(old, with_memory(nvml=32.3)))


def test_a_dry_run_is_no_verification(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", on("NVIDIA H200"))
    assert main(["verify", "101", "DRY_RUN=1"]) == 2
    assert "make show-101 prints the command" in capsys.readouterr().err


@pytest.mark.parametrize("pair", [("211", "231"), ("221", "241")])
def test_records_of_the_same_work_agree_with_each_other(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    """They were run one after the other under two names: the rule must not tell them apart."""
    rows = {row.origin.stem: row for row in collect(tmp_path, RECORDS, load_references()).rows}
    assert all(line.agrees for line in compare(rows[pair[0]], rows[pair[1]]))
    with pytest.raises(UserError, match="not of the work of"):
        choose([rows[pair[0]]], rows[pair[1]])


def with_launch_rate(run: RunDir, operation_us: float) -> RunDir:
    environment = json.loads(run.environment.read_text())
    write_json(
        run.environment, {**environment, "launch": {"add_us": 5.0, "operation_us": operation_us}}
    )
    return run


@pytest.mark.parametrize(
    ("here_us", "remark"), [(31.5, "2.1 x slower"), (10.0, "1.5 x faster"), (16.0, None)]
)
def test_hosts_that_launch_at_different_rates_are_told(
    tmp_path: Path, here_us: float, remark: str | None
) -> None:
    with_launch_rate(second_run(tmp_path, label="recorded"), 15.0)
    with_launch_rate(second_run(tmp_path, label="here"), here_us)
    recorded, here = sorted(
        collect_runs(tmp_path, load_references()).rows, key=lambda row: row.label, reverse=True
    )
    printed = render(recorded, here, compare(recorded, here))
    assert (f"launched operations {remark}" in printed) if remark else ("launched" not in printed)


def test_tables_and_comparisons_say_where_launch_rates_differ(tmp_path: Path) -> None:
    with_launch_rate(second_run(tmp_path, label="a"), 15.0)
    with_launch_rate(second_run(tmp_path, label="b"), 30.0)
    rows = collect_runs(tmp_path, load_references()).rows
    for printed in (tables.render(rows), render_compare(*rows)):
        assert (
            "The host of b launched operations 2.0 x slower than that of a (30.0 and 15.0 µs each)"
            in " ".join(printed.split())
        )
    assert [columns.values(row)["launch_operation_us"] for row in rows] == [15.0, 30.0]
