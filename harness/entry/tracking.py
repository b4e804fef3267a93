"""TensorBoard and Weights & Biases: speed and memory of each step, added to what upstream logs.

Upstream logs losses, learning rate and the like. It logs speed and memory only with arguments that
also time each part of a step, which slows it down. A run directory is one W&B run.
"""

import json
import os
import secrets
import time
from collections.abc import Sequence

from harness.entry.report import EVERY_S, RankReport
from harness.experiment.hardware import peak_tflops
from harness.predict.flops import mfu
from harness.run.directory import RunDir
from harness.run.schema import Rank, StepMetrics
from harness.system.files import write_json

MEMORY = ("allocated_peak_gib", "reserved_peak_gib", "nvml_used_gib", "rss_peak_gib")
"""Memory peaks of a rank: PyTorch's allocator, the whole GPU, the host."""


def install(report: RankReport) -> None:
    """Log speed and memory of every step where upstream logs, and set the id of the W&B run.

    W&B gets no checkpoints: upstream would register each as an artifact.
    """
    if not report.is_last:
        return
    report.on_metrics.append(_Logger(report.run_dir))
    if not os.environ.get("WANDB_MODE"):
        return
    from megatron.training import wandb_utils

    os.environ["WANDB_RUN_ID"] = _run_id(report)
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("on_save_checkpoint_success", "on_load_checkpoint_success"):
        setattr(wandb_utils, name, lambda *_: None)


def scalars(line: StepMetrics, ranks: Sequence[Rank], peak: float | None) -> dict[str, float]:
    """Logged values of a step by name, without unknown ones.

    Args:
        ranks: their reports so far; memory is that of the fullest.
        peak: dense TFLOP/s of one GPU at the run's precision; None on a CPU, where MFU is unknown.
    """
    found = {
        "performance/step_ms": line.step_ms,
        "performance/tflops_per_gpu": line.tflops,
        "performance/tokens_per_s": line.tokens_per_s,
        "performance/mfu": mfu(line.tflops, peak) if line.tflops and peak else None,
    }
    for name in MEMORY:
        found[f"memory/{name}"] = max(
            (gib for rank in ranks if (gib := getattr(rank, name)) is not None), default=None
        )
    return {name: value for name, value in found.items() if value is not None}


class _Logger:
    """Logs the scalars of each step; memory of other ranks comes from their reports."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._ranks: Sequence[Rank] = []
        self._read_s = 0.0
        self._first_steps = 5  # memory still grows
        self._peak: float | None = None

    def __call__(self, line: StepMetrics) -> None:
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        board, wandb = get_tensorboard_writer(), get_wandb_writer()
        if board is None:
            return
        if self._first_steps or time.monotonic() - self._read_s > EVERY_S:
            self._peak = self._peak or _peak(self._run_dir)
            self._first_steps, self._read_s = max(self._first_steps - 1, 0), time.monotonic()
            self._ranks = self._run_dir.read_ranks()
        logged = scalars(line, self._ranks, self._peak)
        for name, value in logged.items():
            board.add_scalar(name, value, line.step)
        if wandb:
            wandb.log(logged, line.step)


def _peak(run_dir: RunDir) -> float | None:
    """The GPU's dense TFLOP/s at the run's precision; None on a CPU or without experiment.json."""
    import torch

    from harness.entry import on_cpu

    try:
        return (
            None
            if on_cpu()
            else peak_tflops(torch.cuda.get_device_name(), run_dir.read_experiment().precision)
        )
    except ValueError:
        return None


def _run_id(report: RankReport) -> str:
    file = report.run_dir.wandb_run
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["id"]
    run_id = secrets.token_hex(4)
    write_json(file, {"id": run_id})
    return run_id
