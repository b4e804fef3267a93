"""Targets of the megatron-tutorials' Makefile, and the commands that replace them here.

Experiments keep the names of the tutorials (``101-gpt2xl-dp1-gbs1-bf16``). Listed here are the
other targets of that Makefile, in all its commits, and those that its README names.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from harness import ROOT
from harness.errors import UserError

RENAMED = {
    "install-dependencies": "make setup",
    "prepare-ds-openwebtext-10k": "make data-openwebtext-10k",
    "show-arguments": "make arguments",
    "count-arguments": "make arguments | tail -n 1",
    "how-to-recompute-activation": (
        "diff -U 1 <(make show-282 DEVICE=cuda) <(make show-283 DEVICE=cuda)"
    ),
    "129-gpt2xl-dp8-zero2-fit-gbs": "make 129",
    "130-gpt2xl-dp8-zero2-fit-param": "make 128 ARGS='--num-layers 60'",
    "train-gpt3-345m-1gpu-x-model-parallelism": "make 601",
}
"""Target of the tutorials -> the command that does the same here.

``replacement`` translates ``profile-282-…`` to ``make 282 PROFILE=1``.
"""

REPLACED = {
    "train-baseline-gpt2-large-1gpu": "make 101",
    "train-dp2-gpt2-large-2gpu": "make 122",
    "train-tp2-gpt2-large-2gpu": "make 232",
    "train-sp2-gpt2-large-2gpu": "make 232 SP=1",
    "train-cp2-gpt2-large-2gpu": "make 302",
    "train-pp2-gpt2-large-2gpu": "make 232 TP=1 PP=2",
}
"""Target of the tutorials -> an experiment with the same parallelism and another model.

Their gpt2-large is not in this catalogue.
"""


def replacement(word: str, settings: Sequence[str] = ()) -> str | None:
    """The command line for target ``word`` of the tutorials; None if it is not one.

    Raises:
        UserError: it has only a near equivalent, which is named; or it takes no settings.
    """
    if word in REPLACED:
        raise UserError(
            f"{word}: the tutorials' gpt2-large is not in this catalogue\n"
            f"the same parallelism with another model: {REPLACED[word]}"
        )
    traced = re.fullmatch(r"profile-(\d{3}h?)(-.*)?", word)
    command = f"make {traced[1]} PROFILE=1" if traced else RENAMED.get(word)
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
