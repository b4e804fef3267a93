"""Names of the 176 languages that lid.176 identifies."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError, nearest
from harness.system import yaml_files

LANGUAGES: dict[str, str] = yaml_files.read(Path(__file__).with_name("languages.yaml"))
"""lid.176's code -> English name."""


def code_of(name: str) -> str:
    """lid.176's code of a language, given by its English name or by that code.

    Raises:
        UserError: there is no such language; the message has the nearest names.
    """
    wanted = name.strip().casefold()
    for code, known in LANGUAGES.items():
        if wanted in (code, known.casefold()):
            return code
    raise UserError(
        f"no language {name!r} in lid.176; {nearest(name.strip().title(), LANGUAGES.values())}"
    )
