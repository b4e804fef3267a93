"""How long the first `make 101` of a fresh clone takes, with packages cached: set-up and run.

    .venv/bin/python benchmarks/first_run.py [COMMIT…]       default: HEAD; takes minutes, 5 GB of disk

Several commits are measured in turn, so that they share the load of the machine. A round before
them fills the caches of uv and pip. CPU seconds tell more than wall seconds where others compute.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 2
# Settings of this shell would make the clones share an environment or an upstream tree.
PRIVATE = ("VENV", "VIRTUAL_ENV", "PYTHON", "OUTDIR", "MEGATRON_LM")


def first_run_s(commit: str) -> tuple[float, float]:
    """Clone ``commit`` and run 101 in it; returns (wall, CPU) in seconds, without the clone."""
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    with tempfile.TemporaryDirectory(dir=ROOT.parent) as folder:
        subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(["make", "101"], cwd=folder, env=environment, check=True)
        wall_s = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(commits: list[str]) -> None:
    measured = {commit: [] for commit in commits}
    for number in range(ROUNDS + 1):
        for commit in commits:
            taken = first_run_s(commit)
            if number:
                measured[commit].append(taken)
    for commit, pairs in measured.items():
        wall_s, cpu_s = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"first make 101 at {commit}: {wall_s:.0f} s, {cpu_s:.0f} s of CPU, n = {len(pairs)}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["HEAD"])
