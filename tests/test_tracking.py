"""What TensorBoard and Weights & Biases get of a step, and make tensorboard, without a training."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from harness import ROOT
from harness.entry import tracking
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.run import tensorboard
from harness.run.directory import RunDir
from harness.run.schema import Rank, StepMetrics
from harness.system.files import write_json

LINE = StepMetrics(step=7, loss=2.5, step_ms=250.0, tflops=400.0, tokens_per_s=32768.0, time=1.0)


def rank(number: int, **memory: float) -> Rank:
    return Rank(rank=number, local_rank=number, pid=1, host="here", **memory)


def test_a_step_on_gpus_has_speed_mfu_and_the_memory_of_the_fullest_rank() -> None:
    ranks = [
        rank(0, allocated_peak_gib=61.5, reserved_peak_gib=64.0, nvml_used_gib=66.5),
        rank(1, allocated_peak_gib=70.25, reserved_peak_gib=63.0),
    ]
    assert tracking.scalars(LINE, ranks, peak=989.4) == {
        "performance/step_ms": 250.0,
        "performance/tflops_per_gpu": 400.0,
        "performance/tokens_per_s": 32768.0,
        "performance/mfu": pytest.approx(400 / 989.4),
        "memory/allocated_peak_gib": 70.25,
        "memory/reserved_peak_gib": 64.0,
        "memory/nvml_used_gib": 66.5,
    }


def test_what_is_not_known_is_left_out() -> None:
    line = LINE.model_copy(update={"tflops": None})
    assert tracking.scalars(line, [rank(0, rss_peak_gib=0.5)], peak=None) == {
        "performance/step_ms": 250.0,
        "performance/tokens_per_s": 32768.0,
        "memory/rss_peak_gib": 0.5,
    }


def test_both_get_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, wandb = [], []
    upstream = ModuleType("megatron.training")
    upstream.get_tensorboard_writer = lambda: type(
        "Board", (), {"add_scalar": lambda self, *what: board.append(what)}
    )()
    upstream.get_wandb_writer = lambda: type(
        "Wandb", (), {"log": lambda self, *what: wandb.append(what)}
    )()
    monkeypatch.setitem(sys.modules, "megatron.training", upstream)
    monkeypatch.setattr(tracking, "_peak", lambda run_dir: 800.0)
    run = RunDir(tmp_path)
    run.ranks.mkdir()
    for number, gib in ((0, 10.0), (1, 12.5)):
        write_json(run.ranks / f"{number}.json", rank(number, allocated_peak_gib=gib).model_dump())
    log = tracking._Logger(run)
    log(LINE)
    assert ("performance/mfu", 0.5, 7) in board and ("memory/allocated_peak_gib", 12.5, 7) in board
    assert wandb == [({name: value for name, value, _ in board}, 7)]


def finished(outdir: Path, label: str, id_: str) -> RunDir:
    """A run that logged something."""
    run = RunDir(outdir / label)
    (run.path / "tensorboard").mkdir(parents=True)
    (run.path / "tensorboard" / "events.out.tfevents.1.here.1.0").touch()
    write_json(
        run.experiment_json, {**load_catalog().find(id_).model_dump(mode="json"), "device": "cpu"}
    )
    return run


def test_which_curves_are_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has written for TensorBoard yet"):
        tensorboard.logged(None, tmp_path)
    old, new = finished(tmp_path, "old", "101"), finished(tmp_path, "new", "101")
    finished(tmp_path, "another", "104")
    os.utime(old.experiment_json, (1, 1))
    assert tensorboard.logged(None, tmp_path) == tmp_path
    assert tensorboard.logged("old", tmp_path) == old.path / "tensorboard"
    assert tensorboard.logged("101", tmp_path) == new.path / "tensorboard"
    with pytest.raises(UserError, match="RUN=105"):
        tensorboard.logged("105", tmp_path)


@pytest.mark.skipif(
    not find_spec("tensorboard"), reason="the set-up stage `heavy` is not installed"
)
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    finished(tmp_path, "one", "101")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"did not start: .*(in use|bind)"):
            tensorboard.show({"PORT": str(taken.getsockname()[1])}, tmp_path)


@pytest.mark.skipif(
    not find_spec("tensorboard"), reason="the set-up stage `heavy` is not installed"
)
def test_tensorboard_is_served_until_ctrl_c(tmp_path: Path) -> None:
    finished(tmp_path, "one", "101")
    code = f"import sys; from pathlib import Path; from harness.run import tensorboard; sys.exit(tensorboard.show({{}}, Path({str(tmp_path)!r})))"
    shown = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": ""},
    )
    try:
        address = next(
            word for word in shown.stdout.readline().split() if word.startswith("http://localhost:")
        )
        assert b"TensorBoard" in urllib.request.urlopen(address).read()
    finally:
        shown.send_signal(signal.SIGINT)
    assert shown.wait(timeout=30) == 0


def test_tensorboard_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path, "one", "101")
    stuck = tmp_path / "stuck.py"
    stuck.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('http://localhost:1/', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    started = []

    def interrupted(board: subprocess.Popen[str]) -> None:
        started.append(board)
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **kwargs: popen([sys.executable, str(stuck)], **kwargs)
    )
    monkeypatch.setattr(popen, "communicate", interrupted)
    monkeypatch.setattr(tensorboard, "PATIENCE", 0.1)
    assert tensorboard.show({}, tmp_path) == 0
    assert started[0].returncode == -signal.SIGKILL
