"""Upstream's training loop on the CPU, through torchrun: what a run records, and how it ends when something breaks."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.launching.processes import lives
from harness.parity import DENSE, LAYOUTS, MOE, flags, tiny
from harness.run.directory import RUN_DIR_VARIABLE, RunDir
from harness.upstreams.megatron_lm.environment import variables

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent


def torchrun(experiment, run_dir, *arguments, agent=(), **environment) -> subprocess.Popen:
    """Start ``experiment`` as its script would, with ``arguments`` at the end; its output goes into ``run_dir``."""
    run_dir.mkdir(exist_ok=True)
    agent = agent or ("--standalone", f"--nproc-per-node={experiment.world_size}")
    command = [sys.executable, "-m", "torch.distributed.run", *agent, "-m", "harness.entry"]
    command += [*flags(experiment), *arguments]
    settings = {variable.name: variable.value for variable in variables(experiment, "cpu")}
    settings |= {RUN_DIR_VARIABLE: str(run_dir), **environment}
    with (run_dir / "logs.txt").open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
        )


def finished(process: subprocess.Popen, run_dir: Path) -> RunDir:
    """Wait for a run that ought to succeed."""
    status = process.wait(timeout=300)
    assert status == 0, (run_dir / "logs.txt").read_text()[-4000:]
    return RunDir(run_dir)


def eventually(read):
    for _ in range(3000):
        if value := read():
            return value
        time.sleep(0.02)
    raise AssertionError("did not happen")


def test_what_a_run_records(tmp_path):
    experiment = tiny(DENSE, {"dp": 2, "steps": 5, "eval_interval": 1})
    run = finished(torchrun(experiment, tmp_path / "run", "--eval-iters", "1"), tmp_path / "run")
    steps = run.read_metrics()
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step.grad_norm > 0 and step.step_ms > 0 and step.tflops > 0
        assert step.tokens_per_s == pytest.approx(8 * 32 / step.step_ms * 1e3)
        assert (step.skipped, step.nan, step.loss_scale, step.learning_rate) == (0, 0, 1.0, 1e-3)
    assert [(line.step, line.split) for line in run.read_validation()] == [
        (1, "validation"),
        (2, "validation"),
        (3, "validation"),
        (4, "validation"),
        (5, "validation"),
        (5, "test"),
    ]
    assert len(run.validation.read_text().splitlines()) == 6, (
        "the last step's weights have one loss on held-out data"
    )
    assert all(5 < line.loss < 6 for line in run.read_validation())
    ranks = run.read_ranks()
    assert [rank.coordinates["dp"] for rank in ranks] == [0, 1]
    assert all(rank.step == 5 and rank.rss_peak_gib > 0.1 for rank in ranks)
    assert all(0 < rank.launch.add_us < rank.launch.operation_us for rank in ranks)
    assert not run.read_rank_errors() and not run.stacks()


def test_the_records_are_what_upstream_logs(tmp_path):
    """Upstream's line rounds; its second line averages the first two steps, the others are of one step."""
    run = finished(torchrun(tiny(DENSE, {"steps": 5}), tmp_path / "run"), tmp_path / "run")
    line = re.compile(
        r"iteration +(\d+)/.*per iteration \(ms\): ([\d.]+) .*lm loss: (\S+) .*grad norm: ([\d.]+) "
    )
    logged = {int(step): values for step, *values in line.findall(run.logs.read_text())}
    for step in run.read_metrics():
        if step.step != 2:
            assert logged[step.step] == [
                f"{step.step_ms:.1f}",
                f"{step.loss:.6E}",
                f"{step.grad_norm:.3f}",
            ]
    first, second = run.read_metrics()[:2]
    assert float(logged[2][1]) == pytest.approx((first.loss + second.loss) / 2, rel=1e-6)
    assert float(logged[2][0]) == pytest.approx((first.step_ms + second.step_ms) / 2, abs=0.1)


def test_without_a_run_directory_nothing_is_written(tmp_path):
    process = torchrun(tiny(DENSE, {"steps": 1}), tmp_path / "run", **{RUN_DIR_VARIABLE: ""})
    finished(process, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs.txt"]


def test_no_noise_at_the_end(tmp_path):
    run = finished(torchrun(tiny(DENSE, {"steps": 1, "pp": 2}), tmp_path / "run"), tmp_path / "run")
    end = run.logs.read_text().partition("after training is done")[2]
    assert end.count("\n") <= 2


def test_bad_arguments_end_every_rank(tmp_path):
    process = torchrun(tiny(DENSE, {"tp": 2}), tmp_path / "run", "--num-attention-heads", "5")
    assert process.wait(timeout=120) != 0
    errors = RunDir(tmp_path / "run").read_rank_errors()
    assert errors and all(error.type and error.step == 0 for error in errors)


def test_half_a_submodule_is_said_so(tmp_path):
    (tmp_path / "tree").mkdir()
    process = torchrun(tiny(DENSE, {"dp": 2}), tmp_path / "run", MEGATRON_LM=str(tmp_path / "tree"))
    assert process.wait(timeout=120) != 0
    run = RunDir(tmp_path / "run")
    assert [error.type for error in run.read_rank_errors()] == ["UserError"]
    log = run.logs.read_text()
    assert (
        log.startswith("error: MEGATRON_LM is not a complete Megatron-LM")
        and "git submodule update --init" in log
    )


@pytest.fixture
def long_run(tmp_path):
    """A run of two ranks in the middle of its training."""
    process = torchrun(tiny(DENSE, {"pp": 2, "steps": 100000}), tmp_path / "run")
    run = RunDir(tmp_path / "run")
    eventually(lambda: len(run.read_metrics()) > 2)
    yield process, run
    process.kill()
    process.wait()


def gone(run: RunDir) -> bool:
    pids = {rank.pid for rank in run.read_ranks()}
    return not any(process.pid in pids and lives(process) for process in psutil.process_iter())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(long_run, rank):
    process, run = long_run
    os.kill(run.read_ranks()[rank].pid, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert eventually(lambda: gone(run))
    assert "SIGKILL" in run.logs.read_text()
    assert len(run.read_metrics()) > 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_torchrun(long_run, number):
    process, run = long_run
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert eventually(lambda: gone(run))


@pytest.mark.full
def test_two_nodes_train_as_one(tmp_path):
    """Two agents meet on loopback, each with its own warm process; the losses are those of one node."""
    experiment = tiny(DENSE, {"tp": 2, "dp": 2})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--nproc-per-node=2",
    )
    agents = [
        torchrun(experiment, tmp_path / "two", agent=(f"--node-rank={rank}", *nodes))
        for rank in (0, 1)
    ]
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0], (
        tmp_path / "two" / "logs.txt"
    ).read_text()[-4000:]
    two, one = (
        RunDir(tmp_path / "two"),
        finished(torchrun(experiment, tmp_path / "one"), tmp_path / "one"),
    )
    assert [step.loss for step in two.read_metrics()] == [step.loss for step in one.read_metrics()]
    assert [(rank.rank, rank.local_rank) for rank in two.read_ranks()] == [
        (0, 0),
        (1, 1),
        (2, 0),
        (3, 1),
    ]


def test_asynchronous_checkpoints(tmp_path):
    """Upstream writes them from a process that multiprocessing starts, where the stand-in must be as well."""
    saving = (
        "--save",
        str(tmp_path / "saved"),
        "--save-interval",
        "2",
        "--async-save",
        "--async-strategy",
        "mcore",
        "--use-persistent-ckpt-worker",
    )
    finished(
        torchrun(tiny(DENSE, {"dp": 2, "steps": 4}), tmp_path / "run", *saving), tmp_path / "run"
    )
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_precision_dropout_and_recompute(tmp_path):
    experiment = tiny(
        DENSE,
        {"tp": 2, "sequence_parallel": True, "precision": "bf16", "recompute": "full", "steps": 4},
    )
    dropout = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")
    run = finished(torchrun(experiment, tmp_path / "run", *dropout), tmp_path / "run")
    losses = [step.loss for step in run.read_metrics()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "CPU RNG state changed" not in run.logs.read_text()


@pytest.mark.skipif(
    "MEGATRON_LM" not in os.environ, reason="no source tree of upstream: set MEGATRON_LM"
)
@pytest.mark.skipif(
    (ROOT / "megatron-lm" / "pretrain_gpt.py").exists(), reason="the submodule hides the wheel"
)
@pytest.mark.parametrize("layout", ["tp2 sp", "pp2 vpp2", "ep2 zero"])
def test_the_wheel_trains_as_the_source_tree_does(tmp_path, layout):
    model, changes = LAYOUTS[layout]
    losses = []
    for name, environment in {"tree": {}, "wheel": {"MEGATRON_LM": ""}}.items():
        process = torchrun(tiny(model, changes), tmp_path / name, **environment)
        losses.append([step.loss for step in finished(process, tmp_path / name).read_metrics()])
    assert len(losses[0]) == 10 and losses[0] == losses[1]


def test_an_unknown_upstream_is_refused(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("__shortversion__ = '0.20.0'")
    ask = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from harness import cpu; cpu.install()"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-2].startswith(
        "harness.errors.UserError: megatron.core 0.20.0 does not run on a CPU"
    )


EIGHT = {
    "pp8": (DENSE, {"pp": 8}),
    "tp8 sp": (DENSE, {"tp": 8, "sequence_parallel": True}),
    "tp2 sp pp4 vpp3": (DENSE, {"tp": 2, "sequence_parallel": True, "pp": 4, "vpp": 3}),
    "cp8 p2p": (DENSE, {"cp": 8, "cp_comm_type": "p2p"}),
    "cp8 a2a": (DENSE, {"cp": 8, "cp_comm_type": "a2a"}),
    "cp8 a2a+p2p": (DENSE, {"cp": 8, "cp_comm_type": "a2a+p2p"}),
    "dp8 zero": (DENSE, {"dp": 8, "micro_batch_size": 1, "sharding": "optim"}),
    "ep8 zero": (MOE, {"dp": 8, "micro_batch_size": 1, "ep": 8, "sharding": "optim"}),
    "ep4 etp2": (MOE, {"tp": 2, "sequence_parallel": True, "dp": 4, "ep": 4, "etp": 2}),
}


@pytest.mark.full
@pytest.mark.parametrize("layout", EIGHT)
def test_eight_processes(tmp_path, layout):
    model, changes = EIGHT[layout]
    layers = 12 if "vpp" in changes else 8
    larger = {
        "num_layers": layers,
        "num_attention_heads": 8,
        **({"num_experts": 8} if model is MOE else {}),
    }
    experiment = tiny(model.model_copy(update=larger), {**changes, "steps": 6})
    run = finished(torchrun(experiment, tmp_path / "run"), tmp_path / "run")
    losses = [step.loss for step in run.read_metrics()]
    assert len(losses) == 6 and losses[-1] < losses[0]
    ranks = run.read_ranks()
    assert len(ranks) == 8
    for name in ("tp", "pp", "cp"):
        assert {rank.coordinates[name] for rank in ranks} == set(range(getattr(experiment, name)))
