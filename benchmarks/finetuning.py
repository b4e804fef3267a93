"""What docs/finetuning.md shows, as it is typed there: ``make 801``, ``make 802 WEIGHTS=801``, and
every question asked.

    .venv/bin/python benchmarks/finetuning.py        writes benchmarks/finetuning.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.run.finding import candidates  # noqa: E402

SETS = ("toy-chat", "toy-chat-2")


def make(*words: str) -> str:
    """What a make target prints."""
    return subprocess.run(
        ["make", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def trained(id_: str, outdir: str, *words: str) -> dict:
    """Train, and ask: answers as in each data set, the last loss, minutes, and the parameters that
    were trained."""
    make(id_, "DEVICE=cpu", f"OUTDIR={outdir}", *words)
    run = candidates(Path(outdir), id_)[0][0].dir
    steps = run.read_metrics()
    adapters = re.search(r"trains ([\d,]+) of ([\d,]+) parameters", run.logs.read_text())
    found = {
        "loss": steps[-1].loss,
        "steps": len(steps),
        "minutes": sum(step.step_ms for step in steps) / 60_000,
    }
    if adapters:
        found |= dict(
            zip(
                ("trained", "parameters"),
                (int(n.replace(",", "")) for n in adapters.groups()),
                strict=True,
            )
        )
    for name in SETS:
        said = make("generate", "DEVICE=cpu", f"OUTDIR={outdir}", f"RUN={id_}", f"DATA={name}")
        found[name] = int(re.search(r"^(\d+) of \d+ answers", said, re.MULTILINE)[1])
    return found


def main() -> None:
    for name in SETS:
        make(f"data-{name}")
    with tempfile.TemporaryDirectory() as outdir:
        found = {
            "cores": os.cpu_count(),
            "801": trained("801", outdir),
            "802": trained("802", outdir, "WEIGHTS=801"),
            "both": trained("802", outdir, "WEIGHTS=801", "DATA=toy-chat:0.5 toy-chat-2:0.5"),
        }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
