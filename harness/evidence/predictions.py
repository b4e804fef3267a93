"""Predictions as JSON: one object an experiment and card, with the same keys for every command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from harness.experiment import overrides
from harness.experiment.command_line import choice
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card, peak_tflops
from harness.predict.calibrations import Machine
from harness.predict.capacity import unseen, verdict
from harness.predict.flops import mfu, tflops_per_gpu
from harness.predict.memory import Memory
from harness.predict.step_time import StepTime
from harness.system.screen import say

FORMATS = ("terminal", "json")
MOST_PUBLISHED_GPUS = 6_144
"""Of public rows with a step time: NVIDIA/Megatron-LM's README."""
KEYS = {
    "experiment": "what `make` takes, or for a plan the model and its settings",
    "gpus": "GPUs in all",
    "card": "short name of the GPU",
    "fits": "`fits`, `may run out` or `does not fit`, whatever the prediction's error",
    "allocated_gib": "most that PyTorch allocates on the fullest GPU",
    "used_gib": "what nvidia-smi shows",
    "step_ms": "time of a step; null where it is not predicted",
    "band": "90th percentile of relative errors on unseen rows of this kind; null: unknown",
    "tflops": "model TFLOP/s of a GPU",
    "mfu": "share of the GPU's peak",
    "pieces": "milliseconds of the step by what the slowest GPU does or waits for",
    "unseen": "work in it that no measured row has; `extrapolated` beyond any public row",
}
"""Keys of an object, and what each is."""


def is_json(settings: Mapping[str, str]) -> bool:
    """Whether ``FORMAT=json`` is typed. Raises UserError for another format than FORMATS."""
    return choice("FORMAT", settings.get("FORMAT", "terminal"), FORMATS) == "json"


def prediction(
    experiment: Experiment,
    card: Card,
    memory: Memory,
    machine: Machine | None = None,
    step: StepTime | None = None,
) -> dict[str, Any]:
    """What is predicted of ``experiment`` on ``card``, with KEYS."""
    found: dict[str, Any] = dict.fromkeys(KEYS)
    found |= {
        "experiment": overrides.command_of(experiment),
        "gpus": experiment.world_size,
        "card": card.key,
        "fits": verdict(memory, card),
        "allocated_gib": round(memory.total, 2),
        "used_gib": round(memory.in_all, 2),
        "unseen": [*unseen(experiment), *extrapolated(experiment)],
    }
    if machine is None or step is None:
        return found
    tflops, band = tflops_per_gpu(experiment, step.total), machine.band(experiment)
    peak = peak_tflops(card.name, experiment.precision)
    return found | {
        "step_ms": round(step.total, 2),
        "band": band and round(band.most, 4),
        "tflops": round(tflops, 1),
        "mfu": peak and round(mfu(tflops, peak), 4),
        "pieces": {name: round(ms, 2) for name, ms in step.pieces.items()},
        "unseen": [*dict.fromkeys((*machine.unmeasured(experiment), *found["unseen"]))],
    }


def extrapolated(experiment: Experiment) -> list[str]:
    """That it has more GPUs than any public row, if it has."""
    if experiment.world_size <= MOST_PUBLISHED_GPUS:
        return []
    return [f"extrapolated: more than {MOST_PUBLISHED_GPUS:,} GPUs"]


def say_extrapolated(experiments: Iterable[Experiment]) -> None:
    """Print a line where any of them has more GPUs than any public row."""
    for said in [said for one in experiments for said in extrapolated(one)][:1]:
        say(f"  {said}, the most of any public row of Megatron-LM")


def print_json(predictions: Iterable[Mapping[str, Any]]) -> int:
    """Print a list of predictions. Returns the exit status."""
    print(json.dumps(list(predictions), indent=1))
    return 0
