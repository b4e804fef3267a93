"""The command line: ``python -m harness COMMAND [ID] [KEY=VALUE …]``, as the Makefile calls it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from harness import commands
from harness.commands import Command
from harness.errors import UserError
from harness.system import masking
from harness.system.streams import lasting_output


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status.

    0: done; 1: a run failed; 2: a mistake that the user can mend; 130: interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    # A live view ends with its reader; other commands finish their work without one.
    output = nullcontext() if words[:1] == ["monitor-gpu"] else lasting_output()
    with output:
        return _status(words)


def given(words: Sequence[str]) -> list[str]:
    """``words``, with KEY=VALUE for each name after ``--given``; environment variables have values.

    The Makefile passes settings this way, because a shell would interpret a value in the text of a
    recipe. Secrets in ARGS= are replaced by the names of variables.
    """
    at = words.index("--given") if "--given" in words else len(words)
    found = [*words[:at], *(f"{name}={os.environ.get(name, '')}" for name in words[at + 1 :])]
    os.environ.pop("ARGS", None)
    return [
        f"ARGS={masking.hide(word[5:])}" if word.startswith("ARGS=") else word for word in found
    ]


def _status(words: list[str]) -> int:
    try:
        return _dispatch(given(words) or ["list"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: file name too long: {error.filename}", file=sys.stderr)
            return 2
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    name, *words = words
    if name == "target":  # of .DEFAULT in the Makefile
        from harness.make import targets

        name, *words = targets.meant(words)
    # scripts of runs call ``data mappings``
    if name == "data" and words and f"data-{words[0]}" in commands.COMMANDS:
        name, *words = f"data-{words[0]}", *words[1:]
    command = commands.find(name)
    if name != "run":
        return _call(command, words)
    from harness.launching.rendezvous.handshake import refusals_sent

    with refusals_sent(words):
        return _call(command, words)


def _call(command: Command, words: list[str]) -> int:
    """Check the words of ``command``, install what it needs, and call its function."""
    about = []
    if command.about:
        about, words = [_about(command, words)], words[1:]
    settings = command.parse(words)
    if "ARGS" in settings:
        from harness.upstreams.megatron_lm import known_arguments

        known_arguments.check(settings["ARGS"])
    if not command.where:
        return 0
    if command.installs:
        from harness.machine import packages

        packages.install(command.installs)
    return command.function()(*about, *([settings] if command.keys else []))


def _about(command: Command, words: list[str]) -> str:
    """The experiment, chapter or data set that ``command`` is about."""
    if not words or "=" in words[0]:
        shows_all = "make data-list" if command.about == "data set" else "make list"
        raise UserError(f"which {command.about}? {shows_all} shows all")
    if command.about == "experiment" and not words[0][:1].isdigit():
        from harness.make import targets

        raise UserError(targets.unknown(words[0]))
    return words[0]
