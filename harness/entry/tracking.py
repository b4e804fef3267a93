"""Weights & Biases, where upstream logs to it: one run there for one run directory, also after it was resumed."""

import json
import os
import secrets

from harness.entry.report import RankReport
from harness.files import write_json


def install(report: RankReport) -> None:
    """Give this run directory's W&B run its id. Checkpoints stay on the disk: upstream would note each as an artifact."""
    if not os.environ.get("WANDB_MODE") or not report.is_last:
        return
    from megatron.training import wandb_utils

    os.environ["WANDB_RUN_ID"] = _run_id(report)
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb_utils.on_save_checkpoint_success = wandb_utils.on_load_checkpoint_success = lambda *args: None


def _run_id(report: RankReport) -> str:
    file = report.run_dir.wandb_run
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["id"]
    run_id = secrets.token_hex(4)
    write_json(file, {"id": run_id})
    return run_id
