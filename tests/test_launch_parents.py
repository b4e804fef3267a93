"""A run ends with the make or the script that started it, unless it was detached on purpose; and no reader is needed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_launch import LAUNCHER, ROOT, of_run, start, the_run, until, wait_for_steps

RUN = shlex.join([sys.executable, str(LAUNCHER)])


def started_by(script: str, outdir: Path) -> subprocess.Popen:
    """A shell that starts a launcher as ``script`` says, in which RUN is its command."""
    command = script.replace("RUN", f"{RUN} {outdir} ok 2 2000 0.05")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["bash", "-c", command],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def launcher_of(outdir: Path) -> psutil.Process:
    return psutil.Process(wait_for_steps(outdir).read_running().pid)


def with_make(tmp_path: Path) -> str:
    (tmp_path / "Makefile").write_text("run: ; @$(COMMAND)\n")
    return f"make -f {tmp_path}/Makefile run COMMAND='RUN'"


@pytest.mark.parametrize(
    "script", ["RUN; true", "make RUN; true", "nohup make RUN; true", "make RUN & wait"]
)
def test_a_run_ends_with_the_make_or_the_script_that_was_killed(tmp_path, script):
    by_make = "make" in script
    if by_make and shutil.which("make") is None:
        pytest.skip("no make")
    shell = started_by(script.replace("make RUN", with_make(tmp_path)), tmp_path / "out")
    launcher = launcher_of(tmp_path / "out")
    directory = the_run(tmp_path / "out")
    above = launcher.parent() if by_make else psutil.Process(shell.pid)
    assert above.name() == ("make" if by_make else "bash")
    above.kill()
    result = until(directory.read_result)
    assert result.status == "killed" and result.steps_done < 2000 and result.exit_code == 129
    assert (
        f"ended because {'make' if by_make else 'bash'} (process {above.pid}), which started it, is gone"
        in result.detail
    )
    assert not of_run(directory.path)
    shell.wait(timeout=20)


def test_a_run_of_make_ends_with_the_script_that_was_killed(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    shell = started_by(f"{with_make(tmp_path)}; true", tmp_path / "out")
    directory = the_run(tmp_path / "out") if launcher_of(tmp_path / "out") else None
    shell.kill()
    shell.wait()
    assert f"bash (process {shell.pid})" in until(directory.read_result).detail


@pytest.mark.parametrize(
    "script", ["nohup RUN; true", "setsid --wait RUN; true", "RUN & wait", "set -m; RUN & wait"]
)
def test_a_run_that_was_detached_on_purpose_goes_on(tmp_path, script):
    shell = started_by(script, tmp_path / "out")
    launcher = launcher_of(tmp_path / "out")
    directory = the_run(tmp_path / "out")
    shell.kill()
    shell.wait()
    steps = len(directory.read_metrics())
    until(lambda: len(directory.read_metrics()) > steps + 20)
    assert launcher.is_running() and directory.read_result() is None
    launcher.terminate()
    assert until(directory.read_result).detail.startswith("ended by SIGTERM")
    until(lambda: not of_run(directory.path))


def test_a_run_whose_reader_went_away_trains_on_and_tells_its_status(tmp_path):
    for behaviour, status in (("ok", 0), ("killed", 1)):
        launcher = start(tmp_path / behaviour, behaviour, 2, 30, 0.02)
        launcher.stdout.readline()
        launcher.stdout.close()
        assert launcher.wait(timeout=60) == status
        assert (
            the_run(tmp_path / behaviour).read_result().steps_done
            == {"ok": 30, "killed": 2}[behaviour]
        )
