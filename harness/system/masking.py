"""Passwords, tokens and keys in ARGS=: the run gets them, but no file and no output does.

When a command is read, ``hide`` replaces the first secret by ``$HARNESS_SECRET_1`` and puts its
value into this process's environment, which ranks inherit. Experiments, scripts, Slurm jobs,
messages and reports contain the name alone. A rank puts the value back into its arguments
(``reveal``) and replaces it in its output (``mask``).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import MutableMapping

from harness.errors import UserError

VARIABLE = "HARNESS_SECRET_"
PLACE = re.compile(rf"\$({VARIABLE}\d+)(?!\d)")
"""The name of a secret, in its place."""
KNOWN = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
"""Environment variables of other programs that hold a secret."""
SHORTEST = 4
"""Characters; shorter secrets are not masked in output, where they would occur by chance."""

_VALUE = r"""(?:'[^']*'|"[^"]*"|[^\s'"]+)"""
_NAMED = re.compile(
    rf"""(?P<name>(?:(?<![\w-])--?(?:[\w-]*[_-])?(?:api[_-]?key|(?:access|secret|private)[_-]key(?:[_-]id)?|secret|passw(?:or)?d|passphrase|
    credentials?|(?:auth|access|hf|hub|api|bearer|github|wandb|user)[_-]?token)|(?<![\w-])--?token)(?:=|\s+)
    |\b(?:\w+_)?(?:API_KEY|TOKEN|PASSWORD|SECRET)=)(?P<value>{_VALUE})""",
    re.IGNORECASE | re.VERBOSE,
)
_SHAPED = re.compile(
    r"""(?<![A-Za-z0-9$])(?P<value>hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}
    |sk-[\w-]{16,}|xox[abpr]-[\w-]{10,}|AKIA[0-9A-Z]{16}|wandb_v\d_\w{16,}
    |eyJ[\w-]+\.[\w-]+\.[\w-]+|[0-9a-f]{40}(?![0-9a-f/]))""",
    re.VERBOSE,
)
_IN_URL = re.compile(
    r"(?P<before>\w[\w+.-]*://[^\s:/@'\"]*:)(?P<value>[^\s/@'\"]+)(?=@)"
    r"|(?P<user>\w[\w+.-]*://)(?P<only>[^\s:/@'\"]{16,})(?=@)"
)


def hide(text: str, environment: MutableMapping[str, str] = os.environ) -> str:
    """``text``, the value of ARGS=, with secrets replaced by names; values go to ``environment``.

    Secrets are values of arguments such as --wandb-api-key, words in the form of a token (hf_…, 40
    hexadecimal digits), and passwords in URLs.
    """
    names: dict[str, str] = {}

    def kept(value: str) -> str:
        bare = _unquoted(value)
        if PLACE.fullmatch(bare):
            return value
        if bare not in names:
            number = len(names) + 1
            while f"${VARIABLE}{number}" in text:  # already used by an outer command
                number += 1
            names[bare] = f"{VARIABLE}{number}"
        environment[names[bare]] = bare
        return f"${names[bare]}"

    now = _NAMED.sub(lambda found: found["name"] + kept(found["value"]), text)
    now = _IN_URL.sub(
        lambda found: (found["before"] or found["user"]) + kept(found["value"] or found["only"]),
        now,
    )
    return _SHAPED.sub(lambda found: kept(found["value"]), now)


def reveal(words: list[str]) -> list[str]:
    """``words`` with names replaced by secrets.

    Raises:
        UserError: one is not in the environment, for example where command.sh is run by hand.
    """

    def secret(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UserError(
                f"{found[0]} is a secret, which no file contains\nexport {found[1]}=… and start"
                " again"
            )
        return os.environ[found[1]]

    return [PLACE.sub(secret, word) for word in words]


def mask(text: str) -> str:
    """``text`` with this process's secrets replaced by their names."""
    for name, value in os.environ.items():
        if (
            (name in KNOWN or name.startswith(VARIABLE))
            and len(value) >= SHORTEST
            and value in text
        ):
            text = re.sub(
                rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])",
                lambda _, name=name: f"${name}",
                text,
            )
    return text


def _unquoted(value: str) -> str:
    try:
        return "".join(shlex.split(value))
    except ValueError:
        return value.strip("'\"")
