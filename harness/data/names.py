"""What data sets may be called, and where the files of each one lie."""

from __future__ import annotations

import re
from pathlib import Path

from harness import ROOT
from harness.errors import UserError

DATA = ROOT / "data"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MOCK = "mock"
"""``DATA=mock``: upstream's random tokens, which need no files."""


def prefix_of(name: str, folder: Path = DATA) -> Path:
    """Path of the ``.bin``/``.idx`` pair of data set ``name``, without its suffix."""
    return folder / name / f"{name}_text_document"


def check_name(name: str) -> str:
    """``name`` where it can name a data set.

    Raises:
        UserError: it cannot.
    """
    if not NAME.fullmatch(name) or name == MOCK:
        raise UserError(
            f"NAME={name}: use lower-case letters, digits and . _ - (not {MOCK}), a letter or digit"
            " first"
        )
    return name
