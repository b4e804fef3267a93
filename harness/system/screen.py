"""Standard output on a terminal: width, colours, tables, and harmless text."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from harness.system import masking
from harness.system.streams import Wrapped

BOLD, FAINT, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"
"""Codes of ANSI terminals (ECMA-48, section 8.3.117)."""


_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that control a terminal or change the direction of text."""
_PAINT = re.compile(r"(\033\[(?:0|1|2|31|32|33)m)")
"""The codes that ``paint`` writes."""


def harmless(text: str, masked: bool = True) -> str:
    """``text`` with control characters escaped, except line breaks and tabs.

    ``masked``: also with secrets replaced by their names.
    """
    return _CONTROLS.sub(
        lambda found: found[0].encode("unicode_escape").decode(),
        masking.mask(text) if masked else text,
    )


class SafeStream(Wrapped):
    """A stream whose output is ``harmless``; a terminal also gets the colours of ``paint``."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._coloured = stream.isatty()

    def write(self, text: str) -> int:
        """Write ``text``; returns its length."""
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


def guard() -> None:
    """Make all output on standard output and error harmless, whoever prints it."""
    sys.stdout, sys.stderr = SafeStream(raw(sys.stdout)), SafeStream(raw(sys.stderr))


def raw(stream: TextIO) -> TextIO:
    """The stream below a ``SafeStream``, for displays that move the cursor.

    They must make their text ``harmless`` themselves.
    """
    return stream.stream if isinstance(stream, SafeStream) else stream


def width(piped: int) -> int:
    """Columns of the terminal; ``piped`` where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else piped


def colour() -> bool:
    """Whether standard output is a terminal with colours and NO_COLOR (no-color.org) is unset."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def grid(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned cells, the first left, the others right; a line without cells is empty."""
    sizes = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
    return [
        "  ".join([name.ljust(sizes[0]), *map(str.rjust, others, sizes[1:])]).rstrip()
        for name, *others in (line or [""] for line in lines)
    ]


def paint(text: str, code: str, on: bool) -> str:
    """``text`` in the colour or weight ``code``, if ``on``."""
    return f"\033[{code}m{text}\033[0m" if on and code else text


def say(line: str, hang: int = 2) -> None:
    """Print ``line``, wrapped at the terminal's width; further lines are indented by ``hang``."""
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
