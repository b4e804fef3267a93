"""A long run as its user has it: killed in the middle, typed again; and what Weights & Biases and TensorBoard hear."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from harness.run import checkpoints
from harness.run.directory import RunDir

pytestmark = [pytest.mark.cpu, pytest.mark.full]
ROOT = Path(__file__).resolve().parent.parent


def start(*words: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "harness", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_at(step: int, outdir: Path, *words: str) -> RunDir:
    """Start ``words`` and kill -9 the launcher at ``step``; every other process must follow it by itself."""
    launcher = start(*words, f"OUTDIR={outdir}")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.02)
        runs = list(outdir.glob("*/metrics.jsonl"))
        if runs and runs[0].read_text().count("\n") >= step:
            break
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    said = launcher.communicate()[0]
    assert family, said
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    return RunDir(next(outdir.iterdir()))


def ended(launcher: subprocess.Popen, status: int = 0) -> str:
    said = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == status, said
    return said


def test_the_same_command_goes_on_after_kill_9_and_reaches_its_loss(tmp_path):
    words = ("train", "604", "DEVICE=cpu")
    run = killed_at(100, tmp_path, *words)
    assert run.read_result() is None and run.state() == "killed"
    newest = checkpoints.newest_whole(run.checkpoints).step
    before = {m.step: m.loss for m in run.read_metrics()}
    said = ended(start(*words, f"OUTDIR={tmp_path}"))
    result = run.read_result()
    assert f"resumes at step {newest}" in said and result.resumed_at == (newest,)
    after = {m.step: m.loss for m in run.read_metrics()}
    again = [step for step in before if step > newest]
    assert {
        step: after[step] for step in before
    } == before and again  # also the steps that were lost and made again
    assert list(after) == list(range(1, len(after) + 1))
    reached = next(v for v in run.read_validation() if v.loss <= 2.9)
    assert f"loss {reached.loss:.4f} on held-out data at step {reached.step}, 2.9 wanted" in said
    assert result.status == "ok" and result.steps_done == reached.step < result.steps
    assert [c.step for c in checkpoints.in_folder(run.checkpoints)][-1] == reached.step
    assert len(checkpoints.in_folder(run.checkpoints)) == 2
    assert (
        f"{run.label}: ok" in ended(start(*words, f"OUTDIR={tmp_path}"))
        and len(list(tmp_path.iterdir())) == 1
    )


def test_a_damaged_newest_checkpoint_is_skipped_and_said(tmp_path):
    words = ("DEVICE=cpu", "DATA=mock", "STEPS=30", "SAVE_EVERY=10", "EVAL_STEPS=0")
    run = killed_at(
        24, tmp_path, "run", "101", "STEPS=3000", *[w for w in words if not w.startswith("STEPS")]
    )
    newest = checkpoints.newest_whole(run.checkpoints)
    (newest.path / "__0_0.distcp").write_bytes(b"")
    stopped = start(
        "run",
        "101",
        "STEPS=3000",
        *[w for w in words if not w.startswith("STEPS")],
        "RESUME=1",
        f"OUTDIR={tmp_path}",
    )
    lines = [stopped.stdout.readline() for _ in range(8)]
    stopped.terminate()
    stopped.communicate(timeout=60)
    said = " ".join("".join(lines).split())
    assert f"checkpoint of step {newest.step} skipped: __0_0.distcp has 0 bytes of" in said
    assert f"resumes at step {newest.step - 10}" in said


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_checkpoint(tmp_path):
    words = (
        "DEVICE=cpu",
        "DATA=mock",
        "STEPS=40",
        "SAVE_EVERY=2",
        "EVAL_STEPS=0",
        "LR=1e30",
        "MIN_LR=0",
        f"OUTDIR={tmp_path}",
    )
    said = ended(start("run", "101", *words), 1)
    run = RunDir(next(tmp_path.iterdir()))
    assert run.read_result().status == "nan" and "nan" in said and run.read_result().steps_done < 40


def test_a_pipeline_stops_at_its_loss_on_every_rank(tmp_path):
    words = (
        "DEVICE=cpu",
        "DATA=mock",
        "PP=2",
        "STEPS=30",
        "UNTIL=6.99",
        "EVAL_EVERY=3",
        "EVAL_STEPS=1",
        f"OUTDIR={tmp_path}",
    )
    ended(start("run", "601", *words))
    result = RunDir(next(tmp_path.iterdir())).read_result()
    assert (result.status, result.steps_done) == ("ok", 3)


@pytest.mark.skipif(not find_spec("wandb"), reason="no wandb: scripts/setup.sh tracking")
def test_a_resumed_run_continues_its_run_at_weights_and_biases(tmp_path):
    words = (
        "DEVICE=cpu",
        "DATA=mock",
        "STEPS=60",
        "SAVE_EVERY=10",
        "EVAL_EVERY=20",
        "EVAL_STEPS=1",
        "WANDB=offline",
        "WANDB_PROJECT=tests",
        "WANDB_NAME=first",
    )
    run = killed_at(25, tmp_path, "run", "101", *words)
    first = {path.name for path in run.path.glob("wandb/offline-run-*")}
    said = ended(start("run", "101", *words, "RESUME=1", f"OUTDIR={tmp_path}"))
    assert "resumes at step" in said
    both = {path.name for path in run.path.glob("wandb/offline-run-*")}
    assert (
        len(first) == 1 and len(both) == 2 and len({name.rpartition("-")[2] for name in both}) == 1
    )
    logged = b"".join(path.read_bytes() for path in run.path.glob("wandb/offline-run-*/*.wandb"))
    for word in (
        b"lm loss",
        b"lm loss validation",
        b"tests",
        b"first",
        b"performance/step_ms",
        b"performance/tokens_per_s",
        b"memory/rss_peak_gib",
    ):
        assert word in logged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("lm loss validation")}
    kept = {
        v.step: v.loss for v in run.read_validation() if v.split == "validation" and v.step < 60
    }
    assert {step: shown[step] for step in kept} == pytest.approx(kept, rel=1e-6) and kept
    assert {"lm loss", "learning-rate", "lm loss validation ppl"} <= set(events.Tags()["scalars"])


@pytest.mark.skipif(not find_spec("wandb"), reason="no wandb: scripts/setup.sh tracking")
def test_no_login_is_told_before_anything_starts(tmp_path):
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    said = ended(
        start(
            "run",
            "101",
            "DEVICE=cpu",
            "DATA=mock",
            "WANDB=online",
            f"OUTDIR={tmp_path / 'out'}",
            **home,
        ),
        2,
    )
    assert "error: WANDB=online: " in said and "wandb login" in said and "WANDB=offline" in said
    assert not (tmp_path / "out").exists()
