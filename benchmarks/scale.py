"""The fastest layout predicted for models on 8 to 16,384 GPUs, and what it costs.

    .venv/bin/python benchmarks/scale.py         (about four minutes)

Writes benchmarks/scale.json, from which docs/scale.md is made.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from harness.experiment.hardware import find_card, peak_tflops  # noqa: E402
from harness.experiment.unlisted import experiment_from  # noqa: E402
from harness.predict.calibrations import machine_of  # noqa: E402
from harness.predict.flops import mfu, tflops_per_gpu  # noqa: E402
from harness.search.layouts import Search, best  # noqa: E402

CARD = "h100-80gb"
GPUS = (8, 32, 128, 512, 2048, 8192, 16384)
MODELS = ("llama3-8b", "llama3-70b", "llama3.1-405b", "gpt-oss-120b", "qwen3-235b-a22b")
BATCH, LENGTH = 2048, 8192
"""Sequences of a batch and tokens of each: 16.8 million tokens, those of Llama 3 405B at the end of
its training (Dubey et al. 2024, arXiv:2407.21783, section 3.4.1), on any number of GPUs."""


def main() -> None:
    card, found = find_card(CARD), {}
    machine = machine_of(card)
    for model in MODELS:
        found[model] = []
        for gpus in GPUS:
            begun = time.monotonic()
            settings = {"GPUS": "1", "GBS": str(BATCH), "SEQ": str(LENGTH), "CARD": CARD}
            work = experiment_from(model, settings)
            layout = next(best(Search(work, gpus, card, machine)), None)
            if layout and layout.step:
                found[model].append(point(layout, gpus))
            print(f"{model} {gpus}: {time.monotonic() - begun:.1f} s", flush=True)
    results = {"card": CARD, "batch": BATCH, "length": LENGTH, "models": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def point(layout, gpus: int) -> dict[str, object]:
    """One prediction: the layout, its time, and where that goes."""
    step, experiment = layout.step, layout.experiment
    tflops = tflops_per_gpu(experiment, step.total)
    return {
        "gpus": gpus,
        "step_ms": round(step.total, 1),
        "mfu": round(mfu(tflops, peak_tflops(CARD, experiment.precision)), 4),
        "tokens_per_s_gpu": round(BATCH * LENGTH / step.total * 1e3 / gpus, 1),
        "allocated_gib": round(layout.memory.total, 1),
        "layout": experiment.layout,
        "settings": layout.settings,
        "pieces": {name: round(ms, 1) for name, ms in step.pieces.items() if ms >= 0.05},
    }


if __name__ == "__main__":
    main()
