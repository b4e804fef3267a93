"""What standard output can show: so many columns, in colour or not; and cells below each other."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from harness.system import masking

BOLD, FAINT, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
"""What ANSI terminals call them (ECMA-48, section 8.3.117)."""


_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys rather than shows, and what turns the direction of text."""
_PAINT = re.compile(r"(\033\[(?:0|1|2|31|32|33)m)")
"""What ``paint`` writes."""


def harmless(text: str, masked: bool = True) -> str:
    """``text`` with its control characters spelled out, but line breaks and tabs; ``masked``: its
    secrets, too."""
    return _CONTROLS.sub(
        lambda found: found[0].encode("unicode_escape").decode(),
        masking.mask(text) if masked else text,
    )


class Border:
    """A stream that writes what is harmless; a terminal also gets the colours of ``paint``."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._coloured = stream.isatty()

    def write(self, text: str) -> int:
        """Write ``text``; returns how long it was."""
        if self._coloured:
            self.stream.write(
                "".join(
                    part if _PAINT.fullmatch(part) else harmless(part)
                    for part in _PAINT.split(text)
                )
            )
        else:
            self.stream.write(harmless(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """From now on, standard output and error write what is harmless, whoever prints."""
    sys.stdout, sys.stderr = Border(raw(sys.stdout)), Border(raw(sys.stderr))


def raw(stream: TextIO) -> TextIO:
    """The stream behind a border, for displays that move the cursor; what they show must be
    ``harmless``."""
    return stream.stream if isinstance(stream, Border) else stream


def width(piped: int) -> int:
    """Columns of the terminal, or ``piped`` where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else piped


def colour() -> bool:
    """Is standard output a terminal that shows colours, and NO_COLOR (no-color.org) not set?"""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def grid(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, the first to the left, the others to the right; a line without cells stays
    empty."""
    sizes = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
    return [
        "  ".join([name.ljust(sizes[0]), *map(str.rjust, others, sizes[1:])]).rstrip()
        for name, *others in (line or [""] for line in lines)
    ]


def paint(text: str, code: str, on: bool) -> str:
    """``text`` in the colour or weight ``code``, where that is ``on``."""
    return f"\033[{code}m{text}\033[0m" if on and code else text


def say(line: str, hang: int = 2) -> None:
    """Print ``line``; what a terminal is too narrow for goes on below, indented by ``hang``
    columns."""
    columns = width(piped=0)
    if hang + 20 < columns < len(line):
        line = textwrap.fill(
            line,
            columns,
            subsequent_indent=" " * hang,
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(line)
