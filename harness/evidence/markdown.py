"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]], sides: Iterable[str]) -> str:
    """A table; ``sides`` aligns each column, ``l`` or ``r``. Pipes in cells are escaped."""
    rule = ["--:" if side == "r" else ":--" for side in sides]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in [head, rule, *lines])
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
