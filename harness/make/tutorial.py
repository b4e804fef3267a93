"""Target names of the megatron-tutorials, and what stands for each of them here.

Experiments keep the tutorials' own names (``101-gpt2xl-dp1-gbs1-bf16``); this is the rest of that
Makefile, its older commits included, and the targets that its read-me names.
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
"""Old name -> the command that does the same here. ``profile-282-…`` is ``make 282 PROFILE=1``, see
``replacement``."""

REPLACED = {
    "train-baseline-gpt2-large-1gpu": "make 101",
    "train-dp2-gpt2-large-2gpu": "make 122",
    "train-tp2-gpt2-large-2gpu": "make 232",
    "train-sp2-gpt2-large-2gpu": "make 232 SP=1",
    "train-cp2-gpt2-large-2gpu": "make 302",
    "train-pp2-gpt2-large-2gpu": "make 232 TP=1 PP=2",
}
"""Old name -> the nearest experiment: gpt2-large is not in this catalogue, the same parallelism is,
with another model."""


def replacement(word: str, settings: Sequence[str] = ()) -> str | None:
    """The command line that does here what target ``word`` did, with ``settings``; None of a word
    that is no old name.

    Raises:
        UserError: only something near is there, and is named; or the command takes no settings.
    """
    if word in REPLACED:
        raise UserError(
            f"{word} is of the tutorials' gpt2-large, which is not in this catalogue\n"
            f"the same parallelism with another model: {REPLACED[word]}"
        )
    traced = re.fullmatch(r"profile-(\d{3}h?)(-.*)?", word)
    command = f"make {traced[1]} PROFILE=1" if traced else RENAMED.get(word)
    if command and settings:
        if "|" in command or not command.startswith("make "):
            raise UserError(f"{word} takes no settings; here it is: {command}")
        command = f"{command} {shlex.join(settings)}"
    return command


def become(command: str) -> NoReturn:
    """Replace this process by ``command``, in the repository, after saying which it is."""
    print(f"a name of the tutorials, here: {command}", file=sys.stderr, flush=True)
    os.chdir(ROOT)
    # diff exits 1 where files differ, as they must here
    os.execvp(
        "bash", ["bash", "-c", command + (" || [ $? = 1 ]" if command.startswith("diff ") else "")]
    )
