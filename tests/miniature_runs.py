"""Miniatures that tests train as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(outdir: Path, *words: str) -> Path:
    """What ``make`` with ``words`` leaves in ``outdir``; its one run directory."""
    command = [sys.executable, "-m", "harness", "target", *words, "DEVICE=cpu", f"OUTDIR={outdir}"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next(outdir.iterdir())


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
