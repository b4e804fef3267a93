"""Packages that a command needs are installed when the first command needs them."""

from __future__ import annotations

import subprocess

from harness import ROOT
from harness.errors import UserError
from harness.machine.upstream import locate


def install(*stages: str) -> None:
    """Install what ``stages`` of the set-up lack: minutes the first time, nothing later.

    Raises:
        UserError: they cannot be installed, or upstream is checked out in part.
    """
    locate()
    if subprocess.run([ROOT / "scripts" / "setup.sh", *stages]).returncode:
        raise UserError("the set-up did not finish; the lines above say why, make doctor says more")
