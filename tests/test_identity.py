"""A run is what it froze, not what it is called: which run is resumed, loaded, recorded, compared; and what differs is said."""

import importlib.util
import io
import json
import os
import shlex
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness import ROOT, cli
from harness.errors import UserError
from harness.evidence import records
from harness.evidence.references import load_references
from harness.evidence.results import collect
from harness.experiment import command_line, extra_arguments, identity, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.launching import commands, failed_load, launch, processes, run_files, verify
from harness.launching.active_run import Finished
from harness.launching.terminal import PlainTerminal
from harness.machine.provenance import describe_upstream
from harness.planning import run_to_resume
from harness.planning.plan import Plan, plan
from harness.planning.script import Extras
from harness.run import checkpoint_list, finding, schema, writing
from harness.run.checkpoints import FAILED, TRACKER, Loading, Saving
from harness.run.directory import RunDir
from harness.run.schema import Change, Result, StepMetrics
from harness.run.step_statistics import measure
from harness.system import locks
from harness.system.files import write_json


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle looks for its classes
    spec.loader.exec_module(module)
    return module


CHECKPOINTS = load("test_checkpoints")
TINY, run_in, write = CHECKPOINTS.TINY, CHECKPOINTS.run_in, CHECKPOINTS.write
RECORDS = ROOT / "experiments" / "records"
CLIP = {"ARGS": "--clip-grad 10"}


def planned(outdir: Path, id_: str = "101", **settings: str) -> Plan:
    return plan(load_catalog().find(id_), TINY | {"OUTDIR": str(outdir)} | settings, "cpu")


def kept(outdir: Path, id_: str = "101", *steps: int, **settings: str) -> RunDir:
    """A run of ``settings`` that keeps the checkpoints of ``steps``."""
    run = run_in(outdir, planned(outdir, id_, **settings).experiment)
    for step in steps:
        write(run.checkpoints, step)
    return run


def test_every_field_of_an_experiment_has_its_place():
    """A new field is one of what a step computes, of how it is computed, or of names: whoever adds it says which."""
    groups = [
        identity.NAMES,
        identity.KEEPING,
        identity.NEUTRAL.keys(),
        identity.CURVE.keys(),
        identity.COMPARED_ELSEWHERE,
    ]
    assert sorted(name for group in groups for name in group) == sorted(Experiment.model_fields)
    settings = {s.key for s in command_line.EXPERIMENT_SETTINGS}
    named = {s for s in (*identity.NEUTRAL.values(), *identity.CURVE.values()) if s.isupper()}
    assert named <= settings and settings - named <= {
        "ARGS",
        "DROPOUT",
        "GPUS",
        "LORA_ALPHA",
        "LORA_DROPOUT",
        "LORA_TARGETS",
        "MTP",
    }


@pytest.mark.parametrize("settings, setting, curve", [
    ({"ARGS": "--weight-decay 0.2"}, "ARGS --weight-decay", True), ({"ARGS": "--seed 7"}, "ARGS --seed", True),
    ({"ARGS": "--log-interval 5"}, "ARGS --log-interval", False), ({"ARGS": "--lr 1e-3"}, "LR", True),
    ({"LR": "1e-3"}, "LR", True), ({"MIN_LR": "1e-7"}, "MIN_LR", True), ({"LR_WARMUP": "3"}, "LR_WARMUP", True),
    ({"LR_DECAY": "linear"}, "LR_DECAY", True), ({"DROPOUT": "0"}, "DROPOUT", True), ({"GBS": "2"}, "GBS", True),
    ({"SEQ": "16"}, "SEQ", True), ({"SPLIT": "900,50,50"}, "SPLIT", True),
    ({"STEPS": "21"}, "STEPS", False), ({"DP": "2", "GBS": "2"}, "DP", False), ({"TP": "5"}, "TP", False), ({"PP": "2"}, "PP", False),
    ({"SHARDING": "optim"}, "SHARDING", False), ({"RECOMPUTE": "full"}, "RECOMPUTE", False), ({"UNTIL": "3"}, "UNTIL", False),
    ({"EVAL_EVERY": "7"}, "EVAL_EVERY", False), ({"PROFILE": "1"}, "PROFILE", False), ({"CUDA_GRAPHS": "1"}, "CUDA_GRAPHS", False),
])  # fmt: skip
def test_what_differs_is_named_and_whether_it_changes_the_losses(
    tmp_path, settings, setting, curve
):
    row = load_catalog().find("101")
    before, now = (overrides.apply(row, TINY_OF_ROW | s) for s in ({}, settings))
    found = next(d for d in identity.differences(before, now) if d.setting == setting)
    assert found.curve is curve and found.before != found.now
    assert not identity.same(before, now) and not identity.differences(now, now)


TINY_OF_ROW = {"STEPS": "20"}


def test_a_schedule_that_follows_the_steps_changes_with_them():
    row = load_catalog().find("101")
    published = [overrides.apply(row, {"STEPS": steps}) for steps in ("20", "40")]
    assert [d.setting for d in identity.differences(*published)] == ["STEPS"]
    own = [overrides.apply(row, {"STEPS": steps, "LR": "1e-3"}) for steps in ("20", "40")]
    assert [(d.setting, d.curve) for d in identity.differences(*own)] == [
        ("steps of the learning rate's decay", True),
        ("STEPS", False),
    ]


def test_the_same_said_in_another_way_is_the_same():
    row = load_catalog().find("101")
    plain = with_changes(row, lr=1e-3)
    assert identity.same(
        plain,
        with_changes(
            plain, min_lr=1e-4, slug="other", shows="else", overrides={"LR": "1e-3"}, keep=3
        ),
    )
    words = [
        with_changes(row, extra_args=tuple(shlex.split(args)))
        for args in (
            "--seed 7 --clip-grad 2",
            "--clip-grad 2 --seed=7",
            "--seed 1 --clip-grad 2 --seed 7",
            "--clip-grad 2 --seed 8",
        )
    ]
    assert [identity.same(words[0], other) for other in words] == [True, True, True, False]
    assert extra_arguments.by_option(("--moe", "--layers", "1", "-2", "--moe")) == {
        "--layers": ("1", "-2"),
        "--moe": (),
    }


@pytest.mark.parametrize("key, first, second", [
    ("ARGS", "--clip-grad 10", "--clip-grad 0.001"), ("LOAD", "/a/b", "/a-b"), ("DATA", "one two", "one-two"),
    ("LOAD", "/" + "x" * 300, "/" + "x" * 299 + "y"),
])  # fmt: skip
def test_labels_of_different_experiments_differ(tmp_path, key, first, second):
    row = load_catalog().find("101")
    labels = [
        with_changes(row, overrides={"STEPS": "20", key: value}).label for value in (first, second)
    ]
    assert labels[0] != labels[1] and all(
        label.startswith("101-gpt2xl-dp1-gbs1-bf16_steps20_") for label in labels
    )
    for label in labels:
        writing.create(tmp_path, label)
    assert (
        with_changes(row, overrides={"SPLIT": "9,1", "LR": "1e-3"}).label
        == "101-gpt2xl-dp1-gbs1-bf16_split9,1_lr1e-3"
    )


def test_resume_takes_the_run_of_the_same_arguments_though_another_is_newer(tmp_path):
    first, second = (
        kept(tmp_path, "101", 5, **CLIP),
        kept(tmp_path, "101", 10, ARGS="--clip-grad 0.001"),
    )
    os.utime(first.experiment_json, (1e9, 1e9))
    found = planned(tmp_path, RESUME="1", **CLIP)
    assert (found.resumes, found.first_step, found.changed) == (first, 5, ())
    assert planned(tmp_path, RESUME="1", ARGS="--clip-grad 0.001").resumes == second


def test_a_label_of_before_is_found_by_what_the_run_froze(tmp_path):
    old = kept(tmp_path, "101", 5, **CLIP)
    bare = tmp_path / "101-gpt2xl-dp1-gbs1-bf16_steps20_args_cpu"
    old.path.rename(bare)
    assert planned(tmp_path, RESUME="1", **CLIP).resumes == RunDir(bare)


@pytest.mark.parametrize("settings, said", [
    ({"ARGS": "--clip-grad 0.001"}, "  ARGS --clip-grad 10 -> 0.001"), ({}, "  ARGS --clip-grad 10 -> not given"),
    (CLIP | {"DROPOUT": "0"}, "  DROPOUT 0.1 -> 0"), (CLIP | {"GBS": "2"}, "  GBS 1 -> 2"), (CLIP | {"SPLIT": "8,1,1"}, "  SPLIT 949,50,1 -> 8,1,1"),
    ({"ARGS": "--clip-grad 10 --seed 7"}, "  ARGS --seed not given -> 7"), (CLIP | {"LR_DECAY": "linear"}, "  LR_DECAY cosine -> linear"),
])  # fmt: skip
def test_what_changes_the_losses_is_refused_named_and_taken_where_asked(tmp_path, settings, said):
    run = kept(tmp_path, "101", 5, **CLIP)
    with pytest.raises(UserError) as refused:
        planned(tmp_path, RESUME="1", **settings)
    assert (
        f"RESUME=1: {run.label} ran with other settings, which change its losses:\n{said}\n"
        in str(refused.value)
    )
    assert "FORCE=1 resumes with these" in str(refused.value) and f"LOAD={run.label}" in str(
        refused.value
    )
    found = planned(tmp_path, RESUME="1", FORCE="1", **settings)
    assert found.resumes == run and any(d.curve for d in found.changed)
    assert any(notice.endswith("from step 6 on: FORCE=1") for notice in found.notices)


@pytest.mark.parametrize(
    "settings", [{"LR": "1e-3"}, {"ARGS": "--lr 1e-3"}, {"ARGS": "--clip-grad 10 --min-lr 1e-7"}]
)
def test_other_rates_are_refused_even_where_asked_for_upstream_finds_its_optimizer_by_them(
    tmp_path, settings
):
    kept(tmp_path, "101", 5, **CLIP)
    with pytest.raises(UserError, match=r"change its losses:\n(.*\n)?  (LR|MIN_LR) ") as refused:
        planned(tmp_path, RESUME="1", **settings)
    assert "FORCE=1" not in str(refused.value) and "by its learning rates" in str(refused.value)
    with pytest.raises(
        UserError,
        match=r"was trained with LR=6e-05 MIN_LR=6e-06, 101-\S+ has LR=.*\n.*--no-load-optim",
    ):
        planned(tmp_path, RESUME="1", FORCE="1", **settings)


def test_layout_length_and_saving_may_change_and_that_is_said(tmp_path):
    run = kept(tmp_path, "101", 5)
    found = planned(
        tmp_path, RESUME="1", PP="2", STEPS="30", EVAL_EVERY="3", SAVE_EVERY="2", KEEP="7"
    )
    assert (found.resumes, found.first_step, found.extras.saving) == (run, 5, Saving(2, 7))
    assert found.notices == (
        "PP was 1 and is 2 from step 6 on",
        "STEPS was 20 and is 30 from step 6 on",
        "EVAL_EVERY was 50 and is 3 from step 6 on",
    )
    with pytest.raises(
        UserError, match=r"checkpoint of step 5, and STEPS=4\nSTEPS=10 trains as long again"
    ):
        planned(tmp_path, RESUME="1", STEPS="4")


def test_the_one_of_several_that_is_meant_must_be_named(tmp_path):
    full, pp = kept(tmp_path, "101", 5, RECOMPUTE="full"), kept(tmp_path, "101", 10, PP="2")
    with pytest.raises(UserError) as refused:
        planned(tmp_path, RESUME="1")
    assert str(refused.value).startswith("101: 2 different experiments ran under this id:\n")
    assert f"\n  {full.label}  (" in str(refused.value) and f"\n  {pp.label}" in str(refused.value)
    assert str(refused.value).endswith("RESUME=label names the one to resume")
    assert (
        planned(tmp_path, RESUME=full.label).resumes == full
        and planned(tmp_path, RESUME="1", PP="2").resumes == pp
    )
    with pytest.raises(
        UserError,
        match=f"RESUME=nothing: expected 0, 1 or auto, or the label of a run in {tmp_path}; .*101-",
    ):
        planned(tmp_path, RESUME="nothing")
    other = kept(tmp_path, "111", 5)
    with pytest.raises(
        UserError,
        match=f"RESUME={other.label}: that is a miniature of 111 on a CPU, and this is a miniature of 101",
    ):
        planned(tmp_path, RESUME=other.label)


def test_a_run_of_a_gpu_is_not_continued_as_a_miniature(tmp_path):
    run = kept(tmp_path, "101", 5)
    write_as(run, device="cuda", miniature=False)
    with pytest.raises(UserError, match="RESUME=1: there is no run 101-"):
        planned(tmp_path, RESUME="1")


def write_as(run: RunDir, **fields: object) -> None:
    run.experiment_json.write_text(json.dumps(json.loads(run.experiment_json.read_text()) | fields))


@pytest.mark.parametrize("left", ["damaged", "gone", "tracker"])
def test_resume_never_begins_anew_where_checkpoints_were(tmp_path, capsys, left):
    run = kept(tmp_path, "101")
    if left == "damaged":
        (write(run.checkpoints, 5) / "metadata.json").write_bytes(b"")
    elif left == "gone":
        run.saves.write_text(SAVE + "\n")
    else:
        run.checkpoints.mkdir()
        (run.checkpoints / TRACKER).write_text("")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert (
        cli.main(
            ["run", "101", "DEVICE=cpu", "DATA=mock", "STEPS=20", "RESUME=1", f"OUTDIR={tmp_path}"]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert (
        f"{run.label} kept checkpoints in {run.checkpoints}, and none of them can be used:\n  "
        in said
    )
    assert "put one back there from a copy; without RESUME= a new run begins" in said
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


SAVE = '{"step": 5, "asynchronous": true, "blocked_ms": 1, "whole_after_s": 1, "whole_at_step": 6, "gib": 0.1, "time": 0}'


def test_a_run_that_was_killed_in_its_first_save_begins_anew_and_says_so(tmp_path):
    run = kept(tmp_path, "101")
    (write(run.checkpoints, 5) / "metadata.json").unlink()
    (run.checkpoints / TRACKER).unlink()
    found = planned(tmp_path, RESUME="1")
    assert (
        found.first_step == 0
        and found.notices[-1]
        == f"{run.label} was ended before its first checkpoint: it begins anew at step 1"
    )


@pytest.mark.parametrize("settings, said", [
    ({"SAVE": "0"}, "SAVE=0: 101-.* keeps checkpoints, and RESUME= could not resume it once more"),
    ({"SAVE": "elsewhere"}, "SAVE=elsewhere: 101-.* keeps its checkpoints in .*/checkpoints, where RESUME= looks for them"),
])  # fmt: skip
def test_a_resumed_run_keeps_its_checkpoints_where_they_are(tmp_path, settings, said):
    run = kept(tmp_path, "101", 5)
    with pytest.raises(UserError, match=said):
        planned(tmp_path, RESUME="1", **settings)
    for where in ("1", str(run.checkpoints)):
        assert planned(tmp_path, RESUME="1", SAVE=where).extras.saving == Saving(5, 2)


def test_a_further_node_resumes_the_run_that_node_0_has_locked(tmp_path):
    there = {"DP": "2", "GBS": "2", "NODES": "2", "RENDEZVOUS": "a:1"}
    run = kept(tmp_path, "101", 5, **there)
    locks.take(run.path)
    with pytest.raises(UserError, match=r"RESUME=1: 101-\S+ still runs"):
        planned(tmp_path, RESUME="1", NODE_RANK="0", **there)
    assert planned(tmp_path, RESUME="1", NODE_RANK="1", **there).resumes == run


def test_a_run_that_kept_none_is_not_resumed_whatever_save_says(tmp_path):
    """Its curve would be cut off and begin anew."""
    e = planned(tmp_path).experiment
    run = writing.create(tmp_path, e.label)
    run.freeze_experiment(e, "cpu", None)
    with pytest.raises(UserError, match="kept no checkpoints, there is nothing to resume from"):
        planned(tmp_path, RESUME="1", SAVE="1")


def test_a_torn_result_does_not_keep_a_run_from_being_resumed(tmp_path, capsys):
    run = kept(tmp_path, "101", 5)
    run.result.write_text('{"status": "o')
    assert planned(tmp_path, RESUME="1").first_step == 5


def test_a_finished_run_resumes_where_more_steps_are_wanted(tmp_path, capsys):
    run = run_in(tmp_path, planned(tmp_path).experiment, result="ok")
    write(run.checkpoints, 20)
    words = ["run", "101", "DEVICE=cpu", "DATA=mock", f"OUTDIR={tmp_path}", "RESUME=1"]
    assert (
        cli.main([*words, "STEPS=20"]) == 0
        and f"{run.label}: ok, 20 of 20 steps" in capsys.readouterr().out
    )
    assert cli.main([*words, "STEPS=40", "DRY_RUN=1"]) == 0
    assert "--train-iters 40" in (script := capsys.readouterr().out) and "--ckpt-step 20" in script
    assert commands._finished_before(planned(tmp_path, RESUME="1", STEPS="40")) is None


def test_steps_before_a_change_are_not_averaged_with_those_behind_it():
    e = with_changes(load_catalog().find("101"), steps=30)
    metrics = [
        StepMetrics(step=n, loss=7, step_ms=100 if n <= 10 else 50, time=0) for n in range(1, 31)
    ]
    assert measure(e, metrics, None)["window"] == (6, 30)
    change = Change(step=10, setting="TP", before="1", now="2", work=True)
    found = measure(e, metrics, None, [change])
    assert found["window"] == (16, 30) and found["step_ms"].median == 50
    assert measure(
        e, metrics, None, [change.model_copy(update={"setting": "STEPS", "work": False})]
    )["window"] == (6, 30)


def test_train_resumes_its_own_words_only(tmp_path, monkeypatch):
    resumed = []

    def find(fitted):
        resumed.append(find_run(fitted))
        raise UserError("asked")

    find_run = run_to_resume.find
    monkeypatch.setattr(run_to_resume, "find", find)
    own = kept(tmp_path, "604", 30, LR="2e-3")
    for lr, resumes in (("2e-3", own), ("1e-3", None)):
        cli.main(
            [
                "train",
                "604",
                "DEVICE=cpu",
                "DATA=mock",
                "STEPS=20",
                f"LR={lr}",
                f"OUTDIR={tmp_path}",
            ]
        )
        assert (resumed[-1] and resumed[-1].run) == resumes
    cli.main(
        [
            "train",
            "604",
            "DEVICE=cpu",
            "DATA=mock",
            "STEPS=20",
            "LR=2e-3",
            f"OUTDIR={tmp_path}",
            f"SAVE={own.checkpoints}",
        ]
    )
    assert resumed[-1].run == own


def test_resume_auto_begins_a_run_where_there_is_none_to_resume(tmp_path):
    asked = {"OUTDIR": str(tmp_path), "DATA": "mock", "SAVE": "1", "RESUME": "auto"}
    row = load_catalog().find("101")
    assert plan(row, asked, "cpu").resumes is None
    with pytest.raises(UserError, match="RESUME=auto starts it where there is none"):
        plan(row, asked | {"RESUME": "1"}, "cpu")
    other = kept(tmp_path, "101", 5, **CLIP)
    assert plan(row, asked, "cpu").resumes is None, f"{other.label} has other losses"
    without = run_in(tmp_path, planned(tmp_path, "101").experiment)
    own = run_in(tmp_path, planned(tmp_path, "101").experiment)
    own.freeze_experiment(own.read_experiment(), "cpu", None, Saving(5))
    assert plan(row, asked, "cpu").resumes == own, f"{without.label} keeps no checkpoints"


def test_a_job_that_starts_again_resumes_its_own_run(tmp_path, monkeypatch):
    """Also where another run of the same settings is newer, and whatever RESUME= says."""
    row, asked = load_catalog().find("101"), {"OUTDIR": str(tmp_path), "DATA": "mock", "SAVE": "1"}
    own, other = kept(tmp_path, "101"), kept(tmp_path, "101")
    for run, number in ((own, "77"), (other, "78")):
        run.freeze_experiment(run.read_experiment(), "cpu", None, Saving(5))
        started = {"pid": 1, "host": "h", "started": 1.0, "job": number}
        write_json(run.running, started)
    monkeypatch.setenv("HARNESS_JOB", "77")
    assert plan(row, asked, "cpu").resumes == own
    assert plan(row, asked | {"RESUME": "1"}, "cpu").resumes == own
    monkeypatch.setenv("HARNESS_JOB", "79")
    assert plan(row, asked, "cpu").resumes is None


def test_a_chapter_is_not_resumed_as_one(tmp_path, capsys):
    assert cli.main(["chapter", "100", "RESUME=1", f"OUTDIR={tmp_path}"]) == 2
    assert "RESUME=1 is for one experiment" in capsys.readouterr().err


def test_an_id_that_stands_for_different_experiments_is_refused_and_of_one_the_newest_is_taken(
    tmp_path,
):
    older, newer = kept(tmp_path, "101", 5), kept(tmp_path, "101", 10)
    assert finding.label_of("101", tmp_path) == newer.label
    os.utime(older.experiment_json)
    assert finding.label_of("101", tmp_path) == older.label
    kept(tmp_path, "101", **CLIP)  # has no checkpoint
    assert finding.label_of("101", tmp_path) == older.label
    write(kept(tmp_path, "101", **CLIP).checkpoints, 5)
    with pytest.raises(
        UserError,
        match=r"(?s)101: 2 different experiments ran.*\(ARGS --clip-grad not given\)\nname one of them by its label",
    ):
        finding.label_of("101", tmp_path)


def resuming(outdir: Path, run: RunDir, behaviour: str, step: int, **changes: object) -> Plan:
    """A plan that resumes ``run`` after ``step``, with test_launch's stand-in for torchrun."""
    extras = Extras(run.read_saving(), Loading(run.checkpoints, step))
    e = run.read_experiment()
    plan_ = load("test_launch_assets/launcher").make_plan(
        outdir, behaviour, 1, 20, resumes=run, extras=extras, **changes
    )
    return replace(plan_, experiment=e, full=e)


def finished(plan: Plan) -> tuple[Finished, str]:
    out = io.StringIO()
    return launch.run_plan(plan, terminal=PlainTerminal(out)), " ".join(out.getvalue().split())


def test_a_checkpoint_that_fails_to_load_is_marked_and_the_next_resume_takes_the_one_before(
    tmp_path,
):
    run = kept(tmp_path, "101", 5, 10)
    write_json(run.environment, {"upstream": describe_upstream().model_dump(mode="json")})
    done, said = finished(resuming(tmp_path, run, "load-fails", 10))
    assert (done.result.status, done.exit_status) == ("crash", 1)
    assert (
        "-> the checkpoint of step 10 could not be loaded and is marked: RESUME=1 falls back to that of step 5"
        in said
    )
    again = planned(tmp_path, RESUME="1")
    assert again.first_step == 5 and again.notices[0].startswith(
        "checkpoint of step 10 skipped: it could not be loaded (CheckpointException: _pickle.UnpicklingError: Unsupported operand 0); rm "
    )
    assert "no earlier one is complete" in finished(resuming(tmp_path, run, "load-fails", 5))[1]
    with pytest.raises(
        UserError,
        match=r"(?s)none of them can be used:\n  checkpoint of step 10 skipped: .*\n  checkpoint of step 5 skipped: ",
    ):
        planned(tmp_path, RESUME="1")
    (run.checkpoints / "iter_0000005" / FAILED).unlink()
    assert planned(tmp_path, RESUME="1").first_step == 5


@pytest.mark.parametrize("spared", ["settings", "upstream", "program", "elsewhere", "memory"])
def test_a_checkpoint_is_not_marked_for_what_its_bytes_are_not_to_blame_for(tmp_path, spared):
    run = kept(tmp_path, "101", 5)
    before = describe_upstream().model_copy(
        update={"commit": "another"} if spared == "upstream" else {}
    )
    changed = (identity.Difference("TP", "1", "2", curve=False),) if spared == "settings" else ()
    plan_ = resuming(tmp_path, run, "load-fails", 5, changed=changed)
    trace = "in train_step\n" if spared == "elsewhere" else 'File "x", line 2, in load_checkpoint\n'
    kind = "AssertionError" if spared == "program" else "RuntimeError"
    error = schema.RankError(rank=0, type=kind, message="m", traceback=trace, time=0)
    status = "oom" if spared == "memory" else "crash"
    content = {
        "status": status,
        "exit_code": 1,
        "started": 0,
        "finished": 1,
        "steps": 20,
        "steps_done": 5,
        "data": "mock",
        "device": "cpu",
    }
    result = Result.model_validate(content | {"upstream": describe_upstream().model_dump()})
    assert failed_load.mark(plan_, result, [error], before) == result
    assert not list(run.checkpoints.glob(f"*/{FAILED}"))


def test_a_run_whose_directory_is_deleted_ends_with_a_plain_error(tmp_path):
    plan_ = load("test_launch_assets/launcher").make_plan(tmp_path / "out", "ok", 2, 1000, 0.05)

    def delete() -> None:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "out").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "out").rename(
            tmp_path / "gone"
        )  # ranks still write: rmtree alone would find it not empty
        shutil.rmtree(tmp_path / "gone")

    deleting = threading.Thread(target=delete)
    deleting.start()
    with pytest.raises(
        UserError,
        match=r"101-tiny-dp2_cpu was deleted during the run: the run was ended after step \d+",
    ):
        finished(plan_)
    deleting.join()
    assert not processes.marked(HARNESS_RUN_DIR=str(tmp_path / "out" / "101-tiny-dp2_cpu"))


def test_compare_takes_the_newest_run_of_this_checkout_before_a_record(tmp_path):
    older, newer = (run_in(tmp_path, planned(tmp_path).experiment, result="ok") for _ in range(2))
    for started, run in enumerate((older, newer)):
        write_json(run.result, json.loads(run.result.read_text()) | {"started": started})
    found = collect(tmp_path, RECORDS, load_references())
    assert any(row.id == "101" and row.kind == "record" for row in found.rows)
    assert found.find("101").label == newer.label and found.find("104").kind == "record"
    assert found.find("h200-141gb/101").kind == "record"
    other = run_in(tmp_path, planned(tmp_path, **CLIP).experiment, result="ok")
    assert collect(tmp_path, RECORDS, load_references()).find("101").label == newer.label, (
        "the row's own work"
    )
    for run in (older, newer):
        shutil.rmtree(run.path)
    assert collect(tmp_path, RECORDS, load_references()).find("101").label == other.label
    run_in(tmp_path, planned(tmp_path, ARGS="--clip-grad 0.001").experiment, result="ok")
    with pytest.raises(
        UserError,
        match=r"(?s)101: 2 different experiments ran under this id:\n.*\(ARGS --clip-grad .*\nname one of them",
    ):
        collect(tmp_path, RECORDS, load_references()).find("101")


def test_the_list_of_checkpoints_of_an_id_shows_every_run_of_it(tmp_path, capsys):
    labels = [kept(tmp_path, "101", 5, **settings).label for settings in ({}, CLIP)]
    kept(tmp_path, "111", 5)
    assert checkpoint_list.print_list(tmp_path, "101") == 0
    assert sorted(
        line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")
    ) == sorted(labels)


def test_a_record_is_replaced_by_one_of_the_same_work_whatever_both_are_called(tmp_path):
    records_of = load("test_records")
    experiment = json.loads((records_of.KEPT / "101.json").read_text())["experiment"]

    def recorded(label: str, *words: str) -> str:
        changed = experiment | {"overrides": {"ARGS": " ".join(words)}, "extra_args": list(words)}
        return records.record(
            records_of.run_of(tmp_path, label, experiment=changed), tmp_path / "records"
        ).name

    names = [
        recorded("a", "--clip-grad", "1"),
        recorded("b", "--clip-grad", "2"),
        recorded("c", "--clip-grad=1"),
    ]
    assert names == ["101_args.json", "101_args.2.json", "101_args.json"]
    (tmp_path / "records" / "h200-141gb" / "101_args.json").write_text("{")
    assert recorded("d", "--seed", "3") == "101_args.3.json", "what is damaged is not overwritten"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/*.json")), ids=lambda path: path.stem)
def test_a_kept_record_is_found_as_that_of_its_own_work(path):
    experiment, result, environment = records.read(path)
    sitting = records.Sitting.of(environment, result.started)
    assert records._stem(experiment, path.parent, sitting) == path.stem
    assert [
        other.stem
        for other in path.parent.glob(f"{experiment.id}*.json")
        if records._is_of(other, experiment, sitting)
    ] == [path.stem]


def test_a_run_of_two_experiments_is_no_record_and_says_why(tmp_path):
    records_of = load("test_records")
    change = {"step": 40, "setting": "TP", "before": "1", "now": "2", "curve": False, "work": True}
    run = records_of.run_of(tmp_path, changed=[change])
    with pytest.raises(
        UserError,
        match=r"is of more than one experiment: TP 1 -> 2 after step 40\na record is of one: run it again",
    ):
        records.record(run, tmp_path / "records")


def test_verify_takes_the_newest_run_of_the_records_work(tmp_path):
    """A run that has no result yet, or is of other work, is not the one that an id means."""
    records_of = load("test_records")
    experiment = json.loads((records_of.KEPT / "101.json").read_text())["experiment"]
    own = records_of.run_of(tmp_path, "own")
    newer = {"started": 2e9, "finished": 2e9 + 60}
    records_of.run_of(
        tmp_path, "other", experiment=experiment | {"extra_args": ["--clip-grad", "2"]}, **newer
    )
    records_of.run_of(tmp_path, "unfinished").result.unlink()
    found = verify._read("101", tmp_path / "outdir", own.read_experiment())
    assert found.label == "own"


def test_data_prepared_anew_under_the_same_name_are_other_data(tmp_path, monkeypatch):
    run = kept(tmp_path, "101", 5)
    write_as(run, data_sets={"mine": {"tokens": 10, "bin ends": "a"}})
    now = {"tokens": 10, "bin ends": "a"}
    monkeypatch.setattr(run_to_resume.fingerprint, "of", lambda data: {"mine": now})
    assert planned(tmp_path, RESUME="1").changed == ()
    now |= {"tokens": 12, "bin ends": "b"}
    with pytest.raises(
        UserError,
        match=r"which change its losses:\n  the contents of DATA=mine tokens 10 -> tokens 12\n",
    ):
        planned(tmp_path, RESUME="1")
    now |= {"tokens": 10}
    assert (
        "the contents of DATA=mine was bin ends a and is bin ends b from step 6 on: FORCE=1"
        in planned(tmp_path, RESUME="1", FORCE="1").notices
    )


def test_a_run_freezes_what_its_data_are(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files.fingerprint, "of", lambda data: {data: {"tokens": 10}})
    run = finished(load("test_launch_assets/launcher").make_plan(tmp_path, "ok", 1, 1))[0].dir
    assert run.read_data_sets() == {"mock": {"tokens": 10}}


FILES = (
    "experiment.json",
    "result.json",
    "environment.json",
    "running.json",
    "metrics.jsonl",
    "validation.jsonl",
    "saves.jsonl",
    "ranks/0.json",
    "ranks/0.error.json",
    "lock",
    "checkpoints/iter_0000005/load_failed.json",
    "checkpoints/" + TRACKER,
)
TORN = {
    "empty": "",
    "NUL": "\0" * 40,
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "deep": '{"a":' + "[" * 3000,
    "torn": None,
}
SHAPES = {
    "saving": (
        1,
        "x",
        [],
        {"every": 1},
        {"every": "x", "keep": None, "folder": None},
        {"every": 0, "keep": -1, "folder": 3},
    ),
    "changed": (1, "x", {}, [1], [{"step": "x"}]),
    "data_sets": (1, [], {"mock": 3}),
    "model": ("x", None, {"name": 1}),
    "device": (3, None),
    "steps": ("x", None, -1),
    "extra_args": ("--lr 1", [1]),
    "overrides": ([], {"ARGS": 1}),
    "upstream": (1, [], {"version": 1}),
    "window": (1, [1], ["a", "b"]),
    "step_ms": (1, "x", {"median": None}),
    "status": ("x", 1),
    "memory_gib": (1, []),
    "started": ("x", None, True),
    "resumed_at": ("x", [None]),
}


def readers(outdir: Path, label: str) -> list[list[str]]:
    tiny = [f"{key}={value}" for key, value in TINY.items()]
    return [
        ["table", "FORMAT=json"],
        ["compare", "A=101", f"B={label}"],
        ["checkpoints"],
        ["checkpoints", "RUN=101"],
        ["record", f"RUN={label}"],
        ["run", "101", *tiny, "RESUME=1", "DRY_RUN=1"],
        ["run", "101", *tiny, f"RESUME={label}", "DRY_RUN=1"],
        ["run", "101", *tiny, "LOAD=101", "DRY_RUN=1"],
        ["profile", f"RUN={label}"],
        ["stop"],
        ["report"],
        ["clean", "YES=1"],
    ]


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_of_a_run_holds_every_reader_ends_with_plain_words(
    tmp_path, capsys, monkeypatch, name
):
    for module in ("evidence.tables", "evidence.records", "profiling.profile", "pages.report.page"):
        monkeypatch.setattr(f"harness.{module}.RECORDS", tmp_path / "records")
    run = whole_run(tmp_path / "out")
    path = run.path / name
    before = path.read_text() if path.exists() else "{}"
    contents = [before[: len(before) // 2] if text is None else text for text in TORN.values()]
    known = json.loads(before) if path.suffix == ".json" else None
    contents += [
        json.dumps(known | {key: shape})
        for key in SHAPES
        if known and key in known
        for shape in SHAPES[key]
    ]
    contents += (
        [f"{before}{line}" for line in ('{"step": "x"}\n', "[]\n", '{"step": 3, "lo')]
        if path.suffix == ".jsonl"
        else []
    )
    for number, content in enumerate(contents):
        words = readers(tmp_path / "out", run.label)
        for command in (
            words
            if number in (0, len(TORN) - 1)
            else [words[n % len(words)] for n in range(number, number + 2)]
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            assert cli.main([*command, f"OUTDIR={tmp_path / 'out'}"]) in (0, 1, 2), (
                command,
                content,
            )
            if not run.path.exists():  # make clean had reason to
                run = whole_run(tmp_path / "out")
    assert "Traceback" not in capsys.readouterr().err


def whole_run(outdir: Path) -> RunDir:
    """A run with every file that a run directory holds."""
    run = run_in(outdir, planned(outdir).experiment, result="ok")
    write(run.checkpoints, 5)
    write_as(
        run,
        changed=[{"step": 3, "setting": "STEPS", "before": "1", "now": "2"}],
        data_sets={"mock": {"tokens": 1}},
    )
    write_json(
        run.environment,
        {"upstream": describe_upstream().model_dump(mode="json"), "gpu": None, "commit": None},
    )
    write_json(run.running, {"pid": 1, "host": "elsewhere", "started": 0.0, "resumed_at": [3]})
    write_json(run.ranks / "0.json", {"rank": 0, "local_rank": 0, "pid": 1, "host": "elsewhere"})
    run.saves.write_text(SAVE + "\n")
    run.validation.write_text('{"step": 4, "split": "validation", "loss": 6.9, "time": 0}\n')
    return run
