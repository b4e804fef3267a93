"""Locks on folders: a living process keeps one whatever the clock says; a dead one's is free at once."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.system import locks

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import subprocess, sys, time
from pathlib import Path
from harness.system import locks
locks.HEARTBEAT_S = 0.05
locks.take(Path(sys.argv[1]))
if len(sys.argv) > 2:
    child = subprocess.Popen(["sleep", "60"], pass_fds=locks.descriptors(Path(sys.argv[1])))
    print(child.pid, flush=True)
print("has it", flush=True)
time.sleep(60)
"""


def holding(folder: Path, *more: str) -> tuple[subprocess.Popen, str]:
    """A process that has ``folder``, and the first line that it printed."""
    command = [sys.executable, "-c", HOLD, str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def never_watched(monkeypatch):
    """Waiting for the count of another machine would be a mistake."""
    monkeypatch.setattr(locks, "_with_heartbeat", lambda seen: pytest.fail("it was watched"))


def of_another_machine(folder: Path, beat: int = 0) -> None:
    """What a holder on another machine left, whose flock does not reach this one."""
    known = {
        "host": "far-away",
        "pid": os.getpid(),
        "boot": "another",
        "start": 1,
        "token": "t",
        "beat": beat,
    }
    descriptor = os.open(folder / locks.FILE, os.O_WRONLY | os.O_CREAT)
    os.pwrite(
        descriptor, f"{json.dumps(known):{locks.SIZE_BYTES}}".encode(), 0
    )  # in place, as holders do
    os.close(descriptor)


def test_a_living_process_keeps_its_folder_whatever_the_clock_says(tmp_path, never_watched):
    process, _ = holding(tmp_path)
    for moment in (1, time.time() + 7200):
        os.utime(tmp_path / locks.FILE, (moment, moment))
        with pytest.raises(
            UserError,
            match=f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}$",
        ):
            locks.take(tmp_path)
    assert locks.holder(tmp_path).pid == process.pid and locks.holder(tmp_path).lives
    end(process)


def test_a_killed_process_has_nothing_from_then_on(tmp_path, never_watched):
    process, _ = holding(tmp_path)
    end(process)
    assert locks.holder(tmp_path) is None
    locks.take(tmp_path)
    assert locks.holder(tmp_path) == locks.own(tmp_path)
    locks.release(tmp_path)
    assert locks.holder(tmp_path) is None and locks.own(tmp_path) is None


def test_the_lock_lasts_until_what_inherited_it_has_ended(tmp_path, never_watched):
    process, child = holding(tmp_path, "child")
    end(process)
    with pytest.raises(
        locks.Taken,
        match=f"process {process.pid} .* which was killed; processes it started are still ending",
    ):
        locks.take(tmp_path)
    assert not locks.holder(tmp_path).lives
    os.kill(int(child), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while locks.holder(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    locks.take(tmp_path)
    locks.release(tmp_path)


def test_of_several_that_want_it_at_once_one_gets_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    several = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(3)
    ]
    said = [process.stdout.readline() for process in several]  # the losers end, the winner stays
    assert sorted(said) == ["", "", "has it\n"]
    assert locks.holder(tmp_path).pid == several[said.index("has it\n")].pid
    for process in several:
        end(process)


def test_a_lock_of_another_machine_is_held_while_its_with_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WATCH_S", 30.0)
    of_another_machine(tmp_path)
    over, said = threading.Event(), []

    def count() -> None:
        beat = 0
        while not over.wait(0.05):
            of_another_machine(tmp_path, beat := beat + 1)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(locks.Taken, match=r"in use by process .* on far-away"):
            locks.take(tmp_path, said.append)
        assert "far-away: watching for 30 s" in said[0]
        assert locks.holder(tmp_path).host == "far-away"
    finally:
        over.set()
        thread.join()
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    assert locks.holder(tmp_path) is None
    locks.take(tmp_path)
    locks.release(tmp_path)


def test_a_listing_does_not_watch_another_machines_lock(tmp_path, never_watched):
    of_another_machine(tmp_path)
    assert locks.holder(tmp_path, watch=False).host == "far-away"
    os.utime(tmp_path / locks.FILE, (1, 1))
    assert locks.holder(tmp_path, watch=False) is None


def test_a_file_system_without_flock_goes_by_the_count(tmp_path, monkeypatch):
    process, _ = holding(tmp_path)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "WATCH_S", 30.0)
    with pytest.raises(locks.Taken, match=f"process {process.pid} on"):
        locks.take(tmp_path)
    end(process)
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    locks.take(tmp_path)
    locks.release(tmp_path)


def test_a_folder_without_a_lock_file_or_with_a_damaged_one_is_free(tmp_path, never_watched):
    assert locks.holder(tmp_path / "absent") is None and locks.holder(tmp_path) is None
    for text in ("", "{", "[]", '{"pid": "x"}'):
        (tmp_path / locks.FILE).write_text(text)
        assert locks.holder(tmp_path) is None
        locks.take(tmp_path)
        locks.release(tmp_path)


def test_a_folder_that_is_gone_cannot_be_had(tmp_path):
    with pytest.raises(FileNotFoundError):
        locks.take(tmp_path / "absent")
