"""Sets of characters as rules write them: ``a``, ``a-z``, ``U+00AD``, ``U+0000-U+0008``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field


def pattern(ranges: Sequence[str], negate: bool = False) -> re.Pattern[str]:
    """A pattern for one character of the set, or with ``negate`` one outside it."""
    inside = "".join(
        f"{re.escape(first)}-{re.escape(last)}" for first, last in map(_bounds, ranges)
    )
    return re.compile(f"[{'^' if negate else ''}{inside}]")


def _bounds(text: str) -> tuple[str, str]:
    """First and last character of a range."""
    if codes := re.fullmatch(r"U\+([0-9A-Fa-f]{4,6})(?:-U\+([0-9A-Fa-f]{4,6}))?", text):
        first, last = int(codes[1], 16), int(codes[2] or codes[1], 16)
        if last > 0x10FFFF:
            raise ValueError(f"{text!r}: Unicode ends at U+10FFFF")
        bounds = chr(first), chr(last)
    elif len(text) == 1:
        bounds = text, text
    elif len(text) == 3 and text[1] == "-":
        bounds = text[0], text[2]
    else:
        raise ValueError(
            f"{text!r} is neither a character nor a range such as a-z or U+0000-U+0008"
        )
    if bounds[0] > bounds[1]:
        raise ValueError(f"{text!r} is empty: its first character comes after its last one")
    return bounds


def _checked(ranges: tuple[str, ...]) -> tuple[str, ...]:
    for text in ranges:
        _bounds(text)
    return ranges


Characters = Annotated[tuple[str, ...], Field(min_length=1, strict=False), AfterValidator(_checked)]
