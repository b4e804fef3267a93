"""make best: the fastest measured set-ups, like compared with like."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from harness import RECORDS
from harness.cli import main
from harness.evidence import best, results
from harness.evidence.references import load_references
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.run.schema import LaunchRate

ROW = load_catalog().find("632")
RECORD = next(
    row
    for row in results.collect_records(RECORDS, load_references()).rows
    if row.id == "632" and not row.experiment.overrides.keys() & {"MBS", "RECOMPUTE"}
)
HOUR = 3600


def measured(ms: float, at: float = 0.0, us: float = 50.0, steps: int = 20, **settings: str):
    """A record of 632 with ``settings`` that took ``ms`` a step."""
    step = RECORD.result.step_ms.model_copy(update={"median": ms})
    result = RECORD.result.model_copy(update={"step_ms": step, "started": at, "steps_done": steps})
    return replace(
        RECORD,
        experiment=overrides.apply(ROW, {"STEPS": str(steps), **settings}),
        result=result,
        launch=LaunchRate(add_us=8.0, operation_us=us),
        label=f"h200/{ms:g}",
    )


def test_the_fastest_comes_first_and_is_compared_with_the_row_of_its_batch():
    rows = [
        measured(3000.0),
        measured(1000.0, HOUR, MBS="4", RECOMPUTE="none"),
        measured(2500.0, 10 * HOUR),
        measured(1500.0, HOUR, MBS="4"),
    ]
    (recipe,) = best.recipes(ROW, rows)
    assert [one.step.median for one in recipe.rows] == [1000.0, 1500.0, 2500.0, 3000.0]
    assert recipe.base is rows[0] and recipe.ratio == 3.0
    assert not best.same_batch(rows[2], rows[0])
    assert [line.partition(" ms,")[0] for line in best.ablation(recipe.rows)] == [
        "RECOMPUTE selective -> none: 1,500 -> 1,000",
        "MBS 1 -> 4: 3,000 -> 1,500",
    ]


def test_hosts_that_launch_otherwise_are_another_batch():
    rows = [measured(3000.0), measured(1500.0, HOUR, us=75.0, MBS="4")]
    assert not best.same_batch(*rows)
    (recipe,) = best.recipes(ROW, rows)
    assert recipe.ratio == 2.0 and not [*best.ablation(recipe.rows)]


def test_what_computes_something_else_is_compared_apart():
    rows = [
        measured(3000.0),
        measured(900.0, FP8="tensorwise", MBS="4"),
        measured(2000.0, FP8="tensorwise"),
        measured(500.0, FP4="nvfp4"),
        measured(800.0, GRADIENTS="bf16"),
        measured(700.0, GRADIENTS="bf16", FP8="tensorwise"),
    ]
    found = {one.arithmetic: one for one in best.recipes(ROW, rows)}
    assert found[()].rows == (rows[0],)
    fp8 = found[("FP8=tensorwise",)]
    assert fp8.base is rows[2] and fp8.best is rows[1]
    assert {*found} == {
        (),
        ("FP8=tensorwise",),
        ("FP4=nvfp4",),
        ("GRADIENTS=bf16",),
        ("FP8=tensorwise", "GRADIENTS=bf16"),
    }


@pytest.mark.parametrize(
    "settings", [{"GBS": "8"}, {"SEQ": "2048"}, {"OPTIMIZER": "muon", "OPTIMIZER_STATE": "fp32"}]
)
def test_other_work_is_none_of_it(settings):
    assert best.recipes(ROW, [measured(1.0, **settings)]) == []


def test_settings_around_a_step_make_no_other_set_up():
    (recipe,) = best.recipes(ROW, [measured(1.0, LR="1e-3", EVAL_STEPS="3")])
    assert recipe.base is recipe.best


def test_it_prints_commands_and_says_what_is_not_measured(capsys):
    assert main(["best", "111"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("111-gpt2xl-dp1-fit-80GB: gpt2-xl, 15 sequences of 1,024 tokens")
    assert "make 111 DROPOUT=0 CROSS_ENTROPY_FUSION=1 CUDA_GRAPHS=1" in printed
    assert main(["best", "111", "FORMAT=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [one for one in found if not one["arithmetic"]]
    assert rows == sorted(rows, key=lambda one: one["step_ms"]) and rows[-1]["record"].startswith(
        "h200-141gb/111"
    )
    assert main(["best", "941"]) == 2
    assert "no record has the work of 941: deepseek-v3, 8,192 sequences" in capsys.readouterr().err


def test_the_same_gpus_are_one_batch_however_busy_their_host_was():
    rows = [measured(3000.0), measured(1500.0, HOUR, us=75.0, MBS="4")]
    here = [
        replace(row, gpu_uuids=frozenset({"GPU-1", uuid}))
        for row, uuid in zip(rows, "ab", strict=True)
    ]
    assert best.same_batch(*here)
    assert not best.same_batch(here[0], replace(here[1], gpu_uuids=frozenset({"GPU-2"})))


def test_recipes_are_the_fastest_records_of_each_listed_workload(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert main(["recipes", "FORMAT=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    olmoe = next(one for one in found if one["workload"] == "632")
    assert (
        olmoe["make"] == "632 GROUPED_GEMM=fused MBS=4 RECOMPUTE=none CUDA_GRAPHS=attn,moe_router"
        and olmoe["one_batch"]
    )
    assert olmoe["ratio"] == pytest.approx(olmoe["row_ms"] / olmoe["fastest_ms"], abs=1e-3)
    mean = math.exp(statistics.mean(math.log(one["ratio"]) for one in found))
    assert f"geometric mean of {len(found)}: {mean:.2f}" in printed
    for one in found:
        base, fastest = (
            json.loads((RECORDS / f"{name}.json").read_text()) for name in one["records"]
        )
        assert base["step_ms"]["median"] == pytest.approx(one["row_ms"], abs=0.01)
        assert one["fastest_ms"] <= one["row_ms"] and fastest["status"] == "ok"
