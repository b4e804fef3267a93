"""What settings that the search leaves alone would bring: below a plan, or faster layouts."""

from __future__ import annotations

from typing import Any

from harness.search.further import Further, further
from harness.search.layouts import Layout, Search
from harness.system.screen import say


def print_further(layout: Layout, search: Search, called: str = "the first") -> None:
    """Print a line for each setting that makes ``layout`` faster or smaller by formula.

    Args:
        called: what was printed of ``layout`` before.
    """
    found = _with_unseen(layout, search)
    if found:
        said = f"not searched; each by itself in {called}, by formula (*: other arithmetic)"
        say(f"  {said}", hang=4)
    for one, unseen in found:
        ms, gib = one.step.total / layout.step.total - 1, one.memory.in_all - layout.memory.in_all
        said = f"; no measured row has {', '.join(unseen)}" if unseen else ""
        star = "*" * one.other_arithmetic
        say(f"  {ms:+8.1%} {gib:+7.1f} GiB  {one.settings}{star}{said}", hang=24)


def objects(layout: Layout, search: Search) -> list[dict[str, Any]]:
    """The same, as JSON has it."""
    return [
        {
            "settings": one.settings,
            "step_ms": round(one.step.total, 1),
            "used_gib": round(one.memory.in_all, 1),
            "other_arithmetic": one.other_arithmetic,
            "unseen": unseen,
        }
        for one, unseen in _with_unseen(layout, search)
    ]


def _with_unseen(layout: Layout, search: Search) -> list[tuple[Further, list[str]]]:
    """Each setting, and the work in it that no measured row has, nor ``layout``."""
    if not (found := further(layout, search)):
        return []
    unmeasured = search.machine.unmeasured
    known = {*unmeasured(layout.experiment)}
    return [
        (one, [work for work in unmeasured(one.experiment) if work not in known]) for one in found
    ]
