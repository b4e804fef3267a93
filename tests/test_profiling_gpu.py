"""A real trace of a real GPU: kernels are found, known, paired with their launches, and add up."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.profiling.kernels import Category
from harness.profiling.profile import find
from harness.profiling.trace import read
from harness.run.directory import RunDir

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.gpu
def test_a_trace_of_101(tmp_path):
    words = ["101", "DEVICE=cuda", f"OUTDIR={tmp_path}", "STEPS=14", "PROFILE=8-9", "DATA=mock"]
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "steps 8 to 9, ms per step and share of it" in done.stdout, (
        done.stdout + done.stderr
    )
    found = find(tmp_path, tmp_path, "101")
    run, (rank,) = RunDir(tmp_path / found.label), found.ranks
    assert sum(rank.categories.values()) == pytest.approx(rank.step_ms)
    assert sum(rank.phases.values()) == pytest.approx(rank.step_ms)
    for category in (Category.GEMM, Category.ATTENTION, Category.ELEMENTWISE, Category.OPTIMIZER):
        assert rank.categories[category] > 0, category
    assert rank.categories[Category.OTHER] < 0.02 * rank.step_ms, rank.unknown
    assert min(rank.phases["forward"], rank.phases["backward"], rank.phases["optimizer"]) > 0
    activities = read(run.traces / "0.json.gz", "cuda").activities
    assert sum(activity.launched is None for activity in activities) < 0.01 * len(activities)
    for step in run.read_metrics():
        assert min(step.forward_backward_ms, step.optimizer_ms) > 0
        assert step.forward_backward_ms + step.optimizer_ms < step.step_ms
