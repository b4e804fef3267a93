"""Real traces of real CPU miniatures: data parallel, of one rank; and pipelined, of one rank in each stage."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.profiling.kernels import Category
from harness.profiling.profile import Profile, find
from harness.run.directory import RunDir

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.launching.launch import run_plan
from harness.planning.plan import plan
from harness.profiling.profile import tell

id_, *words = sys.argv[1:]
settings = {"DEVICE": "cpu", "DATA": "mock", **command_line.parse(words)}
finished = run_plan(plan(load_catalog().find(id_), settings, "cpu"))
tell(finished.dir)
sys.exit(finished.exit_status)
"""


def traced(outdir: Path, *words: str) -> tuple[RunDir, Profile]:
    command = [
        sys.executable,
        "-c",
        RUN,
        "101",
        f"OUTDIR={outdir}",
        "STEPS=7",
        "PROFILE=3-4",
        *words,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert "steps 3 to 4, ms per step and share of it" in done.stdout
    found = find(outdir, outdir, "101")
    for rank in found.ranks:
        assert rank.steps == 2
        assert sum(rank.categories.values()) == pytest.approx(rank.step_ms)
        assert sum(rank.phases.values()) == pytest.approx(rank.step_ms)
        assert min(rank.phases["forward"], rank.phases["backward"], rank.phases["optimizer"]) > 0
        assert rank.categories[Category.GEMM] > 0 and rank.categories[Category.OPTIMIZER] > 0
        assert any(kernel.name == "aten::mm" for kernel in rank.kernels)
    return RunDir(outdir / found.label), found


def test_data_parallel(tmp_path):
    run, found = traced(tmp_path, "GPUS=2", "GBS=4")
    assert [rank.rank for rank in found.ranks] == [0]
    assert found.ranks[0].forward_pass.calls == found.ranks[0].backward_pass.calls == 2
    assert any(kernel.name == "gloo:all_reduce" for kernel in found.ranks[0].kernels)
    assert [path.name for path in run.traces.iterdir()] == ["0.json.gz"]
    result = run.read_result()
    assert (
        result.window == (6, 7)
        and result.step_ms.n == 2
        and found.untraced_step_ms == result.step_ms.median
    )
    for step in run.read_metrics():
        assert min(step.forward_backward_ms, step.optimizer_ms) > 0
        assert step.forward_backward_ms + step.optimizer_ms < step.step_ms
    assert result.forward_backward_ms > 0 and all(
        rank.forward_backward_ms > 0 for rank in run.read_ranks()
    )


def test_pipeline_stages(tmp_path):
    run, found = traced(tmp_path, "PP=2", "TP=1", "GBS=3", "MBS=1")
    assert [(rank.rank, rank.coordinates["pp"]) for rank in found.ranks] == [(0, 0), (1, 1)]
    assert all(rank.forward_pass.calls == 3 and rank.communication_ms > 0 for rank in found.ranks)
    assert len({rank.forward_backward_ms for rank in run.read_ranks()}) == 2
