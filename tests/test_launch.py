"""Runs from start to result: the real launcher above a stand-in for torchrun and its ranks (test_launch_assets/)."""

import errno
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import UserError
from harness.launching import hangs, launch, processes, torchrun
from harness.launching.active_run import Finished
from harness.launching.stop import stop as stop_here
from harness.launching.terminal import PlainTerminal
from harness.machine import gpus
from harness.planning.script import Extras
from harness.run import step_statistics
from harness.run.checkpoints import Loading, Saving
from harness.run.directory import RunDir
from harness.system.files import write_json

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(__file__).parent / "test_launch_assets" / "launcher.py"


def load_launcher():
    spec = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_plan = load_launcher().make_plan


def run(plan, **kwargs) -> tuple[Finished, str]:
    """Run to the end; what it printed into a pipe."""
    out = io.StringIO()
    finished = launch.run_plan(plan, terminal=PlainTerminal(out), **kwargs)
    return finished, out.getvalue()


def start(outdir: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    """A launcher in a process of its own, in which a hang-up ends it although these tests may run under nohup."""
    command = [sys.executable, LAUNCHER, outdir, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def until(condition, seconds: float = 20.0):
    """The first truthy answer of ``condition``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def of_run(path: Path) -> list:
    """Living processes of a run."""
    return [p for p in processes.marked(HARNESS_RUN_DIR=str(path)) if processes.lives(p)]


def the_run(outdir: Path) -> RunDir:
    (path,) = outdir.iterdir()
    return RunDir(path)


def wait_for_steps(outdir: Path, steps: int = 2) -> RunDir:
    until(lambda: outdir.exists() and list(outdir.iterdir()))
    until(lambda: len(the_run(outdir).read_metrics()) >= steps)
    return the_run(outdir)


def test_a_run_leaves_everything_that_a_run_directory_holds(tmp_path):
    finished, printed = run(make_plan(tmp_path, "ok", ranks=2, steps=8))
    directory, result = finished.dir, finished.result

    assert directory.path == tmp_path / "101-tiny-dp2_cpu"
    assert (finished.exit_status, result.status, result.exit_code) == (0, "ok", 0)
    assert (result.steps, result.steps_done, result.window) == (8, 8, (6, 8))
    assert (
        result.step_ms == step_statistics.spread([106, 107, 108]) and result.step_ms.median == 107
    )
    assert (result.tflops, result.tokens_per_s, result.mfu) == (2.0, 50.0, None)
    assert (result.memory_gib.allocated, result.memory_gib.reserved) == (2.0, 3.0), (
        "of the fullest rank"
    )
    assert result.loss.first == 9.9 and result.loss.last == pytest.approx(9.2)
    assert directory.read_result() == result and directory.state() == "ok"
    assert "[rank0]: hello, no GPUs" in directory.logs.read_text()
    environment = json.loads(directory.environment.read_text())
    assert environment["host"] == socket.gethostname() and environment["upstream"]["source"] in (
        "submodule",
        "package",
    )
    assert environment["launch"] == {"add_us": 6.0, "operation_us": 20.0}, "of the slowest ranks"
    assert directory.read_experiment().id == "101"
    assert directory.read_running().pid == os.getpid()
    assert "8/8  loss 9.2000  108.0 ms" in printed and "median ± half IQR of steps 6-8" in printed
    assert [line.split("/")[0] for line in printed.splitlines() if "/8  loss" in line] == list(
        "12345678"
    )


def test_the_command_can_be_run_again(tmp_path):
    finished, _ = run(make_plan(tmp_path, "ok", steps=3))
    again = tmp_path / "again"
    (again / "ranks").mkdir(parents=True)
    environment = os.environ | {"HARNESS_RUN_DIR": str(again)}
    subprocess.run(["bash", finished.dir.command], env=environment, check=True, capture_output=True)
    assert len(RunDir(again).read_metrics()) == 3


def test_a_second_run_gets_a_directory_of_its_own(tmp_path):
    labels = [run(make_plan(tmp_path, "ok", steps=1))[0].dir.label for _ in range(2)]
    assert labels == ["101-tiny-dp2_cpu", "101-tiny-dp2_cpu.2"]


def test_a_run_shorter_than_its_window_has_no_median(tmp_path):
    finished, printed = run(make_plan(tmp_path, "ok", steps=3))
    assert (
        finished.result.window is None
        and finished.result.step_ms is None
        and finished.result.tflops is None
    )
    assert "no median: the averaging window begins after step 3" in printed


@pytest.mark.parametrize(
    ("behaviour", "status", "exit_status", "rank", "words"),
    [
        ("oom", "oom", 1, 1, "CUDA out of memory"),
        ("killed", "crash", 1, 1, "SIGKILL"),
        ("refused", "bad-configuration", 2, 1, "--no-such-flag"),
        ("port-always", "crash", 1, None, "EADDRINUSE"),
    ],
)
def test_failures_are_named_and_keep_the_results_so_far(
    tmp_path, behaviour, status, exit_status, rank, words
):
    finished, printed = run(make_plan(tmp_path, behaviour))
    result = finished.result
    assert (result.status, finished.exit_status, result.rank) == (status, exit_status, rank)
    assert words in result.detail and result.advice in printed
    assert result.steps_done == (0 if behaviour == "port-always" else 2)
    assert not of_run(finished.dir.path)


def test_a_port_that_was_taken_is_tried_again_once(tmp_path):
    finished, printed = run(make_plan(tmp_path, "port"))
    assert finished.result.status == "ok"
    assert "a port was taken" in printed
    assert "a port was taken" in finished.dir.logs.read_text()


def test_a_hang_ends_with_the_stacks_of_every_rank(tmp_path):
    finished, _ = run(make_plan(tmp_path, "hang"), hang_seconds=1.0)
    result = finished.result
    assert (result.status, finished.exit_status, result.steps_done) == ("hang", 1, 2)
    assert "ranks 0, 1 in stuck_in_a_collective (torchrun.py:" in result.detail
    assert set(finished.dir.stacks()) == {0, 1}
    assert not of_run(finished.dir.path)


def test_a_rank_that_is_still_writing_its_stacks_is_waited_for(tmp_path, monkeypatch):
    """faulthandler writes line by line; what is there first may name no frame."""
    run_dir = RunDir(tmp_path)
    run_dir.ranks.mkdir()
    rank = {"rank": 0, "local_rank": 0, "pid": os.getpid(), "host": socket.gethostname()}
    write_json(run_dir.ranks / "0.json", rank)
    stacks = run_dir.ranks / "0.stacks.txt"

    def write(*_) -> None:
        stacks.write_text("Current thread 0x01 (most recent call first):\n")
        rest = stacks.read_text() + '  File "/x/torchrun.py", line 139 in stuck\n'
        threading.Timer(3 * hangs.POLL_S, stacks.write_text, [rest]).start()

    monkeypatch.setattr(os, "kill", write)
    monkeypatch.setattr(processes, "catches", lambda *_: True)
    assert (
        hangs.where_ranks_wait(run_dir, [psutil.Process()]) == "rank 0 in stuck (torchrun.py:139)"
    )


def test_before_its_first_step_a_run_may_be_silent_for_longer(tmp_path):
    """Imports, initialisation and compilation take minutes, a step afterwards seconds."""
    finished, _ = run(make_plan(tmp_path, "ok", steps=3, step_s=2.0), hang_seconds=0.7)
    assert (finished.result.status, finished.result.steps_done) == ("hang", 1)


@pytest.mark.parametrize(
    ("at_start_s", "hang_s", "status", "done"), [(0.2, 30, "ok", 1), (0.7, 0.3, "hang", 0)]
)
def test_before_its_first_step_the_longer_patience_counts_and_ends(
    tmp_path, monkeypatch, at_start_s, hang_s, status, done
):
    monkeypatch.setattr(hangs, "BEFORE_FIRST_STEP_S", at_start_s)
    slow_start_s = 2.0 if status == "ok" else 30.0
    finished, _ = run(make_plan(tmp_path, "ok", steps=1, step_s=slow_start_s), hang_seconds=hang_s)
    assert (finished.result.status, finished.result.steps_done) == (status, done)
    assert status == "ok" or finished.result.detail.startswith("no step and no output for ")


def test_a_resumed_run_begins_with_the_same_patience(tmp_path):
    """The steps that it had before are none of this start."""
    first, _ = run(make_plan(tmp_path, "ok", steps=2))
    loading = Extras(loading=Loading(first.dir.checkpoints, 2))
    finished, _ = run(
        make_plan(tmp_path, "ok", steps=3, step_s=2.0, resumes=first.dir, extras=loading),
        hang_seconds=0.7,
    )
    assert (
        finished.result.status == "hang" and len(finished.dir.metrics.read_text().splitlines()) == 3
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_every_rank_and_keeps_the_results_so_far(tmp_path, number, status):
    launcher = start(tmp_path / "out", "ok", 3, 1000, 0.05)
    directory = wait_for_steps(tmp_path / "out")
    assert directory.state() == "running" and len(of_run(directory.path)) == 4
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=20)
    result = directory.read_result()
    assert launcher.returncode == status
    assert (result.status, result.exit_code) == ("killed", status)
    assert 2 <= result.steps_done < 1000 and "killed" in out
    assert not of_run(directory.path)


def test_sigterm_ends_a_run_that_keeps_checkpoints_with_one_more(tmp_path):
    launcher = start(tmp_path / "out", "saves", 2, 1000, 0.05, SAVE=str(tmp_path / "kept"))
    directory = wait_for_steps(tmp_path / "out")
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=20)
    result, (save,) = directory.read_result(), directory.read_saves()
    assert launcher.returncode == 143 and (result.status, result.exit_code) == ("killed", 143)
    assert 2 <= save.step < 1000 and result.detail == (
        f"ended by SIGTERM after step {result.steps_done} of 1000; its newest checkpoint is of step"
        f" {save.step}"
    )
    assert "-> RESUME=1 resumes it" in out and not of_run(directory.path)


def test_ctrl_c_ends_a_run_that_keeps_checkpoints_at_once(tmp_path):
    launcher = start(tmp_path / "out", "saves", 2, 1000, 0.05, SAVE=str(tmp_path / "kept"))
    directory = wait_for_steps(tmp_path / "out")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=20) == 130
    assert not directory.read_saves()


def test_ranks_that_do_not_save_are_ended(tmp_path):
    settings = {"SAVE": str(tmp_path / "kept"), "SAVES_S": "0.5"}
    launcher = start(tmp_path / "out", "saves-forever", 2, 1000, 0.05, **settings)
    directory = wait_for_steps(tmp_path / "out")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) == 143
    assert directory.read_result().detail.startswith("ended by SIGTERM after step")
    assert not of_run(directory.path)


def in_job(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"HARNESS_JOB": "77", "HARNESS_JOB_FILES": str(tmp_path / "slurm-77"), **more}


def test_before_the_time_limit_of_its_job_a_run_saves_and_the_job_starts_again(tmp_path):
    settings = in_job(tmp_path, SAVE=str(tmp_path / "kept"))
    launcher = start(tmp_path / "out", "saves", 2, 1000, 0.05, **settings)
    directory = wait_for_steps(tmp_path / "out")
    assert directory.read_running().job == "77"
    (tmp_path / "slurm-77.end").write_text("before the time limit of its job\n")
    assert launcher.wait(timeout=20) == 143
    assert re.fullmatch(
        r"ended before the time limit of its job after step \d+ of 1000; its newest checkpoint is"
        r" of step \d+",
        directory.read_result().detail,
    )
    assert (tmp_path / "slurm-77.again").exists()


@pytest.mark.parametrize("behaviour", ["ok", "saves"])
def test_a_job_does_not_start_again_for_a_run_without_a_checkpoint(tmp_path, behaviour):
    """It would begin at step 1, as often as there are time limits."""
    launcher = start(tmp_path / "out", behaviour, 2, 1000, 0.05, **in_job(tmp_path))
    directory = wait_for_steps(tmp_path / "out")
    (tmp_path / "slurm-77.end").write_text("before the time limit of its job\n")
    assert launcher.wait(timeout=20) == 143
    assert "before the time limit of its job" in directory.read_result().detail
    assert not (tmp_path / "slurm-77.again").exists()


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace_period(tmp_path):
    launcher = start(tmp_path / "out", "stubborn", 2, 5, 0.01, GRACE_S="0.5")
    directory = wait_for_steps(tmp_path / "out")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) == 143
    assert not of_run(directory.path)


def test_a_second_ctrl_c_does_not_wait_for_the_grace_period(tmp_path):
    launcher = start(tmp_path / "out", "stubborn", 2, 5, 0.01, GRACE_S="1000")
    directory = wait_for_steps(tmp_path / "out")
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None and of_run(directory.path)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=20) == 130
    assert not of_run(directory.path)


def test_ranks_follow_a_torchrun_that_dies_without_ending_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torchrun, "GRACE_S", 0.5)
    finished, _ = run(make_plan(tmp_path, "orphans", ranks=2, steps=2))
    assert finished.result.status == "crash"
    assert not of_run(finished.dir.path)


def test_ranks_follow_a_launcher_that_is_killed(tmp_path):
    launcher = start(tmp_path / "out", "ok", 2, 1000, 0.05)
    directory = wait_for_steps(tmp_path / "out")
    launcher.kill()
    launcher.wait()
    until(lambda: not of_run(directory.path))
    until(
        lambda: directory.state() == "killed"
    )  # the lock goes with the last process that inherited it
    assert directory.read_result() is None
    assert len(directory.read_metrics()) >= 2


def test_a_launcher_that_cannot_go_on_ends_its_run(tmp_path):
    class Broken(PlainTerminal):
        def show(self, progress):
            if progress.step:
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        launch.run_plan(
            make_plan(tmp_path, "ok", steps=1000, step_s=0.05), terminal=Broken(io.StringIO())
        )
    directory = the_run(tmp_path)
    assert directory.read_result().status == "killed"
    assert not of_run(directory.path)


def test_a_run_goes_where_there_is_no_main_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(run(make_plan(tmp_path, "ok", steps=1))[0])
    )
    thread.start()
    thread.join()
    assert results[0].result.status == "ok"


def test_a_directory_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        run(make_plan(tmp_path / "file", "ok"))


def test_a_disk_that_fills_up_is_told_and_leaves_nothing_running(tmp_path, monkeypatch):
    write = write_json

    def full(path, value):
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, value)

    monkeypatch.setattr("harness.launching.run_files.write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(make_plan(tmp_path, "ok", steps=2))
    assert not of_run(the_run(tmp_path).path)


def test_gpus_are_chosen_sampled_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "choose", lambda count, wanted: (2, 3)[:count])
    there = tuple(gpus.LocalGpu(index, "NVIDIA H200", f"GPU-{index}", 143771) for index in range(4))
    monkeypatch.setattr(gpus, "list_gpus", lambda: there)
    monkeypatch.setattr(gpus, "driver_versions", lambda: ("580.95.05", "13.0"))
    finished, printed = run(make_plan(tmp_path, "ok", device="cuda", miniature=False))
    result = finished.result
    assert (result.gpu, result.gpus, result.device) == ("NVIDIA H200", (2, 3), "cuda")
    assert result.peak_tflops > 900 and result.mfu == pytest.approx(2.0 / result.peak_tflops)
    assert "hello, 2,3 GPUs" in finished.dir.logs.read_text()
    assert (
        "memory by formula: " in printed
        and "fits on NVIDIA H200" in printed
        and "step by formula: " in printed
    )
    assert (
        "MFU" in printed
        and json.loads(finished.dir.environment.read_text())["driver"] == "580.95.05"
    )


def stop(*arguments: object) -> str:
    """What ``make stop`` prints, from a process of its own as there."""
    code = "import sys; from pathlib import Path; from harness.launching.stop import stop; "
    code += "sys.exit(stop(Path(sys.argv[1]), *sys.argv[2:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_stop_ends_the_runs_of_an_outdir(tmp_path):
    launcher = start(tmp_path / "out", "ok", 2, 1000, 0.05)
    directory = wait_for_steps(tmp_path / "out")
    assert stop(tmp_path / "out") == "stopped 101-tiny-dp2_cpu\n"
    assert launcher.wait(timeout=5) == 143
    assert directory.read_result().status == "killed"
    assert stop(tmp_path / "out") == f"nothing runs in {tmp_path / 'out'}\n"


def test_stop_ends_one_run_by_its_label_and_its_launcher_reports_it(tmp_path):
    launcher = start(tmp_path / "out", "ok", 2, 1000, 0.05)
    directory = wait_for_steps(tmp_path / "out")
    assert directory.label in stop(tmp_path / "out", directory.label)
    assert launcher.wait(timeout=20) == 1
    assert directory.read_result().status == "killed" and not of_run(directory.path)


def test_stop_kills_no_process_that_only_has_the_number(tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    finished, _ = run(make_plan(tmp_path, "ok", steps=1))
    finished.dir.result.unlink()
    write_json(
        finished.dir.running, {"pid": bystander.pid, "host": socket.gethostname(), "started": 1.0}
    )
    stop_here(tmp_path)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_stop_of_an_unknown_label_names_the_nearest(tmp_path):
    run(make_plan(tmp_path, "ok", steps=1))
    with pytest.raises(UserError, match="101-tiny-dp2_cpu"):
        stop_here(tmp_path, "101-tiny-dp2")


def saving_to(folder: Path) -> dict:
    return {"extras": Extras(saving=Saving(every=2, folder=folder))}


def test_two_runs_do_not_keep_checkpoints_in_one_folder(tmp_path):
    first = start(tmp_path / "out", "ok", 2, 1000, 0.05, SAVE=str(tmp_path / "kept"))
    directory = wait_for_steps(tmp_path / "out")
    with pytest.raises(
        UserError,
        match=rf"SAVE={tmp_path}/kept: another run keeps .*process {first.pid} on .*\nname another folder",
    ):
        run(make_plan(tmp_path / "other", "ok", **saving_to(tmp_path / "kept")))
    with pytest.raises(UserError, match="another run keeps its checkpoints there"):
        run(make_plan(tmp_path / "other", "ok", **saving_to(directory.path / "checkpoints")))
    assert not (tmp_path / "other").exists() and not (directory.path / "checkpoints").exists()
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=20) == 143
    finished, _ = run(make_plan(tmp_path / "other", "ok", **saving_to(tmp_path / "kept")))
    assert finished.result.status == "ok"


def test_a_run_that_goes_on_is_not_resumed_a_second_time(tmp_path):
    first = start(tmp_path / "out", "ok", 2, 1000, 0.05)
    directory = wait_for_steps(tmp_path / "out")
    with pytest.raises(
        UserError,
        match=rf"101-tiny-dp2_cpu still runs: process {first.pid} on .*\nmake stop RUN=101-tiny-dp2_cpu OUTDIR=",
    ):
        run(make_plan(tmp_path / "out", "ok", resumes=directory))
    assert first.poll() is None and directory.logs.exists() and directory.read_result() is None
    steps = len(directory.read_metrics())
    until(lambda: len(directory.read_metrics()) > steps)
    first.kill()
    first.wait()
    until(lambda: directory.state() == "killed")
    finished, _ = run(make_plan(tmp_path / "out", "ok", steps=3, resumes=directory))
    assert (
        finished.dir == directory
        and finished.result.status == "ok"
        and (directory.path / "logs.1.txt").exists()
    )


@pytest.mark.parametrize("folder", ["file", "file/below", "new/below"])
def test_a_run_that_is_refused_leaves_nothing(tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    if folder.startswith("new"):  # what only fails once all folders are there

        def refuse(*_):
            raise UserError("half a submodule")

        monkeypatch.setattr("harness.launching.run_files.describe_environment", refuse)
    with pytest.raises(
        UserError, match=r"(?s)half a submodule|cannot write to .*set SAVE= to another"
    ):
        run(make_plan(tmp_path / "out", "ok", **saving_to(tmp_path / folder)))
    assert {path.name for path in tmp_path.rglob("*")} <= {"file", "out"}


def test_a_run_that_is_refused_leaves_the_run_that_it_would_have_resumed(tmp_path, monkeypatch):
    finished, _ = run(make_plan(tmp_path, "ok", steps=3))
    before = {path: path.read_bytes() for path in finished.dir.path.rglob("*") if path.is_file()}

    def refuse(*_):
        raise UserError("half a submodule")

    monkeypatch.setattr("harness.launching.run_files.describe_environment", refuse)
    with pytest.raises(UserError, match="half a submodule"):
        run(make_plan(tmp_path, "ok", steps=6, resumes=finished.dir))
    assert {
        path: path.read_bytes() for path in finished.dir.path.rglob("*") if path.is_file()
    } == before


def test_a_spread_of_one_value_has_no_deviation():
    assert step_statistics.spread([5.0]).model_dump() == {
        "median": 5,
        "q1": 5,
        "q3": 5,
        "mean": 5,
        "stdev": 0,
        "min": 5,
        "max": 5,
        "n": 1,
    }
    assert step_statistics.spread([]) is None
