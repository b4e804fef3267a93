"""What settings that the search leaves alone would bring: below a plan, or faster layouts."""

from __future__ import annotations

from typing import Any

from harness.search.further import Further, further
from harness.search.layouts import Layout, Search
from harness.system.screen import say


def print_further(layout: Layout, search: Search) -> None:
    """Print a line for each setting that makes ``layout`` faster or smaller by formula."""
    found = further(layout, search)
    if not found:
        return
    say("  not searched; each by itself in the first, by formula (*: other arithmetic)", hang=4)
    for one in found:
        ms, gib = one.step.total / layout.step.total - 1, one.memory.in_all - layout.memory.in_all
        unseen = _unseen(one, layout, search)
        said = f"; no measured row has {', '.join(unseen)}" if unseen else ""
        star = "*" * one.other_arithmetic
        say(f"  {ms:+8.1%} {gib:+7.1f} GiB  {one.settings}{star}{said}", hang=24)


def rows(layout: Layout, search: Search) -> list[dict[str, Any]]:
    """The same, as JSON has it."""
    return [
        {
            "settings": one.settings,
            "step_ms": round(one.step.total, 1),
            "used_gib": round(one.memory.in_all, 1),
            "other_arithmetic": one.other_arithmetic,
            "unseen": _unseen(one, layout, search),
        }
        for one in further(layout, search)
    ]


def _unseen(one: Further, layout: Layout, search: Search) -> list[str]:
    """Work that no measured row has, nor ``layout``."""
    known = {*search.machine.unmeasured(layout.experiment)}
    return [work for work in search.machine.unmeasured(one.experiment) if work not in known]
