"""What standard output can show: so many columns, in colour or not; and cells below each other."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

BOLD, FAINT, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
"""What ANSI terminals call them (ECMA-48, section 8.3.117)."""


def width(piped: int) -> int:
    """Columns of the terminal, or ``piped`` where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else piped


def colour() -> bool:
    """Is standard output a terminal that shows colours, and NO_COLOR (no-color.org) not set?"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def grid(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, the first to the left, the others to the right; a line without cells stays empty."""
    sizes = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
    return ["  ".join([name.ljust(sizes[0]), *map(str.rjust, others, sizes[1:])]).rstrip()
            for name, *others in (line or [""] for line in lines)]


def paint(text: str, code: str, on: bool) -> str:
    """``text`` in the colour or weight ``code``, where that is ``on``."""
    return f"\033[{code}m{text}\033[0m" if on and code else text


def say(line: str, hang: int = 2) -> None:
    """Print ``line``; what a terminal is too narrow for goes on below, indented by ``hang`` columns."""
    columns = width(piped=0)
    if hang + 20 < columns < len(line):
        line = textwrap.fill(line, columns, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
    print(line)
