"""Weights & Biases: its settings, and checks before a run starts. Needs no torch.

Upstream's writer only logs where TensorBoard is on as well, and needs a project and a name. A run's
TensorBoard files are always written (``<run directory>/tensorboard``).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from harness.errors import UserError

PROJECT = "megatron"
LOGIN_S = 15
LOGIN = """
import sys, wandb
try:
    if not wandb.login(prompt=False, verify=True, timeout=int(sys.argv[1])):
        sys.exit("nobody is logged in to Weights & Biases here")
except Exception as error:
    print(f"no login to Weights & Biases: {error}".splitlines()[0])
    sys.exit(1)
"""
"""Run in a process of its own: wandb starts a service that stays with the process."""


@dataclass(frozen=True)
class Tracking:
    """Where a run is logged. ``offline``: in its run directory, for ``wandb sync``.

    Without a ``name`` the run has its label.
    """

    mode: Literal["offline", "online"]
    project: str = PROJECT
    entity: str | None = None
    name: str | None = None


def tracking(settings: Mapping[str, str]) -> Tracking | None:
    """The WANDB settings; None without WANDB=. Raises UserError for a contradiction."""
    mode = settings.get("WANDB")
    if mode is None:
        if more := [
            f"{key}={settings[key]}"
            for key in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME")
            if key in settings
        ]:
            raise UserError(
                f"{' '.join(more)} logs nothing without WANDB=\n"
                "add WANDB=offline or WANDB=online, or leave it out"
            )
        return None
    if mode not in ("offline", "online"):
        raise UserError(f"WANDB={mode}: expected offline or online")
    return Tracking(
        mode,
        settings.get("WANDB_PROJECT", PROJECT),
        settings.get("WANDB_ENTITY"),
        settings.get("WANDB_NAME"),
    )


def check(wanted: Tracking) -> None:
    """Check that the run can be logged.

    Raises:
        UserError: the package is missing; online, there is no login, or the server does not answer
            or refuses it.
    """
    if find_spec("wandb") is None:
        raise UserError(
            "WANDB= needs the package wandb\ninstall what the project pins: scripts/setup.sh"
            " tracking"
        )
    if wanted.mode == "offline":
        return
    command = [sys.executable, "-c", LOGIN, str(LOGIN_S)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        output = (
            done.stdout.strip().splitlines()
            or done.stderr.strip().splitlines()
            or [f"exit code {done.returncode}"]
        )
        raise UserError(
            f"WANDB=online: {output[-1]}\n"
            f"{Path(sys.executable).parent}/wandb login, or WANDB_API_KEY=; "
            "or WANDB=offline, without network: wandb sync sends it later"
        )
