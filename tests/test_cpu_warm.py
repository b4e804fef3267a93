"""One warm process forks every rank, and torchrun cannot tell: statuses, signals and deaths are those of the ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.entry import warm

ROOT = Path(__file__).resolve().parent.parent
RANKS = 3

# What torchrun starts. The rank says who it is, then does what the test wants of it.
RANK = """
import os, signal, sys, time
from pathlib import Path
from harness.entry import warm
from harness.system.orphans import end_with

here = Path(sys.argv[1])
end_with(os.getppid())
warm.become_rank(lambda: (here / "prepared").open("a").write(f"{os.getpid()}\\n"))
rank = os.environ["RANK"]
print(f"output of {rank}", flush=True)
(here / f"{rank}.pid").write_text(str(os.getpid()))
while len(list(here.glob("*.pid"))) < int(os.environ["LOCAL_WORLD_SIZE"]):
    time.sleep(0.01)
exec(sys.argv[2])
"""

# A torchrun reduced to its bones: it starts the ranks, each with its environment and output, and waits for them.
TORCHRUN = """
import os, subprocess, sys
from pathlib import Path
here, ranks = Path(sys.argv[1]), int(sys.argv[3])
started = []
for rank in range(ranks):
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(here / "rank.py"), sys.argv[1], sys.argv[2]]
    with (here / f"{rank}.out").open("w") as output:
        started.append(subprocess.Popen(command, env=environment, stdout=output))
(here / "torchrun").write_text(" ".join(str(process.pid) for process in started))
print([process.wait() for process in started])
"""


class Job:
    """The processes of one fake torchrun."""

    def __init__(self, here: Path, work: str) -> None:
        self.here = here
        (here / "rank.py").write_text(RANK)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TORCHRUN, str(here), work, str(RANKS)]
        self.torchrun = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        )

    def statuses(self) -> list[int]:
        """Wait for all; the exit statuses as torchrun sees them."""
        return eval(self.torchrun.communicate(timeout=300)[0])

    def ranks(self) -> list[int]:
        """The pids of the forks, once all run."""
        return [
            int(_eventually(lambda rank=rank: (self.here / f"{rank}.pid").read_text()))
            for rank in range(RANKS)
        ]

    def started(self) -> list[int]:
        """The pids that torchrun started, once it has."""
        return [
            int(pid) for pid in _eventually(lambda: (self.here / "torchrun").read_text()).split()
        ]


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start(work: str) -> Job:
        jobs.append(Job(tmp_path, work))
        return jobs[-1]

    yield start
    for job in jobs:
        job.torchrun.kill()
        job.torchrun.wait()


def _eventually(read):
    for _ in range(6000):
        try:
            if value := read():
                return value
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError("did not happen")


def _gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return not any(alive(pid) for pid in pids)


def test_prepared_once_and_every_rank_speaks_for_itself(start, tmp_path):
    job = start("pass")
    assert job.statuses() == [0] * RANKS
    assert len((tmp_path / "prepared").read_text().splitlines()) == 1
    for rank in range(RANKS):
        assert (tmp_path / f"{rank}.out").read_text() == f"output of {rank}\n"


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("ending", "status"),
    [("os._exit(7)", 7), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_a_rank_ends_its_process_as_it_ended(start, rank, ending, status):
    job = start(f"if rank == '{rank}':\n    {ending}")
    assert job.statuses()[rank] == status


def test_the_first_ranks_failure_ends_all(start):
    job = start("time.sleep(1 if rank == '0' else 60); sys.exit(5)")
    assert job.statuses() == [5, -signal.SIGTERM, -signal.SIGTERM]
    assert _eventually(lambda: _gone(job.ranks()))


def test_signals_reach_the_rank(start):
    job = start("""
def end(*_):
    (here / f"{rank}.ended").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, end)
(here / f"{rank}.ready").touch()
time.sleep(60)
""")
    for event in ("ready", "ended"):
        for rank in range(RANKS):
            assert _eventually((job.here / f"{rank}.{event}").exists)
        if event == "ready":
            for pid in job.started():
                os.kill(pid, signal.SIGTERM)
    assert job.statuses() == [0] * RANKS


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_killed_process_takes_its_rank_with_it(start, victim):
    job = start("time.sleep(60)")
    ranks = job.ranks()
    os.kill(job.started()[victim], signal.SIGKILL)
    assert _eventually(lambda: _gone(ranks if victim == 0 else [ranks[victim]]))
    assert victim == 0 or not _gone([ranks[0]])


def test_nothing_outlives_torchrun(start):
    job = start("time.sleep(60)")
    everything = job.ranks() + job.started()
    job.torchrun.kill()
    assert _eventually(lambda: _gone(everything))


def _as_another_user(work) -> int:
    """The exit status of ``work`` in a process of another user; of the group of this one, which must not count."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            work()
        except PermissionError:
            os._exit(13)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def another_user(monkeypatch):
    """Runs ``work`` so that its peer is of another user: in a process of one, where this is root, else as far as it can tell."""
    own = os.getuid()
    if own == 0:
        return _as_another_user

    def pretend(work) -> int:
        with monkeypatch.context() as patched:
            patched.setattr(warm.os, "getuid", lambda: own + 1)
            try:
                work()
            except PermissionError:
                return 13
        return 0

    return pretend


@pytest.fixture
def door(monkeypatch):
    """The socket of a warm process."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"test-{os.getpid()}")
    address = warm._address()
    monkeypatch.setattr(warm, "_address", lambda: address)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        yield door


def test_a_rank_gives_its_environment_to_no_process_of_another_user(door, another_user):
    """Whoever comes first may take the name of a socket; an environment holds tokens."""
    warm._connect().close()
    assert another_user(lambda: warm._connect()) == 13


def test_the_warm_process_forks_for_no_process_of_another_user(door, another_user):
    def knock() -> None:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(warm._address())
            environment = b'{"A": "1"}'
            socket.send_fds(link, [warm.NUMBER.pack(len(environment))], [1, 2])
            link.sendall(environment)

    knock()
    link, environment, outputs = warm._accept(door)
    assert environment == {"A": "1"} and len(outputs) == 2
    for descriptor in outputs:
        os.close(descriptor)
    link.close()
    if os.getuid() == 0:
        assert another_user(knock) == 0
        with pytest.raises(PermissionError, match="of another user uses this run's socket"):
            warm._accept(door)
    else:
        knock()
        assert another_user(lambda: warm._accept(door)) == 13
