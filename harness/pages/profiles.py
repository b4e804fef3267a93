"""What documents quote of profiles and of slow steps, as Markdown made from records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.evidence.references import Reference
from harness.evidence.rows import Row, metrics
from harness.profiling.kernels import TITLES, Category
from harness.profiling.profile import FOLDER, read_recorded
from harness.profiling.summary import RankProfile

SLOW = 1.5
"""A step is slow that takes this many times its run's median."""


def profiles(records: Path, ids: Sequence[str], published: Sequence[Reference | None]) -> str:
    """Where the time of a step goes: a column for the first rank of each experiment in ``ids``,
    profiled on one kind of GPU.

    Args:
        records: the folder of that GPU, such as experiments/records/h200-141gb.
        published: the published row beside each, whose profile is shown where it has one.
    """
    paths = {id_: records / FOLDER / f"{id_}.json" for id_ in ids}
    found = {id_: read_recorded(path) for id_, path in paths.items() if path.exists()}
    measured = {id_: profile.ranks[0] for id_, profile in found.items()}
    lines = [
        f"- {id_}: not measured yet; `make {id_} PROFILE=1` does, `make record RUN=…` keeps it."
        for id_ in ids
        if id_ not in measured
    ]
    if measured:
        lines += ["", f"| ms a step | {' | '.join(measured)} |", "|:--|" + "--:|" * len(measured)]
        lines += [
            f"| {TITLES[c]} | {_row(measured, lambda r, c=c: r.categories[c])} |" for c in Category
        ]
        untraced = (profile.untraced_step_ms for profile in found.values())
        lines += [
            f"| **step, traced** | {_row(measured, lambda r: r.step_ms)} |",
            (
                "| the run's other steps |"
                f" {' | '.join(f'{ms:.1f}' if ms else '' for ms in untraced)} |"
            ),
            f"| communication in all | {_row(measured, lambda r: r.communication_ms)} |",
            f"| hidden of it | {_row(measured, lambda r: r.hidden_ms)} |",
        ]
        lines += [
            f"| {name} | {_row(measured, _phase(name))} |"
            for name in ("forward", "backward", "other")
        ]
    lines += [
        f"\n{r.id} as published:"
        f" {', '.join(f'{name} {ms:g} ms' for name, ms in r.profiled_ms.items())}, together"
        f" {sum(r.profiled_ms.values()):g} of a step of {r.step_ms:g} ms."
        for r in published
        if r and r.profiled_ms
    ]
    return "\n".join(lines)


def slow_steps(rows: Sequence[Row]) -> str:
    """Every step of a record after its first few that took SLOW times the median, and what it took
    more, in ms."""
    lines = ["| record | GPUs | steps | median ms | slow steps |", "|:--|--:|--:|--:|:--|"]
    calm = []
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
        said = ", ".join(f"{step} (+{more:.0f} ms)" for step, more in slow.items())
        if said:
            lines.append(
                f"| {row.origin.stem} | {row.experiment.world_size} | {len(steps_ms)} |"
                f" {median:.0f} | {said} |"
            )
        else:
            calm.append(row.origin.stem)
    return "\n".join([*lines, "", f"None in {', '.join(calm)}."])


def _row(measured: Mapping[str, RankProfile], number: Callable[[RankProfile], float]) -> str:
    return " | ".join(
        f"{number(rank):.1f} ({number(rank) / rank.step_ms:.0%})" for rank in measured.values()
    )


def _phase(name: str) -> Callable[[RankProfile], float]:
    return lambda rank: (
        rank.phases["optimizer"] + rank.phases["rest"] if name == "other" else rank.phases[name]
    )
