"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Iterable[Sequence[str]], sides: Iterable[str]) -> str:
    """A table with a column for each of ``sides``, ``l`` or ``r``; a pipe in a cell stays one."""
    rule = ["--:" if side == "r" else ":--" for side in sides]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in [head, rule, *lines])
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
