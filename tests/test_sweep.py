"""make sweep: what of a grid is run, in which order, and what its table says; with test_launch's stand-in for torchrun."""

import csv
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from harness import RECORDS, ROOT
from harness.cli import main
from harness.errors import UserError
from harness.evidence import loss_noise
from harness.evidence.references import load_references
from harness.evidence.results import collect_records
from harness.evidence.rows import losses, metrics
from harness.experiment import identity
from harness.experiment.catalog import EXPERIMENTS, load_catalog
from harness.experiment.command_line import EXPERIMENT_SETTINGS
from harness.launching import processes
from harness.machine import gpus
from harness.planning import plan
from harness.run import directory
from harness.sweep import commands, grid, measured, outline, points, table
from harness.sweep.request import read_sweep
from harness.system import locks

LAUNCHER = Path(__file__).parent / "test_launch_assets" / "launcher.py"
spec = importlib.util.spec_from_file_location("launcher", LAUNCHER)
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
CATALOG = load_catalog()
REAL_PLAN = plan.plan


def h200s(monkeypatch, count):
    there = tuple(gpus.LocalGpu(i, "NVIDIA H200", f"GPU-{i}", 143771) for i in range(count))
    monkeypatch.setattr(gpus, "list_gpus", lambda: there)
    monkeypatch.setattr(gpus, "available", lambda wanted=None: wanted or tuple(range(count)))
    monkeypatch.setattr(gpus, "driver_versions", lambda: ("580", "13.0"))
    monkeypatch.setattr(gpus, "keep_awake", lambda: None)


@pytest.fixture
def one_gpu(monkeypatch):
    h200s(monkeypatch, 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "list_gpus", lambda: ())


@pytest.fixture
def behave(monkeypatch):
    """What a run does, by its experiment: (behaviour, milliseconds a step, seconds that it really takes, and its first loss)."""
    chosen = {"how": lambda e: ("ok", 100, 0.0)}

    def scripted(row, settings, device):
        made = REAL_PLAN(row, settings, device)
        behaviour, ms, step_s, *loss = chosen["how"](made.experiment)
        variables = " ".join([f"STEP_MS={ms}", *(f"LOSS={one}" for one in loss)])
        text = f"env {variables} {sys.executable} {launcher.TORCHRUN} {behaviour} 1 {made.experiment.steps} {step_s}"
        plain = {one.name: getattr(made, one.name) for one in fields(plan.Plan)}
        return launcher.Scripted(**plain, text=text)

    monkeypatch.setattr(plan, "plan", scripted)
    monkeypatch.setattr("harness.machine.packages.install", lambda *stages: None)
    monkeypatch.setattr("harness.launching.chapter.check_ready", lambda plan: None)
    return lambda how: chosen.update(how=how)


def request_of(tmp_path, **settings):
    return read_sweep({"ID": "111", "STEPS": "20", "OUTDIR": str(tmp_path), **settings})


def by_run(tmp_path):
    return {run.dir.label: run.result for run in directory.runs(tmp_path)[0]}


# What a grid says


def test_a_grid_has_every_combination_and_an_empty_value_is_the_rows():
    found = grid.read("TP=1,2 FP8=,tensorwise", CATALOG.find("111"), {})
    assert [*grid.points(found)] == [
        {"TP": "1"},
        {"TP": "1", "FP8": "tensorwise"},
        {"TP": "2"},
        {"TP": "2", "FP8": "tensorwise"},
    ]


def test_semicolons_separate_values_with_commas_and_quotes_keep_spaces():
    text = "CUDA_GRAPHS='1;attn,mlp' ARGS='--lr 1e-4;--lr 2e-4'"
    found = grid.read(text, CATALOG.find("111"), {})
    assert found == {"CUDA_GRAPHS": ("1", "attn,mlp"), "ARGS": ("--lr 1e-4", "--lr 2e-4")}
    assert grid.read(grid.in_words(found), CATALOG.find("111"), {}) == found


@pytest.mark.parametrize(
    ("text", "beside", "said"),
    [
        ("TPP=1,2", {}, "unknown setting TPP; did you mean TP"),
        ("DEVICE=cpu,cuda", {}, "DEVICE says how a run is launched"),
        ("TP=1,x", {}, "TP=x: expected a whole number"),
        ("FP8=,fast", {}, "FP8=fast"),
        ("RECOMPUTE=none,half", {}, "RECOMPUTE=half"),
        ("GPUS=2,many", {}, "GPUS=many: expected a whole number"),
        ("LORA_ALPHA=8,0", {}, "LORA_ALPHA=0: expected a number above 0"),
        ("DROPOUT=0,1.5", {}, "DROPOUT=1.5"),
        ("ARGS=--no-such-flag", {}, "--no-such-flag"),
        ("TP=1 TP=2", {}, "TP occurs twice"),
        ("TP=1,2", {"TP": "2"}, "TP=2 is given, and GRID varies TP"),
        ("TP", {}, "'TP' is not of the form KEY=VALUES"),
        ("", {}, "GRID is empty"),
        ("'TP=1", {}, "No closing quotation"),
        (
            f"MBS={','.join(map(str, range(1, 80)))} GBS={','.join(map(str, range(1, 80)))}",
            {},
            "6,241 points (79 x 79)",
        ),
    ],
)
def test_what_a_grid_refuses(text, beside, said):
    with pytest.raises(UserError) as refused:
        grid.read(text, CATALOG.find("111"), beside)
    assert said in str(refused.value)


def test_settings_that_contradict_are_refused(tmp_path, no_gpu):
    for settings, said in (
        ({}, "neither is given"),
        ({"GRID": "TP=1", "TOP": "3"}, "leave one out"),
        ({"TOP": "3", "METHOD": "optuna"}, "searches GRID="),
        ({"GRID": "TP=1", "TRIALS": "3"}, "TRIALS= is for METHOD=optuna"),
        ({"GRID": "TP=1", "METHOD": "random"}, "METHOD=random"),
        ({"GRID": "TP=1", "RESUME": "1"}, "a sweep resumes by itself"),
        ({"GRID": "TP=1", "SAVE": "/tmp/x"}, "in one folder"),
        ({"GRID": "TP=1", "STEPS": "5"}, "averaged from step 6 on"),
        ({"GRID": "TP=1", "RENDEZVOUS": "a:1"}, "job array"),
        ({"GRID": "TP=1", "K8S": "1"}, "K8S=1 is for one experiment"),
        ({"GRID": "TP=1", "PARTITION": "gpu"}, "SLURM=1 is not given"),
        ({"GRID": "TP=1", "SLURM": "1", "DEVICE": "cpu"}, "jobs run on GPUs"),
        ({"GRID": "TP=1", "FORMAT": "xml"}, "FORMAT=xml"),
    ):
        with pytest.raises(UserError) as refused:
            request_of(tmp_path, **settings)
        assert said in str(refused.value), settings


# Which points are run


def test_points_are_ordered_by_prediction_and_what_cannot_run_is_named(tmp_path, monkeypatch):
    h200s(monkeypatch, 1)
    found = points.select(request_of(tmp_path, GRID="TP=1,2 MBS=5,15,30,60 GBS=,60"))
    steps = [point.step_ms for point in found.points]
    assert steps == sorted(steps)
    row = found.row
    assert row.name == points.AS_IT_STANDS and [one.name for one in row.also] == ["TP=1 MBS=15"]
    assert {point.name for point in found.too_large} >= {"TP=1 MBS=60 GBS=60"}
    assert all(point.gib > 140 for point in found.too_large)
    odd = found.refused[
        "num_attention_heads (25) must be divisible by TP (2); try TP in {1, 5, 25}"
    ]
    assert len(odd) == 8 and points.in_words(odd) == "8 points with TP=2"
    assert points.in_words(odd[:2]) == "TP=2 MBS=5, TP=2 MBS=5 GBS=60"


def test_points_at_the_border_are_run_and_those_that_surely_do_not_fit_are_not(tmp_path, one_gpu):
    """GPT-2 XL takes 15 samples on an H100, and 16 were published as out of memory."""
    grid_ = {"GRID": "MBS=14,15,16,17,18,24", "GBS": "85680", "CARD": "h100-80gb", "DRY_RUN": "1"}
    found = points.select(request_of(tmp_path, **grid_))
    assert {p.name for p in found.points} == {points.AS_IT_STANDS, "MBS=14", "MBS=16"}
    assert [p.name for p in found.points if p.is_at_the_border] == ["MBS=16"]
    assert {p.name for p in found.too_large} == {"MBS=17", "MBS=18", "MBS=24"}
    assert min(p.gib for p in found.too_large) > 79.1 * 1.03


def test_equal_experiments_are_one_point(tmp_path, no_gpu):
    """A CPU has no fp8, and the row has no tensor parallelism anyway."""
    found = points.select(request_of(tmp_path, GRID="TP=1,5 FP8=0,tensorwise", DEVICE="cpu"))
    assert {tuple(one.name for one in (p.candidate, *p.also)) for p in found.points} == {
        (points.AS_IT_STANDS, "TP=1 FP8=0", "TP=1 FP8=tensorwise"),
        ("TP=5 FP8=0", "TP=5 FP8=tensorwise"),
    }


def test_settings_beside_the_grid_may_need_it(tmp_path, no_gpu):
    """The row's 15 sequences do not divide by 7; those of the points do."""
    found = points.select(request_of(tmp_path, MBS="7", GRID="GBS=14,28", DEVICE="cpu"))
    assert {p.name for p in found.points} == {"GBS=14", "GBS=28"} and found.row is None
    assert [one.name for one in next(iter(found.refused.values()))] == [points.AS_IT_STANDS]


def test_a_sweep_of_which_nothing_can_run_says_why(tmp_path, no_gpu):
    with pytest.raises(UserError, match=r"no point of the sweep can run\n.*MBS x DP"):
        points.select(request_of(tmp_path, GRID="TP=1", MBS="7", DEVICE="cpu"))


def test_what_this_machine_is_too_small_for_is_refused(tmp_path, monkeypatch):
    h200s(monkeypatch, 2)
    found = points.select(request_of(tmp_path, ID="115", GRID="GPUS=1,2,4 NODES=,2"))
    assert {p.name for p in found.points} == {"GPUS=1", "GPUS=2"} and found.row is None
    assert {reason: len(them) for reason, them in found.refused.items()} == {
        "needs 4 GPUs, this machine has 2": 2,
        "needs 2 nodes; SLURM=1 makes the sweep a job array": 2,
        "TP x PP x CP x DP (1) must be divisible by NODES (2); try NODES in {1}": 1,
    }


def test_the_best_predicted_are_those_of_make_faster(tmp_path, monkeypatch, capsys):
    h200s(monkeypatch, 4)
    found = points.select(request_of(tmp_path, ID="115", TOP="4"))
    assert len(found.points) == 5 and found.row
    assert main(["faster", "115", "STEPS=20", "FORMAT=json"]) == 0
    listed = {one["experiment"]: one["step_ms"] for one in json.loads(capsys.readouterr().out)[1:]}
    for point in found.points[:-1]:
        full = point.plan.full
        assert full.global_batch_size == 60 and full.world_size == 4, "the same work"
        same = [
            ms
            for command, ms in listed.items()
            if identity.same(commands_experiment(command), point.plan.full)
        ]
        if same:
            assert point.step_ms == pytest.approx(same[0], abs=0.01)
    fastest = min(listed.values())
    assert found.points[0].step_ms <= fastest + 0.01


def commands_experiment(command):
    from harness.experiment.overrides import experiment_of

    return experiment_of(f"{command} STEPS=20", CATALOG)


VALUES = {
    "TP": ("1", "2", "5"), "SP": ("0", "1"), "PP": ("1", "2", "4"), "VPP": ("1", "2"), "CP": ("1", "2"),
    "CP_COMM_TYPE": ("p2p", "a2a", "all_gather"), "MBS": ("1", "2", "3", "5"), "GBS": ("30", "60"),
    "SEQ": ("512", "1024"), "GPUS": ("1", "2", "4"), "RECOMPUTE": ("none", "full", "selective"),
    "RECOMPUTE_MODULES": ("mlp", "mlp core_attn", "core_attn", "core_attn layernorm"),
    "CUDA_GRAPHS": ("0", "1", "attn", "attn,mlp"), "FP8": ("0", "tensorwise", "delayed"),
    "SHARDING": ("no_shard", "optim", "fsdp_optim", "fsdp_optim_grads", "fsdp_optim_grads_params"),
    "GRADIENTS": ("fp32", "bf16"), "OPTIMIZER_STATE": ("fp32", "bf16"), "OFFLOAD": ("0", "0.5", "0.50"),
    "DROPOUT": ("0", "0.1", "0.10"), "LORA_RANK": ("0", "8"), "LORA_TARGETS": ("linear_qkv", "linear_qkv linear_proj"),
    "ARGS": ("--lr 1e-4", "--lr 2e-4", "--weight-decay 0.1"), "GRAD_FUSION": ("0", "1"), "OVERLAP": ("0", "1"),
    "LR": ("1e-4", "0.0001", "3e-4"), "EVAL_STEPS": ("0", "10"), "STEPS": ("20", "30"),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(4))
def test_variants_of_an_id_have_labels_of_their_own(tmp_path, monkeypatch, device, seed):
    """Different experiments of one row have different labels, whatever settings make them."""
    assert VALUES.keys() <= {one.key for one in EXPERIMENT_SETTINGS}
    h200s(monkeypatch, 8)
    chance = random.Random(seed)
    labels = {}
    tried = 0
    for id_ in ("101", "115", "122", "221", "408", "801"):
        row = CATALOG.find(id_)
        for _ in range(60):
            keys = chance.sample(sorted(VALUES), chance.randint(1, 5))
            settings = {key: chance.choice(VALUES[key]) for key in keys}
            try:
                made = REAL_PLAN(row, settings | {"OUTDIR": str(tmp_path)}, device)
            except UserError:
                continue
            tried += 1
            frozen = identity.frozen(made.experiment).model_dump_json()
            first = labels.setdefault(made.experiment.label, (frozen, settings))
            assert first[0] == frozen, (made.experiment.label, first[1], settings)
    assert tried > 60 and len(labels) > 50


# How long it takes


def test_the_predicted_time_packs_runs_as_a_batch_does(tmp_path, monkeypatch):
    h200s(monkeypatch, 4)
    found = points.select(request_of(tmp_path, ID="115", GRID="GPUS=1,2,4 MBS=1"))
    width = {p.plan.experiment.world_size: outline.run_s(p) for p in found.points if not p.is_row}
    by_gpus = {p.plan.experiment.world_size: p for p in found.points if not p.is_row}
    row = found.row
    assert outline.run_s(row) == pytest.approx(25 + 20 * row.step_ms / 1e3)
    both = [by_gpus[1], by_gpus[2]]
    assert outline.total_s(both, 4) == pytest.approx(max(width[1], width[2])), "side by side"
    assert outline.total_s(both, 2) == pytest.approx(width[1] + width[2]), "one after the other"
    after = outline.total_s([by_gpus[1], by_gpus[4], by_gpus[2]], 4)
    assert after == pytest.approx(width[1] + width[4] + width[2]), "in order: nothing overtakes"


def test_the_time_of_a_start_is_that_of_records():
    rows = collect_records(RECORDS, load_references()).rows
    outside = [
        row.result.finished - row.result.started - sum(s.step_ms for s in metrics(row)) / 1e3
        for row in rows
        if row.state == "ok"
    ]
    assert len(outside) > 100
    assert statistics.median(outside) == pytest.approx(outline.START_UP_S, abs=3)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, one_gpu, capsys):
    words = ["ID=111", "GRID=TP=1,2 MBS=5,60 GBS=60", "STEPS=20", "DRY_RUN=1"]
    assert main(["sweep", *words, f"OUTDIR={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "refused: num_attention_heads (25) must be divisible by TP (2)" in printed
    assert "left out, does not fit" in printed and "TP=1 MBS=60 GBS=60 (" in printed
    assert "2 runs, predicted to take 2 min on 1 GPU" in printed
    assert not [*tmp_path.iterdir()]
    assert main(["sweep", *words, f"OUTDIR={tmp_path}", "FORMAT=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["settings"]: one["status"] for one in found} == {
        "the row as it stands": "not run",
        "TP=1 MBS=5 GBS=60": "not run",
    }
    assert all(one["predicted_step_ms"] > 100 for one in found)


# Running


WORDS = ["ID=111", "GRID=MBS=3,5,15", "STEPS=8"]


def sweep(tmp_path, capsys, *words):
    status = main(["sweep", *WORDS, f"OUTDIR={tmp_path}", *words])
    return status, capsys.readouterr().out


def ms_of(e):
    return {3: 300, 5: 200, 15: 250}[e.micro_batch_size]


def test_a_sweep_runs_its_points_and_says_which_is_best(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("ok", ms_of(e), 0))
    status, printed = sweep(tmp_path, capsys)
    assert status == 0
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("settings"))
    assert [line.split("  ")[0] for line in lines[first + 1 : first + 4]] == [
        "MBS=5",
        "the row as it stands",
        "MBS=3",
    ]
    assert "best: make 111 MBS=5 (1.24 x the tokens/s of the row)" in printed
    folder = next((tmp_path / "sweeps").glob("111_mbs-*"))
    rows = [*csv.DictReader((folder / "table.csv").open())]
    assert [float(row["step_ms"]) for row in rows] == [207, 257, 307], "median of steps 6 to 8"
    assert [round(float(row["ratio"]), 3) for row in rows] == [1.242, 1, 0.837]
    predicted = float(rows[0]["predicted_step_ms"])
    assert float(rows[0]["error"]) == pytest.approx(predicted / 207 - 1)
    svg = (folder / "plot.svg").read_text()
    assert svg.count("<circle") == 3 and "MBS=5" in svg and "predicted" in svg
    assert "| MBS=5 | 207.0 |" in (folder / "table.md").read_text()
    started = sorted(by_run(tmp_path), key=lambda label: by_run(tmp_path)[label].started)
    order = [
        p.plan.experiment.label
        for p in points.select(request_of(tmp_path, GRID="MBS=3,5,15", STEPS="8")).points
    ]
    assert started == order, "the predicted fastest first"


def test_the_same_command_resumes(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("killed" if e.micro_batch_size == 3 else "ok", ms_of(e), 0))
    status, printed = sweep(tmp_path, capsys)
    assert status == 1 and "crash: MBS=3: " in printed
    behave(lambda e: ("ok", ms_of(e), 0))
    before = by_run(tmp_path)
    status, printed = sweep(tmp_path, capsys)
    assert status == 0 and "1 of 3 experiments to run" in printed
    assert len(by_run(tmp_path)) == len(before) + 1, "only the failed one ran again"
    assert "0 of 3 experiments to run" in sweep(tmp_path, capsys)[1]
    status, printed = sweep(tmp_path, capsys, "DRY_RUN=1")
    assert "every point has its result" in printed and "best: make 111 MBS=5" in printed
    assert "3 of 3 experiments to run" in sweep(tmp_path, capsys, "FORCE=1")[1]


def test_out_of_memory_is_a_result(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("oom" if e.micro_batch_size == 15 else "ok", ms_of(e), 0))
    status, printed = sweep(tmp_path, capsys)
    assert status == 0 and "oom: the row as it stands: " in printed
    assert "no ratio: the row as it stands was not measured" in printed
    assert printed.count("best: make 111 MBS=5\n") == 1
    assert "0 of 3 experiments to run" in sweep(tmp_path, capsys)[1]


def test_json_is_all_of_standard_output(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("ok", ms_of(e), 0))
    _, printed = sweep(tmp_path, capsys, "FORMAT=json")
    found = json.loads(printed)
    assert [one["make"] for one in found] == ["111 MBS=5", "111", "111 MBS=3"]
    assert all(one.keys() == table.VALUES.keys() for one in found)


def test_ctrl_c_keeps_what_is_finished(tmp_path, one_gpu, behave, capsys, monkeypatch):
    behave(lambda e: ("ok", ms_of(e), 0 if e.micro_batch_size == 15 else 0.3))

    def interrupt(self):
        ended = [r for r in by_run(tmp_path).values() if r and r.status == "ok"]
        return signal.SIGINT if ended and not sent and not sent.append(1) else None

    sent = []
    monkeypatch.setattr(processes.Signals, "take", interrupt)
    status, printed = sweep(tmp_path, capsys)
    assert status == 128 + signal.SIGINT
    assert "best: make 111\n" in printed
    folder = next((tmp_path / "sweeps").glob("111_mbs-*"))
    assert "| the row as it stands | 257.0 |" in (folder / "table.md").read_text()


def test_points_share_the_gpus_of_a_node(tmp_path, monkeypatch, behave, capsys):
    h200s(monkeypatch, 4)
    behave(lambda e: ("ok", ms_of(e), 0.2))
    _, printed = sweep(tmp_path, capsys)
    assert all(len(result.packed_with) == 2 for result in by_run(tmp_path).values())
    assert "*: other runs shared the node; PACK=0 FORCE=1 times each alone" in printed
    sweep(tmp_path, capsys, "PACK=0", "FORCE=1")
    latest = [r for label, r in by_run(tmp_path).items() if label.endswith(".2")]
    assert len(latest) == 3 and not any(result.packed_with for result in latest)


def test_a_large_grid_is_searched_and_the_search_resumes(tmp_path, one_gpu, behave, capsys):
    pytest.importorskip("optuna", reason="Optuna is not installed: scripts/setup.sh search")
    behave(lambda e: ("ok", 100 + 10 * e.micro_batch_size - 5 * bool(e.cuda_graphs), 0))
    words = ["sweep", "ID=111", "GRID=MBS=1,3,5,15 CUDA_GRAPHS=0,1", "METHOD=optuna", "STEPS=8"]
    words += [f"OUTDIR={tmp_path}", "FORMAT=json"]
    assert main([*words, "TRIALS=3"]) == 0
    out, err = capsys.readouterr()
    assert "Warning" not in err
    first = json.loads(out)
    assert len(first) in (3, 4) and "the row as it stands" in {one["settings"] for one in first}
    assert main([*words, "TRIALS=3"]) == 0
    assert json.loads(capsys.readouterr().out) == first and len(by_run(tmp_path)) == len(first)
    assert main([*words, "TRIALS=5"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert {one["run"] for one in first} < {one["run"] for one in more}
    assert len(more) in (len(first) + 1, len(first) + 2) and len(by_run(tmp_path)) == len(more)
    assert next((tmp_path / "sweeps").glob("111_mbs_cuda_graphs-*/optuna.log")).exists()


GUARDED = """
import importlib.util, sys
from pathlib import Path
from harness.launching.chapter import Batch, Job, run_batch
from harness.launching.processes import Signals
from harness.launching.terminal import open_terminal
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
outdir = Path(sys.argv[2])
plans = {i: launcher.make_plan(outdir, "ok", 1, 8, 0.1, id=i) for i in ("101", "102", "103")}
jobs = [Job(i, lambda p=p: p) for i, p in plans.items()]
with Signals() as signals, open_terminal() as shown:
    end = run_batch(jobs, Batch(guard=outdir / "sweeps"), shown, signals)
print("ENDED", *(f"{name}:{o.status}" for name, o in end.outcomes.items()))
"""


def test_two_sweeps_at_the_same_time_run_no_point_twice(tmp_path):
    (tmp_path / "sweeps").mkdir()
    command = [sys.executable, "-c", GUARDED, LAUNCHER, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [text.splitlines()[-1] for text in printed] == ["ENDED 101:ok 102:ok 103:ok"] * 2
    assert sorted(by_run(tmp_path)) == [f"{i}-tiny-dp1_cpu" for i in ("101", "102", "103")]
    assert any("its result is waited for" in text for text in printed)
    assert locks.holder(tmp_path / "sweeps") is None


# What the table says


def test_the_best_row_can_be_pasted(tmp_path, one_gpu, behave, capsys):
    """It is read back from the chapter's file as the experiment that ran, at the row's own length."""
    behave(lambda e: ("ok", 100 if e.cuda_graphs and e.micro_batch_size == 5 else 200, 0))
    words = ["ID=115", "GRID=MBS=5,15 CUDA_GRAPHS=0,1 GPUS=1", "STEPS=8", f"OUTDIR={tmp_path}"]
    assert main(["sweep", *words]) == 0
    printed = capsys.readouterr().out
    pasted = printed.split("as a row: ")[1].splitlines()[0]
    folder = shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    with (folder / "100-data-parallel.yaml").open("a") as file:
        file.write(f"  {pasted}\n")
    found = load_catalog(folder).find(pasted.split(":")[0])
    wanted = plan_of("115 GPUS=1 MBS=5 CUDA_GRAPHS=1")
    assert identity.same(found.model_copy(update={"id": "115"}), wanted)
    assert (
        "1.90 x" not in found.shows
        and found.slug == "gpt2xl-dp4-gbs60-zero2-gpus1-mbs5-cudagraphs1"
    )
    assert pasted.split(":")[0] not in {one.id for one in CATALOG.experiments}


def plan_of(command):
    from harness.experiment.overrides import experiment_of

    return experiment_of(command, CATALOG)


def test_other_arithmetic_is_named_and_the_best_without_it(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("ok", 100 if e.gradients == "bf16" else 200 + e.micro_batch_size, 0))
    words = ["ID=111", "GRID=GRADIENTS=,bf16 MBS=5,15", "STEPS=8", f"OUTDIR={tmp_path}"]
    assert main(["sweep", *words]) == 0
    printed = capsys.readouterr().out
    assert "best, with other arithmetic (GRADIENTS): make 111 " in printed
    assert "best that computes what the row does: make 111 MBS=5 (1.05 x" in printed


def test_losses_beyond_noise_are_marked(tmp_path, one_gpu, behave, capsys):
    behave(lambda e: ("ok", ms_of(e), 0, 10.1 if e.micro_batch_size == 3 else 10.001))
    _, printed = sweep(tmp_path, capsys, "FORMAT=csv")
    found = {row["settings"]: row for row in csv.DictReader(io.StringIO(printed))}
    assert found["MBS=3"]["losses_differ"] == "True"
    assert float(found["MBS=3"]["losses_apart"]) == pytest.approx(0.0104, abs=1e-4)
    assert found["MBS=5"]["losses_differ"] == "False"
    printed = sweep(tmp_path, capsys)[1]
    assert "differ 1e-02" in printed and "than runs that compute the same" in printed


def test_losses_of_records_that_compute_the_same_are_within_noise():
    """The limits of harness/evidence/loss_noise.py, from all pairs of records that differ in no setting of the losses."""
    rows = [row for row in collect_records(RECORDS, load_references()).rows if row.state == "ok"]
    curves = {row.label: losses(row) for row in rows}
    apart = {}
    for a, b in itertools.combinations(rows, 2):
        changed = identity.differences(a.experiment, b.experiment)
        if any(one.curve for one in changed if one.setting != "id"):
            continue
        if len(curves[a.label].keys() & curves[b.label].keys()) >= 10:
            limit = loss_noise.most(a.experiment, b.experiment)
            apart.setdefault(limit, []).append(loss_noise.apart(curves[a.label], curves[b.label]))
    assert apart.keys() == {loss_noise.ROUNDING, loss_noise.SAME_DRAWS, loss_noise.OTHER_DRAWS}
    for limit, found in apart.items():
        assert len(found) > 50 and sum(one <= limit for one in found) >= 0.95 * len(found), limit
        assert max(one for one in found if one <= limit) > limit / 4, "no wider than it must be"


def test_a_part_of_the_loss_is_relative_and_averaged():
    assert loss_noise.apart({1: 10.0, 2: 5.0, 3: 1.0}, {1: 10.0, 2: 4.0}) == pytest.approx(0.125)
    assert loss_noise.apart({1: 1.0}, {2: 1.0}) is None


# Slurm


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_an_array_has_a_task_for_each_point_without_a_result(tmp_path, no_gpu, monkeypatch, capsys):
    """Tasks are run with an srun that tells its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    program(programs, "sbatch", f'cat >> {tmp_path}/submitted; echo "77;cluster"')
    program(programs, "srun", 'printf "<%s>" "$@"; echo')
    program(programs, "squeue", f"cat {tmp_path}/queued 2>/dev/null || exit 1")
    words = ["ID=115", "GRID=MBS=5,15 GPUS=2,4", "STEPS=20", "SLURM=1", "PARTITION=gpu"]
    assert main(["sweep", *words, f"OUTDIR={tmp_path}/out"]) == 0
    assert capsys.readouterr().out.count("submitted array 77, 2 tasks: squeue --job 77") == 2
    submitted = (tmp_path / "submitted").read_text()
    assert submitted.count("#SBATCH --array=0-1") == 2 and "#SBATCH --partition=gpu" in submitted
    assert "#SBATCH --gpus-per-node=2" in submitted and "#SBATCH --gpus-per-node=4" in submitted
    ran = set()
    for array in sorted((tmp_path / "out" / "sweeps").glob("*/tasks-*/array.sh")):
        for task in "01":
            inner = array.parent / f"{task}.sh"
            inner.write_text(inner.read_text().replace("scripts/setup.sh light heavy", ":"))
            done = subprocess.run(
                ["bash", array], env=os.environ | {"SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": "77"},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            ran.add(done.stdout.strip().split("<run>")[1].split("<DEVICE=cuda>")[0])
    assert ran == {
        "<115><STEPS=20>",
        "<115><STEPS=20><MBS=5><GPUS=4>",
        "<115><STEPS=20><MBS=5><GPUS=2>",
        "<115><STEPS=20><MBS=15><GPUS=2>",
    }
    (tmp_path / "queued").write_text("77_0 gpu sweep-115\n")
    assert main(["sweep", *words, f"OUTDIR={tmp_path}/out"]) == 2
    assert "array 77 of this sweep has not ended" in capsys.readouterr().err
    (tmp_path / "queued").unlink()
    assert main(["sweep", *words, f"OUTDIR={tmp_path}/out"]) == 0, "it ended, without results"


def test_an_array_leaves_out_what_has_a_result(tmp_path, one_gpu, behave, monkeypatch, capsys):
    behave(lambda e: ("ok", ms_of(e), 0))
    assert main(["sweep", "ID=111", "GRID=MBS=5", "STEPS=8", f"OUTDIR={tmp_path}"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    status, printed = sweep(tmp_path, capsys, "SLURM=1", "DRY_RUN=1")
    table_, _, script = printed.partition("#!/usr/bin/env bash")
    assert status == 0 and "best: make 111 MBS=5" in table_
    assert "#SBATCH --array=0-0" in script and "task 0: MBS=3" in script
    assert main(["sweep", "ID=111", "GRID=MBS=5", "STEPS=8", "SLURM=1", f"OUTDIR={tmp_path}"]) == 0
    assert "every point has its result" in capsys.readouterr().out


def test_a_dry_run_of_an_array_writes_nothing(tmp_path, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = ["ID=115", "GRID=MBS=5,15", "SLURM=1", "DRY_RUN=1", f"OUTDIR={tmp_path}"]
    assert main(["sweep", *words]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-1" in printed and "task 1: " in printed
    assert not [*tmp_path.iterdir()]


def test_line_breaks_of_values_end_no_line_of_the_script(tmp_path, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = ["ID=115", "GRID=ARGS='--weight-decay\n0.1'", "SLURM=1", "DRY_RUN=1"]
    assert main(["sweep", *words, f"OUTDIR={tmp_path}"]) == 0
    script = capsys.readouterr().out.partition("#!/usr/bin/env bash")[2].splitlines()
    assert "#   task 0: ARGS='--weight-decay 0.1'" in script
    assert all(line.startswith(("#", "set", "exec")) for line in script if line)


# Real training


@pytest.mark.cpu
@pytest.mark.full
def test_a_sweep_of_miniatures_trains_resumes_and_compares(tmp_path, no_gpu, capsys):
    words = ["sweep", "ID=101", "GRID=CROSS_ENTROPY_FUSION=0,1 RECOMPUTE=none,full", "DEVICE=cpu"]
    words += ["STEPS=8", f"OUTDIR={tmp_path}", "FORMAT=json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 4 and {one["status"] for one in found} == {"ok"}
    assert [one["step_ms"] for one in found] == sorted(one["step_ms"] for one in found)
    assert not any(one["losses_differ"] for one in found), "recomputation changes no loss"
    begun = time.monotonic()
    assert main(words) == 0 and time.monotonic() - begun < 10, "nothing is trained again"
    assert json.loads(capsys.readouterr().out) == found
    assert measured.NOT_RUN not in {one["status"] for one in found}
    assert commands.sweep
