"""Chapters: what is run, what is skipped and why, what shares a node; with test_launch's stand-in for torchrun."""

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.evidence.references import load_references
from harness.launching import processes
from harness.launching.chapter import run_chapter
from harness.launching.terminal import PlainTerminal
from harness.machine import gpus
from harness.run import directory, schema

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(__file__).parent / "test_launch_assets" / "launcher.py"


def load_launcher():
    spec = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_plan = load_launcher().make_plan


def run(*plans, **kwargs) -> tuple[int, dict[str, str], str]:
    """Exit status, the line of each experiment in the table at the end, everything printed."""
    by_id = {plan.experiment.id: plan for plan in plans}
    out = io.StringIO()
    experiments = [plan.experiment for plan in plans]
    status = run_chapter(experiments, lambda e: by_id[e.id], terminal=PlainTerminal(out), **kwargs)
    table = out.getvalue().splitlines()[-len(plans) :]
    return status, {line.split("-")[0]: line.split(maxsplit=1)[1] for line in table}, out.getvalue()


def results(outdir: Path) -> dict[str, schema.Result]:
    return {run.dir.label: run.result for run in directory.runs(outdir)[0]}


@pytest.fixture
def four_gpus(monkeypatch):
    there = tuple(gpus.LocalGpu(index, "NVIDIA H200", f"GPU-{index}", 143771) for index in range(4))
    monkeypatch.setattr(gpus, "list_gpus", lambda: there)
    monkeypatch.setattr(gpus, "available", lambda wanted=None: wanted or (0, 1, 2, 3))
    monkeypatch.setattr(gpus, "driver_versions", lambda: ("580", "13.0"))


def test_a_chapter_runs_in_order_and_goes_on_after_a_failure(tmp_path):
    plans = [
        make_plan(tmp_path, "ok"),
        make_plan(tmp_path, "killed", id="102"),
        make_plan(tmp_path, "ok", id="103"),
    ]
    status, table, printed = run(*plans)
    assert status == 1
    assert [line.split()[0] for line in table.values()] == ["ok", "crash", "ok"]
    assert printed.startswith("3 of 3 experiments to run") and "SIGKILL" in printed
    started = {label: result.started for label, result in results(tmp_path).items()}
    assert sorted(started, key=started.get) == [
        "101-tiny-dp2_cpu",
        "102-tiny-dp2_cpu",
        "103-tiny-dp2_cpu",
    ]
    assert all(result.packed_with == () for result in results(tmp_path).values()), (
        "one at a time on a CPU"
    )


def test_what_has_a_result_is_skipped_and_what_failed_runs_again(tmp_path):
    run(make_plan(tmp_path, "ok"), make_plan(tmp_path, "killed", id="102"))
    plans = [
        make_plan(tmp_path, "ok"),
        make_plan(tmp_path, "ok", id="102"),
        make_plan(tmp_path, "ok", id="103", gbs=4),
    ]
    status, table, printed = run(*plans)
    assert status == 0 and printed.startswith("2 of 3")
    assert table["101"] == "ok        101-tiny-dp2_cpu has its result, FORCE=1 runs it again"
    assert table["102"] == "ok        102-tiny-dp2_cpu.2"

    status, table, printed = run(*plans)
    assert status == 0 and printed.startswith("0 of 3")

    changed = make_plan(tmp_path, "ok", id="103", gbs=2)
    assert run(changed)[2].startswith("1 of 1"), "another configuration has no result yet"
    assert run(changed, force=True)[2].startswith("1 of 1")


def test_small_runs_share_a_nodes_gpus(tmp_path, four_gpus):
    cuda = {"device": "cuda", "miniature": False}
    plans = [
        make_plan(tmp_path, "ok", ranks=3, step_s=0.05, **cuda),
        make_plan(tmp_path, "ok", ranks=4, id="102", **cuda),
        make_plan(tmp_path, "ok", ranks=1, step_s=0.1, id="103", **cuda),
        make_plan(tmp_path, "ok", ranks=8, id="104", **cuda),
        make_plan(tmp_path, "ok", ranks=2, id="105h", **cuda),
    ]
    status, table, _ = run(*plans)
    assert status == 0
    assert table["104"] == "skipped   it needs 8 GPUs, 4 are free here"
    assert (
        table["105h"]
        == "skipped   105 itself fits here; make 105h runs its half-size companion all the same"
    )
    found = results(tmp_path)
    large, whole, small = (
        found[label] for label in ("101-tiny-dp3", "102-tiny-dp4", "103-tiny-dp1")
    )
    assert (large.gpus, small.gpus, whole.gpus) == ((0, 1, 2), (3,), (0, 1, 2, 3))
    assert large.packed_with == ("103-tiny-dp1",) and small.packed_with == ("101-tiny-dp3",)
    assert whole.packed_with == () and whole.started >= max(large.finished, small.finished)
    assert "hello, 3 GPUs" in (tmp_path / "103-tiny-dp1" / "logs.txt").read_text()


def test_for_timing_runs_go_one_at_a_time(tmp_path, four_gpus):
    plans = [
        make_plan(tmp_path, "ok", ranks=1, id=i, device="cuda", miniature=False)
        for i in ("101", "102")
    ]
    status, *_ = run(*plans, pack=False)
    assert status == 0 and [r.packed_with for r in results(tmp_path).values()] == [(), ()]
    assert "imported at" in (tmp_path / "102-tiny-dp1" / "logs.txt").read_text(), (
        "while 101 had its GPU"
    )


def test_the_next_run_imports_while_one_has_the_gpus_and_counts_from_its_turn(tmp_path, four_gpus):
    cuda = {"device": "cuda", "miniature": False, "ranks": 4}
    plans = [make_plan(tmp_path, "ok", step_s=0.1, **cuda)]
    plans += [
        make_plan(tmp_path, behaviour, id=id_, **cuda)
        for id_, behaviour in (("102", "killed"), ("103", "ok"))
    ]
    status, table, _ = run(*plans)
    assert status == 1 and [line.split()[0] for line in table.values()] == ["ok", "crash", "ok"]
    found = results(tmp_path)
    first, second, third = (found[f"{id_}-tiny-dp4"] for id_ in ("101", "102", "103"))
    assert first.finished <= second.started and second.finished <= third.started
    assert [r.packed_with for r in (first, second, third)] == [(), (), ()]
    logs = [
        (tmp_path / f"{id_}-tiny-dp4" / "logs.txt").read_text() for id_ in ("101", "102", "103")
    ]
    imported = [re.search(r"imported at (\S+)", text) for text in logs]
    assert imported[0] is None and float(imported[1][1]) < first.finished
    assert not list(tmp_path.glob("*/turn"))


def test_a_run_that_never_had_its_turn_leaves_nothing(tmp_path, four_gpus, monkeypatch):
    asked = iter([None] * 30 + [signal.SIGTERM])
    monkeypatch.setattr(processes.Signals, "take", lambda self: next(asked, None))
    plans = [
        make_plan(tmp_path, "ok", id=i, ranks=4, step_s=1, device="cuda", miniature=False)
        for i in ("101", "102")
    ]
    status, table, _ = run(*plans)
    assert status == 128 + signal.SIGTERM
    assert table["101"].startswith("killed") and table["102"].startswith("not run")
    assert [path.name for path in tmp_path.iterdir()] == ["101-tiny-dp4"]
    assert not processes.marked(HARNESS_RUN_DIR=str(tmp_path / "102-tiny-dp4"))


def test_a_result_of_another_gpu_does_not_count(tmp_path, four_gpus, monkeypatch):
    plan = make_plan(tmp_path, "ok", ranks=1, device="cuda", miniature=False)
    run(plan)
    assert run(plan)[2].startswith("0 of 1")
    monkeypatch.setattr(
        gpus, "list_gpus", lambda: (gpus.LocalGpu(0, "NVIDIA B200", "GPU-0", 183359),)
    )
    assert run(plan)[2].startswith("1 of 1")


def test_what_cannot_run_here_is_skipped_with_its_reason(tmp_path):
    two_nodes = make_plan(tmp_path, "ok", nodes=2)

    def plan_for(experiment):
        if experiment.id == "102":
            raise UserError("102: data set x is not prepared\nmake data-x")
        return two_nodes

    out = io.StringIO()
    experiments = [two_nodes.experiment, make_plan(tmp_path, "ok", id="102").experiment]
    assert run_chapter(experiments, plan_for, terminal=PlainTerminal(out)) == 1, "nothing ran"
    lines = out.getvalue().splitlines()
    assert "skipped   it needs 2 nodes" in lines[-2] and lines[-1].endswith(
        "skipped   102: data set x is not prepared"
    )


def test_a_run_that_cannot_begin_is_told_and_the_next_goes_on(tmp_path):
    (tmp_path / "file").touch()
    status, table, _ = run(make_plan(tmp_path / "file", "ok"), make_plan(tmp_path, "ok", id="102"))
    assert (
        status == 1
        and table["101"].startswith(f"not run   cannot write to {tmp_path}/file")
        and table["102"].startswith("ok")
    )


def test_running_out_of_memory_as_published_is_a_success(tmp_path, four_gpus):
    published = load_references().published
    oom = next(
        row.id
        for row in published.rows
        if row.oom and row.id and not row.in_doubt and row.stands_for == row.id
    )
    fits = next(
        row.id for row in published.rows if not row.oom and row.id and row.stands_for == row.id
    )
    cuda = {"device": "cuda", "miniature": False, "card": "h100-80gb"}
    as_published = make_plan(tmp_path, "oom", ranks=1, id=oom, chapter=int(oom[0]) * 100, **cuda)
    status, table, _ = run(as_published)
    assert (status, table[oom]) == (0, f"oom       as published; {oom}-tiny-dp1")
    otherwise = make_plan(tmp_path, "oom", ranks=1, id=fits, chapter=int(fits[0]) * 100, **cuda)
    assert run(otherwise)[0] == 1


def test_a_half_runs_out_of_memory_where_its_whole_did_as_published(tmp_path, four_gpus):
    cuda = {"device": "cuda", "miniature": False, "card": "h100-80gb"}
    for half, status in (("281h", 0), ("282h", 1)):
        found, table, _ = run(make_plan(tmp_path, "oom", ranks=4, id=half, chapter=200, **cuda))
        assert (found, table[half].startswith("oom       as published; ")) == (status, status == 0)


CHAPTER = """
import importlib.util, sys
from pathlib import Path
from harness.launching.chapter import run_chapter
spec = importlib.util.spec_from_file_location("launcher", sys.argv[1])
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
plans = {i: launcher.make_plan(Path(sys.argv[2]), "ok", 2, 1000, 0.05, id=i) for i in ("101", "102")}
sys.exit(run_chapter([p.experiment for p in plans.values()], lambda e: plans[e.id]))
"""


def test_ctrl_c_ends_the_chapter(tmp_path):
    command = [sys.executable, "-c", CHAPTER, LAUNCHER, tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    chapter = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    run_dir = directory.RunDir(tmp_path / "out" / "101-tiny-dp2_cpu")
    deadline = time.monotonic() + 20
    while len(run_dir.read_metrics()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    chapter.send_signal(signal.SIGINT)
    printed, _ = chapter.communicate(timeout=20)
    assert chapter.returncode == 130
    assert run_dir.read_result().status == "killed" and len(results(tmp_path / "out")) == 1
    assert [line.split()[1] for line in printed.splitlines()[-2:]] == ["killed", "not"]
    assert not processes.marked(HARNESS_RUN_DIR=str(run_dir.path))
