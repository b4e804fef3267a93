"""Passwords, tokens and keys of ARGS=: the run gets them, and nothing that is written or shown
does.

On the command line's border ``hide`` puts ``$HARNESS_SECRET_1`` in the place of the first secret,
and the secret into this process's environment, which ranks inherit. Experiments, scripts, Slurm
jobs, error messages and reports hold the name only; a rank puts the secret back into its own
arguments (``reveal``), and masks it in what it prints (``mask``).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import MutableMapping

from harness.errors import UserError

VARIABLE = "HARNESS_SECRET_"
PLACE = re.compile(rf"\$({VARIABLE}\d+)(?!\d)")
"""What stands for a secret."""
KNOWN = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
"""Variables of other programs that hold one."""
SHORTEST = 4
"""A shorter secret is not looked for in output: every second line would hold it."""

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
    """``text``, the value of ARGS=, with names in the place of its secrets, which go into
    ``environment``.

    A secret is what follows an argument such as --wandb-api-key, what has the shape of a token
    (hf_…, 40 hexadecimal digits), and the password of a URL.
    """
    names: dict[str, str] = {}

    def kept(value: str) -> str:
        bare = _unquoted(value)
        if PLACE.fullmatch(bare):
            return value
        if bare not in names:
            number = len(names) + 1
            while f"${VARIABLE}{number}" in text:  # the secret of an outer command
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
    """``words`` with the secrets themselves.

    Raises:
        UserError: one is not in the environment, as where a script is run again by hand.
    """

    def secret(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise UserError(
                f"{found[0]} stands for a secret that is not written down\nexport {found[1]}=… and"
                " start again"
            )
        return os.environ[found[1]]

    return [PLACE.sub(secret, word) for word in words]


def mask(text: str) -> str:
    """``text`` with names in the place of this process's secrets."""
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
