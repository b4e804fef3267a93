"""Jobs on a real Slurm: a controller and two nodes on this machine (slurm_cluster.py) train CPU miniatures."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT
from harness.run import checkpoints
from harness.run.directory import RunDir

sys.path.insert(0, str(Path(__file__).parent))
import slurm_cluster

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.full,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or ""),
]
LONG = ("101", "SLURM=1", "DEVICE=cpu", "STEPS=100000", "EVAL_STEPS=0", "TIME=00:20:00")


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.running() as running:
        # several nodes find each other by this machine's name, which need not have an address
        running.environment["GLOO_SOCKET_IFNAME"] = "lo"
        yield running


class Jobs:
    """Commands about the jobs of one output directory."""

    def __init__(self, cluster, outdir: Path) -> None:
        self.cluster, self.outdir = cluster, outdir

    def make(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "harness", *words, f"OUTDIR={self.outdir}"],
            cwd=ROOT,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> list[str]:
        """The numbers of the jobs that ``run`` submits."""
        said = self.make("run", *words)
        return re.search(r"submitted jobs? ([\d, ]+):", said)[1].split(", ")

    def run(self) -> RunDir:
        """The only run there is."""
        (path,) = [path for path in self.outdir.iterdir() if path.is_dir()]
        return RunDir(path)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            found = list(self.outdir.glob("*/metrics.jsonl"))
            return bool(found) and any(
                m.step >= step for m in RunDir(found[0].parent).read_metrics()
            )

        self.cluster.wait_for(reached, 180, f"step {step}")

    def wait_for_save(self, step: int) -> None:
        """Wait for a checkpoint of ``step`` or later that is complete on the disk."""

        def saved() -> bool:
            found = list(self.outdir.glob("*/saves.jsonl"))
            return bool(found) and any(s.step >= step for s in RunDir(found[0].parent).read_saves())

        self.cluster.wait_for(saved, 180, f"a checkpoint of step {step}")

    def wait_for_restart(self, job: str) -> None:
        """Wait until Slurm has the job in its queue again, then have it start without delay.

        Slurm lets a requeued job wait for two minutes, so that no node refuses its new credential
        as the revoked one. A few seconds are enough.
        """
        self.cluster.wait_for(lambda: self.cluster.job(job).get("Restarts") == "1", 120, "requeued")
        self.cluster.wait_for_state(job, "PENDING")  # after what is left of it has ended
        time.sleep(5)
        self.cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.cluster.wait_for_state(job, "RUNNING", seconds=60)

    def resumed_at(self) -> int:
        """The step at which the run was resumed, once it was."""

        def steps() -> tuple[int, ...]:
            running = self.run().read_running()
            return running.resumed_at if running else ()

        return self.cluster.wait_for(steps, 120, "resumed")[0]

    def output(self, job: str) -> str:
        path = self.outdir / f"slurm-{job}.txt"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def jobs(cluster, tmp_path):
    yield Jobs(cluster, tmp_path)
    cluster.command("scancel", "--user", str(os.getuid()), check=False)
    cluster.start_dead_nodes()
    cluster.wait_for(lambda: not cluster.command("squeue", "--noheader"), 60, "no job")


def test_a_job_is_submitted_followed_and_its_result_shown(jobs):
    (job,) = jobs.submit("101", "SLURM=1", "DEVICE=cpu", "STEPS=12")
    said = jobs.make("jobs", f"JOB={job}")
    assert f"job {job} running" in said and f"job {job} completed" in said
    assert "12/12  loss" in said and ": ok, 12 of 12 steps" in said
    assert re.search(rf"^{job} +completed .* ok, step 12 of 12, loss \d", jobs.make("jobs"), re.M)


def test_two_nodes_train_as_one_run(jobs):
    (job,) = jobs.submit("219", "SLURM=1", "DEVICE=cpu", "NODES=2", "STEPS=3", "ARGS=--lr 1e-4")
    said = jobs.make("jobs", f"JOB={job}")
    assert ": ok, 3 of 3 steps" in said and "node 1" in said
    assert jobs.cluster.job(job)["NumNodes"] == "2"


def test_before_its_time_limit_a_job_saves_and_goes_on_in_the_same_run(jobs):
    """Slurm knows minutes only, and ends a job at 2:00 that asked for 1:20; USR1 comes 60 s before."""
    (job,) = jobs.submit(*LONG[:-1], "SAVE_EVERY=99999", "TIME=00:01:20", "GRACE=60")
    jobs.wait_for_restart(job)
    first = jobs.resumed_at()
    assert [save.step for save in jobs.run().read_saves()] == [first]
    assert f"ended before the time limit of its job after step {first} of 100000" in jobs.output(
        job
    )
    jobs.wait_for_step(first + 3)
    steps = [m.step for m in jobs.run().read_metrics()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > first


def test_two_nodes_save_and_go_on_together(jobs):
    (job,) = jobs.submit("219", *LONG[1:], "NODES=2", "SAVE_EVERY=99999")
    jobs.wait_for_step(2)
    jobs.cluster.command("scancel", "--batch", "--signal=USR1", job)  # as before its time limit
    jobs.wait_for_restart(job)
    assert jobs.resumed_at() >= 2
    earlier = json.loads((jobs.run().path / "result.1.json").read_text())
    assert earlier["detail"].startswith("ended before the time limit of its job after step")


ARRAY = """
from harness.experiment.catalog import load_catalog
from harness.launching import submission
from harness.planning.plan import plan

settings = {{"STEPS": "2", "OUTDIR": "{}"}}
plans = [plan(load_catalog().find(id_), settings, "cpu") for id_ in ("101", "111")]
submission.submit_all(plans, settings, "chapter-100")
"""


def test_experiments_of_one_size_run_as_an_array(jobs):
    said = subprocess.run(
        [sys.executable, "-c", ARRAY.format(jobs.outdir)],
        cwd=ROOT,
        env=jobs.cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    job = re.search(r"submitted job (\d+): 2 experiments of chapter-100", said)[1]
    for task, id_ in ((0, "101"), (1, "111")):
        followed = jobs.make("jobs", f"JOB={job}_{task}")
        assert f"{id_}-" in followed and ": ok, 2 of 2 steps" in followed
    assert len(re.findall(rf"^{job}_[01] +completed ", jobs.make("jobs", f"JOB={job}"), re.M)) == 2


def test_cancel_ends_a_job_with_a_checkpoint(jobs):
    (job,) = jobs.submit(*LONG, "SAVE_EVERY=99999")
    jobs.wait_for_step(3)
    assert f"canceled job {job} once its run has ended" in jobs.make("cancel", f"JOB={job}")
    jobs.cluster.wait_for_state(job, "CANCELLED")
    assert "ended because its job was canceled after step" in jobs.output(job)
    (saved,) = checkpoints.in_folder(jobs.run().checkpoints)
    assert saved.damage is None and saved.step >= 3
    assert f"job {job} is over" in jobs.make("cancel", f"JOB={job}", status=2)


def test_a_job_whose_only_node_fails_goes_on_elsewhere_from_its_last_checkpoint(jobs):
    (job,) = jobs.submit(*LONG, "SAVE_EVERY=5", "KEEP=2")
    jobs.wait_for_save(5)
    node = jobs.cluster.job(job)["NodeList"]
    jobs.cluster.kill_node(node)
    last = jobs.run().read_metrics()[-1].step
    jobs.wait_for_restart(job)
    assert 5 <= jobs.resumed_at() <= last and jobs.cluster.job(job)["NodeList"] != node


def test_what_a_killed_slurmd_leaves_running_saves_and_hands_over(jobs):
    """Slurm starts the job on another node while its earlier start, which it cannot reach, trains on."""
    (job,) = jobs.submit(*LONG, "SAVE_EVERY=99999")
    jobs.wait_for_step(2)
    node = jobs.cluster.job(job)["NodeList"]
    jobs.cluster.kill_slurmd(node)
    jobs.wait_for_restart(job)
    (save,) = jobs.cluster.wait_for(lambda: jobs.run().read_saves(), 120, "a checkpoint")
    assert jobs.resumed_at() == save.step and jobs.cluster.job(job)["NodeList"] != node
    earlier = json.loads((jobs.run().path / "result.1.json").read_text())
    assert earlier["detail"].startswith("ended because its job was started again elsewhere")
    jobs.wait_for_step(save.step + 2)
    assert jobs.cluster.job(job)["Restarts"] == "1"


def test_a_job_that_loses_one_of_two_nodes_goes_on_with_both_again(jobs):
    words = ("219", *LONG[1:], "NODES=2", "SAVE_EVERY=2", "KEEP=2")
    (job,) = jobs.submit(*words)
    jobs.wait_for_save(2)
    jobs.cluster.kill_node(slurm_cluster.NODES[1])
    jobs.cluster.wait_for(lambda: jobs.cluster.job(job).get("Restarts") == "1", 120, "requeued")
    jobs.cluster.start_dead_nodes()
    jobs.wait_for_restart(job)
    assert jobs.resumed_at() >= 2


def test_the_jobs_of_a_chain_continue_one_run(jobs):
    first, second = jobs.submit(*LONG, "SAVE_EVERY=99999", "CHAIN=2")
    assert jobs.cluster.job(second)["Dependency"].startswith(f"afterany:{first}")
    jobs.wait_for_step(3)
    jobs.cluster.command("scancel", "--batch", "--signal=USR1", first)  # as before its time limit
    jobs.cluster.wait_for_state(second, "RUNNING")
    assert jobs.resumed_at() >= 3
    assert jobs.cluster.job(first)["Restarts"] == "0", "the next of the chain goes on"
    assert jobs.run().read_running().job == first
    assert jobs.make("cancel", f"JOB={second}", "FORCE=1")


def test_what_the_cluster_does_not_offer_is_refused_before_it_is_submitted(jobs):
    for words, said in (
        (["PARTITION=shrot"], "PARTITION=shrot; did you mean short?"),
        (["PARTITION=short", "TIME=01:00:00"], "partition short ends jobs after 600 s"),
        (["CONSTRAINT=newer"], "CONSTRAINT=newer: no node of partition main has that"),
        (["PARTITION=short", "NODES=2", "TIME=5"], "NODES=2: partition short has 1"),
    ):
        assert said in jobs.make("run", "219", "SLURM=1", "DEVICE=cpu", *words, status=2)
    assert not jobs.cluster.command("squeue", "--noheader")
    (job,) = jobs.submit("101", "SLURM=1", "DEVICE=cpu", "STEPS=2", "CONSTRAINT=new")
    jobs.cluster.wait_for_state(job, "COMPLETED", seconds=120)
    assert jobs.cluster.job(job)["NodeList"] == slurm_cluster.NODES[1]
