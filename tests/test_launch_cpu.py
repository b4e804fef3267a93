"""The launcher with the real torchrun, the real entry and upstream's training loop, as CPU miniatures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.run.directory import RunDir

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.launching.launch import run_plan
from harness.planning.plan import plan

id_, *words = sys.argv[1:]
settings = {"DEVICE": "cpu", "DATA": "mock", **command_line.parse(words)}
hang = float(settings["HANG"]) if "HANG" in settings else None
sys.exit(run_plan(plan(load_catalog().find(id_), settings, "cpu"), hang_seconds=hang).exit_status)
"""
TWO_RANKS = "122"
ENDLESS = "STEPS=1000000"


def start(outdir: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, TWO_RANKS, f"OUTDIR={outdir}", *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def the_run(outdir: Path) -> RunDir:
    return RunDir(next(outdir.iterdir()))


def training(outdir: Path, *words: str) -> tuple[subprocess.Popen, RunDir, list[psutil.Process]]:
    """A run that has begun to train: its launcher, its directory, torchrun and the ranks."""
    launcher = start(outdir, ENDLESS, *words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.2)
        if any(outdir.glob("*")) and len((run := the_run(outdir)).read_metrics()) >= 3:
            (torchrun,) = psutil.Process(launcher.pid).children()
            return (
                launcher,
                run,
                [torchrun, *(psutil.Process(rank.pid) for rank in run.read_ranks())],
            )
    raise AssertionError(f"no step within two minutes: {launcher.communicate()[0]}")


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def losses(run: RunDir) -> list[float]:
    return [step.loss for step in run.read_metrics()]


def test_two_nodes_on_loopback_train_as_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"RENDEZVOUS=127.0.0.1:{probe.getsockname()[1]}"
    nodes = [
        start(tmp_path / "two", "STEPS=8", "NODES=2", meeting, f"NODE_RANK={node}")
        for node in (1, 0)
    ]
    assert [node.communicate(timeout=180) and node.returncode for node in nodes] == [0, 0]
    one = start(tmp_path / "one", "STEPS=8")
    assert one.communicate(timeout=180) and one.returncode == 0

    together, alone = the_run(tmp_path / "two"), the_run(tmp_path / "one")
    assert len(list((tmp_path / "two").iterdir())) == 1
    assert together.read_result().steps_done == 8 and len(together.read_ranks()) == 2
    assert losses(together) == pytest.approx(losses(alone), rel=1e-6)
    for run in (together, alone):
        assert_logged(run)


def assert_logged(run: RunDir) -> None:
    """TensorBoard's event files have each step's speed and memory, as metrics.jsonl and the ranks' reports say."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    shown = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    metrics = {m.step: m for m in run.read_metrics()}
    for name, field in (
        ("step_ms", "step_ms"),
        ("tflops_per_gpu", "tflops"),
        ("tokens_per_s", "tokens_per_s"),
    ):
        assert shown[f"performance/{name}"] == pytest.approx(
            {step: getattr(m, field) for step, m in metrics.items()}, rel=1e-5
        )
    assert "performance/mfu" not in shown, "a CPU has no peak"
    fullest = max(rank.rss_peak_gib for rank in run.read_ranks())
    assert (
        shown["memory/rss_peak_gib"].keys() == metrics.keys()
        and 0 < shown["memory/rss_peak_gib"][max(metrics)] <= fullest * 1.001
    )


def test_ctrl_c_ends_every_rank_and_keeps_the_results_so_far(tmp_path):
    launcher, run, processes = training(tmp_path / "out")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert_gone(processes)
    result = run.read_result()
    assert result.status == "killed" and result.steps_done >= 3 and result.memory_gib.rss > 0.1


@pytest.mark.parametrize("victim", ["launcher", pytest.param("torchrun", marks=pytest.mark.full)])
def test_every_rank_follows_a_killed(tmp_path, victim):
    launcher, run, processes = training(tmp_path / "out")
    (launcher if victim == "launcher" else processes[0]).kill()
    launcher.communicate(timeout=60)
    assert_gone(processes)
    assert run.state() == {"launcher": "killed", "torchrun": "crash"}[victim]


def test_a_killed_rank_is_named(tmp_path):
    launcher, run, processes = training(tmp_path / "out")
    os.kill(run.read_ranks()[1].pid, signal.SIGKILL)
    launcher.communicate(timeout=60)
    result = run.read_result()
    assert (launcher.returncode, result.status, result.rank) == (
        1,
        "crash",
        1,
    ) and "SIGKILL" in result.detail
    assert_gone(processes)


def test_a_rank_that_stops_is_a_hang_and_the_others_tell_where_they_wait(tmp_path):
    launcher, run, processes = training(tmp_path / "out", "HANG=5")
    os.kill(run.read_ranks()[1].pid, signal.SIGSTOP)
    launcher.communicate(timeout=120)
    result = run.read_result()
    assert result.status == "hang" and "rank 1 does not answer" in result.detail
    assert "Current thread" in run.stacks()[0].read_text()
    assert_gone(processes)


def test_a_value_that_only_upstream_can_judge_is_a_bad_configuration(tmp_path):
    """Names, numbers and choices are checked before: tests/test_known_arguments.py."""
    launcher = start(tmp_path / "out", "STEPS=2", "ARGS=--moe-layer-freq often")
    printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 2
    assert (
        "--moe-layer-freq: invalid moe_freq_type value: 'often'" in printed
        and "make arguments" in printed
    )
    assert json.loads(the_run(tmp_path / "out").result.read_text())["status"] == "bad-configuration"
