"""Commands that replace the targets of the megatron-tutorials' Makefile, by tutorial.yaml."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harness import ROOT
from harness.errors import UserError
from harness.system import yaml_files

TARGETS = yaml_files.read(Path(__file__).with_suffix(".yaml"))
"""``renamed`` and ``replaced`` targets, each with its command here."""


def replacement(word: str, settings: Sequence[str] = ()) -> str | None:
    """The command line for target ``word`` of the tutorials; None if it is not one.

    Raises:
        UserError: it has only a near equivalent, which is named; or it takes no settings.
    """
    if word in TARGETS["replaced"]:
        raise UserError(
            f"{word}: the tutorials' gpt2-large is not in this catalogue\n"
            f"the same parallelism with another model: {TARGETS['replaced'][word]}"
        )
    traced = re.fullmatch(r"profile-(\d{3}h?)(-.*)?", word)
    command = f"make {traced[1]} PROFILE=1" if traced else TARGETS["renamed"].get(word)
    if command and settings:
        if "|" in command or not command.startswith("make "):
            raise UserError(f"{word} takes no settings; it runs {command}")
        command = f"{command} {shlex.join(settings)}"
    return command


def become(command: str) -> NoReturn:
    """Print ``command`` and replace this process by it, in the root of the repository."""
    print(f"a target of the tutorials, here: {command}", file=sys.stderr, flush=True)
    os.chdir(ROOT)
    if command.startswith("diff "):
        command += " || [ $? = 1 ]"  # its exit status where files differ, as they must here
    os.execvp("bash", ["bash", "-c", command])
