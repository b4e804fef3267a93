"""A real Slurm on loopback, for tests: munge, one controller and two nodes in a temporary folder.

Needs Debian's packages ``slurm-wlm`` and ``munge``; no service of the machine is used or changed.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PLACES = "/usr/sbin:/sbin"
NODES = (socket.gethostname(), f"{socket.gethostname()}-b")
"""The first, by alphabet, has a name that resolves: nodes of a run meet there."""

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=requeue_setup_env_fail,sched_min_interval=0,batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
SlurmctldTimeout=10
InactiveLimit=0
KillWait=5
OverTimeLimit=0
MinJobAge=300
RebootProgram=/bin/false
{nodes}
PartitionName=main Nodes={first},{second} Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=short Nodes={first} MaxTime=00:10:00 State=UP
"""
SLURMD_TIMEOUT_S = 15
"""A node whose slurmd is silent for this long is down, and its jobs are requeued."""


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    there = os.environ["PATH"] + ":" + PLACES
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=there)]:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return None


@dataclass
class Cluster:
    """A running cluster; its commands take ``environment``."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def command(self, *words: str, check: bool = True) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or not done.returncode, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; empty where Slurm has forgotten the job."""
        shown = self.command("scontrol", "show", "job", number, "--oneliner", check=False)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> object:
        """What ``condition`` returns as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.state()}"
            time.sleep(0.1)
        return found

    def wait_for_state(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """The job's fields once its state is one of ``states``."""

        def reached() -> dict[str, str] | None:
            job = self.job(number)
            return job if job.get("JobState") in states else None

        return self.wait_for(reached, seconds, f"job {number} {' or '.join(states)}")

    def state(self) -> str:
        """Jobs and nodes, for a message."""
        jobs = self.command("squeue", "--all", "--states=all", check=False)
        return jobs + self.command("sinfo", "--Node", "--long", check=False)

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node``."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to the slurmd of ``node`` alone: what it started runs on."""
        slurmd = self.daemons.pop(node)
        slurmd.kill()
        slurmd.wait()

    def start_dead_nodes(self) -> None:
        """Start the slurmd of each node that has none."""
        for node in NODES:
            if node not in self.daemons:
                self.start_node(node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the slurmd of ``node`` and to all that it started, as in a power failure.

        All stop first: a slurmstepd that outlives its task would report how it ended.
        """
        import psutil

        slurmd = self.daemons.pop(node)
        mark = {"SLURMD_NODENAME": node, "SLURM_CONF": self.environment["SLURM_CONF"]}
        tasks = [p for p in psutil.process_iter(["environ"]) if _has(p, mark)]
        steps = {
            parent for task in tasks for parent in task.parents() if "slurmstepd" in parent.name()
        }
        found = [*steps, *(task for task in tasks if task not in steps)]
        slurmd.kill()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with suppress(psutil.Error):
                    process.send_signal(number)
        slurmd.wait()

    def _start(self, name: str, *words: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def start(self) -> None:
        """Start munge, the controller and the nodes; return once both nodes are idle."""
        key, socket_ = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folders = [f"--{kind}={self.folder}/munge.{kind.split('-')[0]}" for kind in ("pid-file",)]
        self._start(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=2"),
            *(f"--key-file={key}", f"--socket={socket_}", *folders),
            *(f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log"),
        )
        self.wait_for_munge(socket_)
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_for(self._both_idle, 60, "two idle nodes")

    def wait_for_munge(self, socket_: Path) -> None:
        deadline = time.monotonic() + 20
        while not socket_.exists():
            assert time.monotonic() < deadline, (self.folder / "munged.out").read_text()
            time.sleep(0.05)

    def _both_idle(self) -> bool:
        states = self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return bool(states) and set(states) == {"idle"}

    def stop(self) -> None:
        """Cancel every job and end every daemon."""
        if "slurmctld" in self.daemons:
            self.command("scancel", "--user", getpass.getuser(), check=False)
            with suppress(AssertionError):
                self.wait_for(lambda: not self.command("squeue", "-h", check=False), 20, "no job")
        for daemon in reversed(list(self.daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster for the time of this context, in a folder of its own."""
    # a short path: the socket's name is limited to 107 bytes; not below pytest's private folder,
    # since munge wants a path that others may enter
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16"
            f" RealMemory={memory_mib} Features={features} State=UNKNOWN"
            for node, port, features in zip(NODES, ports[1:], ("cpu,old", "cpu,new"), strict=True)
        ]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                first=NODES[0],
                second=NODES[1],
                user=getpass.getuser(),
                folder=folder,
                controller_port=ports[0],
                slurmd_timeout_s=SLURMD_TIMEOUT_S,
                nodes="\n".join(lines),
            )
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "slurm.conf").chmod(0o644)
        environment = {key: v for key, v in os.environ.items() if not key.startswith("SLURM")}
        environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{PLACES}",
        }
        cluster = Cluster(folder, environment)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _has(process, mark: dict[str, str]) -> bool:
    return mark.items() <= (process.info["environ"] or {}).items()
