"""Markdown of where the time of a traced step goes, and of steps that took unusually long."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.evidence import markdown
from harness.evidence.references import Reference
from harness.evidence.rows import Row, metrics
from harness.profiling.kernels import TITLES, Category
from harness.profiling.profile import FOLDER, Profile, read_recorded
from harness.profiling.summary import RankProfile

SLOW = 1.5
"""A step is slow that takes this many times its run's median."""


def profiles(records: Path, ids: Sequence[str], published: Sequence[Reference | None]) -> str:
    """Where the time of a step goes on the first rank: a column for each profiled experiment.

    Args:
        records: the folder of one kind of GPU, such as experiments/records/h200-141gb.
        published: the published row of each experiment, whose profile is shown where it has one.
    """
    paths = {id_: records / FOLDER / f"{id_}.json" for id_ in ids}
    found = {id_: read_recorded(path) for id_, path in paths.items() if path.exists()}
    parts = [
        f"- {id_}: not measured yet; `make {id_} PROFILE=1` does, `make record RUN=…` keeps it."
        for id_ in ids
        if id_ not in found
    ]
    if found:
        parts += ["", _profile_table(found)]
    parts += [
        f"\n{row.id} as published:"
        f" {', '.join(f'{name} {ms:g} ms' for name, ms in row.profiled_ms.items())}, together"
        f" {sum(row.profiled_ms.values()):g} of a step of {row.step_ms:g} ms."
        for row in published
        if row and row.profiled_ms
    ]
    return "\n".join(parts)


def slow_steps(rows: Sequence[Row]) -> str:
    """Steps that took more than SLOW times the median of their run, with the ms beyond it."""
    lines, calm = [], []
    for row in rows:
        steps_ms = {
            step.step: step.step_ms
            for step in metrics(row)
            if step.step >= row.experiment.window_first_step
        }
        if not steps_ms:
            continue
        median = statistics.median(steps_ms.values())
        slow = {step: ms - median for step, ms in steps_ms.items() if ms > SLOW * median}
        if not slow:
            calm.append(row.origin.stem)
            continue
        said = ", ".join(f"{step} (+{more:.0f} ms)" for step, more in slow.items())
        gpus = str(row.experiment.world_size)
        lines.append([row.origin.stem, gpus, str(len(steps_ms)), f"{median:.0f}", said])
    head = ["record", "GPUs", "steps", "median ms", "slow steps"]
    return f"{markdown.table(head, lines, 'lrrrl')}\n\nNone in {', '.join(calm)}."


def _profile_table(found: Mapping[str, Profile]) -> str:
    ranks = [profile.ranks[0] for profile in found.values()]

    def line(title: str, ms: Callable[[RankProfile], float]) -> list[str]:
        return [title, *(f"{ms(rank):.1f} ({ms(rank) / rank.step_ms:.0%})" for rank in ranks)]

    untraced = (profile.untraced_step_ms for profile in found.values())
    lines = [
        *(line(TITLES[kind], lambda rank, kind=kind: rank.categories[kind]) for kind in Category),
        line("**step, traced**", lambda rank: rank.step_ms),
        ["the run's other steps", *(f"{ms:.1f}" if ms else "" for ms in untraced)],
        line("communication in all", lambda rank: rank.communication_ms),
        line("hidden of it", lambda rank: rank.hidden_ms),
        line("forward", lambda rank: rank.phases["forward"]),
        line("backward", lambda rank: rank.phases["backward"]),
        line("other", lambda rank: rank.phases["optimizer"] + rank.phases["rest"]),
    ]
    return markdown.table(["ms a step", *found], lines, "l" + "r" * len(found))
