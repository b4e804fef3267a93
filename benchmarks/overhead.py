"""Overhead of the harness: `make <id>` against the torchrun command it prints, and on GPUs against
upstream's script.

    .venv/bin/python benchmarks/overhead.py [ID] [STEPS] [PAIRS]     writes
                                                                     benchmarks/overhead-<device>.json

The commands run in turn, pair by pair. Start-up is the time of the whole process less that of its
steps. Step times are upstream's own, from the line it prints for each (median from step 6).
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
FIRST_STEP = 6


def measure(command: list[str], outdir: str) -> tuple[float, float]:
    """Run ``command``; return its start-up in seconds and its median step in milliseconds."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wall_s = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"error: {' '.join(command)[:200]} failed:\n{done.stdout[-2000:]}")
    logs = [path.read_text() for path in Path(outdir).glob("*/logs.txt")]
    steps = {int(m[1]): float(m[2]) for m in STEP.finditer(logs[0] if logs else done.stdout)}
    return wall_s - sum(steps.values()) / 1000, statistics.median(
        ms for step, ms in steps.items() if step >= FIRST_STEP
    )


def main() -> None:
    id_, steps, pairs = (sys.argv[1:] + ["101", "40", "5"][len(sys.argv) - 1 :])[:3]
    show = [sys.executable, "-m", "harness", "show", id_, f"STEPS={steps}"]
    script = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    device = re.search(r"HARNESS_DEVICE=(\w+)", script)[1]
    commands = {
        "harness": ["make", id_, f"STEPS={steps}", "OUTDIR={outdir}"],
        "bare": ["bash", "-c", script],
    }
    if device == "cuda" and "MEGATRON_LM" in os.environ:
        upstream = f"{os.environ['MEGATRON_LM']}/pretrain_gpt.py"
        commands["upstream"] = ["bash", "-c", script.replace("-m harness.entry", upstream)]
    measured = {name: [] for name in commands}
    for _ in range(int(pairs)):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as outdir:
                measured[name].append(
                    measure([word.replace("{outdir}", outdir) for word in command], outdir)
                )
    result = {"id": id_, "steps": int(steps), "device": device, "measured": measured, "against": {}}
    for name in list(commands)[1:]:
        both = list(zip(measured["harness"], measured[name], strict=True))
        result["against"][name] = {
            "startup_s": statistics.median(a[0] - b[0] for a, b in both),
            "step_ratio": statistics.median(a[1] / b[1] for a, b in both),
        }
        cost = result["against"][name]
        print(
            f"{id_} on {device}, {pairs} pairs: harness less {name}: "
            f"start-up {cost['startup_s']:+.2f} s, step x {cost['step_ratio']:.4f}"
        )
    (ROOT / "benchmarks" / f"overhead-{device}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
