"""Reads commands.yaml: all commands, what they do, their settings, where their code is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from harness.errors import UserError, nearest
from harness.experiment import command_line
from harness.system import yaml_files

FILE = Path(__file__).with_suffix(".yaml")

EVERY = " ".join(setting.key for setting in command_line.SETTINGS)


@dataclass(frozen=True)
class Command:
    """A target of make, which is also ``python -m harness NAME``.

    Its function, ``where`` in harness/, is called with what the command is about, if it is about
    something, then with the settings, if it takes any. It returns the exit status. commands.yaml
    explains the fields.
    """

    name: str
    where: str = ""
    does: str = ""
    usage: str = ""
    general: str = ""
    about: str = ""
    example: str = ""
    installs: str = ""

    @property
    def target(self) -> str:
        """A target of make that calls it."""
        return f"{self.name}-{self.example}" if self.example else self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Every setting that it takes."""
        own = [key for word in _words(self.usage) for key in _KEY.findall(word)]
        general = EVERY if self.general == "all" else self.general
        return tuple(dict.fromkeys([*own, *general.split()]))

    @property
    def required(self) -> tuple[str, ...]:
        """The settings that must be given.

        Of alternatives, ``RUN=…|WEIGHTS=…``, and of ``NAME=<name>``, the command itself says what
        is missing.
        """
        words = [
            word for word in _words(self.usage) if not word.startswith("[") and "<" not in word
        ]
        return tuple(keys[0] for keys in map(_KEY.findall, words) if len(keys) == 1)

    def parse(self, words: Sequence[str]) -> dict[str, str]:
        """The settings in ``words``, ``KEY=VALUE`` each.

        Raises:
            UserError: a setting is unknown, not for this command, missing, or no ``KEY=VALUE``.
        """
        settings = command_line.parse(words, self.keys)
        if refused := [f"{key}={settings[key]}" for key in settings if key not in self.keys]:
            takes = f"takes {', '.join(self.keys)}" if self.keys else "takes no settings"
            raise UserError(
                f"make {self.target} does not take {' '.join(refused)}\nmake {self.target} {takes}"
            )
        command_line.require(settings, self.required, f"make {self.target} {self.usage}")
        return settings

    def function(self) -> Callable[..., int]:
        """Import what does it."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"harness.{module}"), name)


_KEY = re.compile(r"(?:^|[\[|])([A-Z][A-Z0-9_]*)=")


def _words(usage: str) -> list[str]:
    return re.findall(r"\[?[A-Z][A-Z0-9_]*=(?:\"[^\"]*\"|[^\s\]])*\]?", usage)


SECTIONS = {
    title: tuple(Command(name, **fields) for name, fields in commands.items())
    for title, commands in yaml_files.read(FILE).items()
}
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def find(name: str) -> Command:
    """The command called ``name``. Raises UserError where there is none."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; {nearest(name, COMMANDS)}")
    return COMMANDS[name]
