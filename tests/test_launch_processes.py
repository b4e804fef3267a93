"""Processes found by their mark, signals noted, and what tells that memory was short."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.launching import processes
from harness.launching.processes import Signals

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def start(command: list[str] = SLEEP, **marks: str) -> subprocess.Popen:
    process = subprocess.Popen(command, env=os.environ | marks, start_new_session=True)
    # Popen returns before the kernel shows the new program's environment in /proc
    deadline = time.monotonic() + 10
    while not all(processes.has_variable(process.pid, mark) for mark in marks):
        assert time.monotonic() < deadline, "the environment does not show"
        time.sleep(0.01)
    return process


def ready(preparation: str, **marks: str) -> subprocess.Popen:
    """A sleeping process that has made its preparation."""
    code = f"import faulthandler, signal, time; {preparation}; print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, env=os.environ | marks, stdout=subprocess.PIPE, start_new_session=True
    )
    with process.stdout as stdout:
        stdout.readline()
    return process


def test_processes_are_found_by_all_of_their_marks():
    one, other = start(HARNESS_RUN_DIR="/a", NODE="1"), start(HARNESS_RUN_DIR="/a", NODE="2")
    try:
        assert {p.pid for p in processes.marked(HARNESS_RUN_DIR="/a")} == {one.pid, other.pid}
        assert [p.pid for p in processes.marked(HARNESS_RUN_DIR="/a", NODE="2")] == [other.pid]
        assert processes.marked(HARNESS_RUN_DIR="/") == []
        assert processes.has_variable(one.pid, "NODE") and not processes.has_variable(
            one.pid, "NOD"
        )
    finally:
        for process in (one, other):
            process.kill()
            process.wait()


def test_the_end_is_sigterm_then_sigkill_and_leaves_the_exit_status_to_the_parent():
    mild, hard = (
        start(MARK="end"),
        ready("signal.signal(signal.SIGTERM, signal.SIG_IGN)", MARK="end"),
    )
    started = time.monotonic()
    processes.end(processes.marked(MARK="end"), grace_s=0.3)
    assert time.monotonic() - started < 5
    assert (mild.wait(), hard.wait()) == (-signal.SIGTERM, -signal.SIGKILL)
    processes.end([], grace_s=60)


def test_signals_are_noted_in_order_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.take() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert [signals.take(), signals.take(), signals.take()] == [
            signal.SIGTERM,
            signal.SIGINT,
            None,
        ]
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.take() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_process_that_catches_a_signal_is_sent_it():
    process = ready("faulthandler.register(signal.SIGUSR1)")
    try:
        assert processes.catches(process.pid, signal.SIGUSR1)
        assert not processes.catches(process.pid, signal.SIGUSR2)
    finally:
        process.kill()
        process.wait()
    assert not processes.catches(2**22 + 1, signal.SIGUSR1)


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A control group of 4 GiB, below one without a limit, in place of this process's own."""
    group = tmp_path / "slurm" / "job"
    group.mkdir(parents=True)
    for name, text in {
        "memory.max": str(4 << 30),
        "memory.stat": f"anon 1\ninactive_file {1 << 30}",
    }.items():
        (group / name).write_text(text)
    (tmp_path / "slurm" / "memory.max").write_text("max")
    (tmp_path / "own").write_text("12:memory:/x\n0::/slurm/job\n")
    monkeypatch.setattr(processes, "_CGROUPS", tmp_path)
    monkeypatch.setattr(processes, "_OWN_CGROUP", tmp_path / "own")
    return group


def test_a_control_groups_limit_counts_and_its_file_cache_does_not(cgroups):
    (cgroups / "memory.current").write_text(str(5 << 29))
    assert processes.free_memory_share() <= 0.625
    (cgroups / "memory.current").write_text(str(5 << 30))
    assert processes.free_memory_share() == 0


def test_this_machines_memory_counts_where_there_is_no_limit():
    assert 0 < processes.free_memory_share() <= 1
    assert processes.oom_kills() >= 0
