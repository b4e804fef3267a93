"""The profile of a run, from the traces of its ranks; ``make profile`` prints it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from harness import RECORDS
from harness.errors import UserError, first_line, nearest
from harness.experiment import command_line
from harness.profiling import summary, trace
from harness.profiling.kernels import TITLES, Category
from harness.profiling.summary import RankProfile
from harness.run import finding
from harness.run.directory import RunDir
from harness.run.schema import Rank
from harness.system import screen
from harness.system.files import complaint, read_object, write_json

FORMATS = ("terminal", "csv", "json")
FOLDER = "profiles"
"""Folder of profiles among the records of a GPU: experiments/records/<gpu>/profiles/<id>.json."""
MOST_UNKNOWN = 5
PASSES = ("forward_pass", "backward_pass")


class Profile(BaseModel):
    """The traced steps ``first_step`` to ``last_step`` of a run.

    ``untraced_step_ms`` is the median of the run's other steps; tracing adds the difference to a
    rank's ``step_ms``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    label: str
    gpu: str | None
    first_step: int
    last_step: int
    untraced_step_ms: float | None
    ranks: tuple[RankProfile, ...]


def of_run(run: RunDir) -> Profile:
    """The profile of a run, from profile.json or, the first time, from its traces.

    Raises:
        UserError: the run was not traced or left no complete trace.
    """
    try:
        if run.profile.exists():
            return Profile.model_validate_json(run.profile.read_text(encoding="utf-8"))
        experiment, device, result = run.read_experiment(), run.read_device(), run.read_result()
    except (OSError, ValueError) as error:
        raise UserError(f"{run.label}: {first_line(error)}") from None
    if not experiment.profile:
        raise UserError(
            f"{run.label} was not traced\nrun it with PROFILE=1: make {experiment.id} PROFILE=1"
        )
    first, last = experiment.profile
    found = sorted(run.traces.glob("[0-9]*.json.gz"), key=_rank_of)
    if not found:
        done = result.steps_done if result else 0
        raise UserError(
            f"{run.label} left no trace of steps {first} to {last}: it did {done} steps\nlogs.txt"
            " may give the reason"
        )
    ranks = {rank.rank: rank for rank in run.read_ranks()}
    profile = Profile(
        label=run.label,
        gpu=result.gpu if result else None,
        first_step=first,
        last_step=last,
        untraced_step_ms=result.step_ms.median if result and result.step_ms else None,
        ranks=tuple(
            summary.summarise(
                trace.read(path, device), _rank_of(path), _coordinates(ranks.get(_rank_of(path)))
            )
            for path in found
        ),
    )
    if result:  # before, the median may still change
        write_json(run.profile, profile.model_dump(mode="json"))
    return profile


def _rank_of(path: Path) -> int:
    return int(path.name.split(".")[0])


def _coordinates(rank: Rank | None) -> dict[str, int]:
    return rank.coordinates if rank else {}


def find(outdir: Path, records: Path, wanted: str) -> Profile:
    """The profile of the run with this label, of the experiment's newest traced run, or its record.

    Raises:
        UserError: there is none.
    """
    if (outdir / wanted).is_dir():
        return of_run(RunDir(outdir / wanted))
    traced = [run for run in finding.candidates(outdir)[0] if run.experiment.profile]
    same = [run for run in traced if wanted in (run.experiment.id, run.experiment.name)]
    if same:
        return of_run(finding.one(wanted, same).dir)
    recorded = {
        f"{path.parents[1].name}/{path.stem}": path
        for path in sorted(records.glob(f"*/{FOLDER}/*.json"))
    }
    for name, path in recorded.items():
        if wanted in (name, path.stem):
            return read_recorded(path)
    there = [*(run.dir.label for run in traced), *recorded]
    raise UserError(
        f"no traced run is called {wanted}; "
        + (nearest(wanted, there) if there else "trace one: make 101 PROFILE=1")
    )


def read_recorded(path: Path) -> Profile:
    """The profile that is recorded in ``path``. Raises UserError if it cannot be read."""
    try:
        return Profile.model_validate(read_object(path))
    except ValidationError as error:
        raise UserError(complaint(path, error)) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def print_profile(settings: Mapping[str, str]) -> int:
    """``make profile RUN=… FORMAT=…``: exit status. Raises UserError as ``find`` and ``render``."""
    found = find(finding.outdir(settings), RECORDS, settings["RUN"])
    print(render(found, settings.get("FORMAT", "terminal")), end="")
    return 0


def tell(run: RunDir) -> None:
    """Print the profile of a run that has just ended, or a warning with the reason for none."""
    try:
        print(f"\n{render(of_run(run))}", end="")
    except UserError as error:
        print(f"warning: no profile: {error}", file=sys.stderr)


def render(profile: Profile, format: str = "terminal") -> str:
    """The profile as a table with a column per rank, as CSV with a line per number, or as JSON.

    Raises:
        UserError: the format is unknown.
    """
    command_line.choice("FORMAT", format, FORMATS)
    if format == "json":
        return json.dumps(profile.model_dump(mode="json"), indent=1) + "\n"
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("label", "rank", "quantity", "name", "ms", "share", "calls"), *_values(profile)]
        )
        return text.getvalue()
    return "\n".join(_lines(profile)) + "\n"


def _values(profile: Profile) -> Iterator[tuple[Any, ...]]:
    """The lines of the CSV: label, rank, quantity, name, ms per step, share, calls per step."""
    for r in profile.ranks:
        numbers = [("step", "", r.step_ms, None)]
        numbers += [("category", category, ms, None) for category, ms in r.categories.items()]
        numbers += [("phase", phase, ms, None) for phase, ms in r.phases.items()]
        numbers += [
            ("communication", "all", r.communication_ms, None),
            ("communication", "hidden", r.hidden_ms, None),
        ]
        numbers += [("kernel", kernel.name, kernel.ms, kernel.calls) for kernel in r.kernels]
        for quantity, name, ms, calls in numbers:
            yield profile.label, r.rank, quantity, name, ms, ms / r.step_ms, calls


def _lines(profile: Profile) -> Iterator[str]:
    ranks = profile.ranks
    yield (
        f"{profile.label}: steps {profile.first_step} to {profile.last_step}, ms per step and share"
        " of it"
    )
    head = ["", *(_title(rank, len(ranks)) for rank in ranks)]
    used = [c for c in Category if any(rank.categories[c] for rank in ranks)]
    rows = [_row(TITLES[c], ranks, lambda rank, c=c: rank.categories[c]) for c in used]
    rows += [
        _row("step, traced", ranks, lambda rank: rank.step_ms),
        [],
        _row("forward", ranks, lambda rank: rank.phases["forward"]),
        _row("backward", ranks, lambda rank: rank.phases["backward"]),
        _row("other", ranks, lambda rank: rank.phases["optimizer"] + rank.phases["rest"]),
        _row("  optimizer of it", ranks, lambda rank: rank.phases["optimizer"]),
        [],
    ]
    if any(rank.communication_ms for rank in ranks):
        rows.append(_row("communication in all", ranks, lambda rank: rank.communication_ms))
        rows.append(_row("  hidden of it", ranks, lambda rank: rank.hidden_ms))
    for name in PASSES:
        passes = [getattr(rank, name) for rank in ranks]
        if any(passes):
            rows.append([f"one {name.replace('_pass', '')} pass, busy", *map(_pass, passes)])
    yield from screen.grid([head, *rows])
    if profile.untraced_step_ms:
        yield (
            f"The run's other steps take {profile.untraced_step_ms:.1f} ms: tracing slows a step,"
            " so trust the shares."
        )
    if ranks[0].device == "cpu":
        yield (
            "CPU miniature: operators of the main thread and gloo's collectives; idle is the Python"
            " code between them."
        )
    for r in ranks:
        if r.unknown:
            longest = ", ".join(f"{k.name[:60]} {k.ms:.2f}" for k in r.unknown[:MOST_UNKNOWN])
            yield f"other kernels on rank {r.rank}, ms per step: {longest}" + (
                ", …" if len(r.unknown) > MOST_UNKNOWN else ""
            )


def _title(r: RankProfile, ranks: int) -> str:
    return f"rank {r.rank}" + (
        f", stage {r.coordinates['pp']}" if ranks > 1 and "pp" in r.coordinates else ""
    )


def _row(
    title: str, ranks: tuple[RankProfile, ...], ms_of: Callable[[RankProfile], float]
) -> list[str]:
    """A line of the table: of each rank ms per step and the share of the step."""
    return [title, *(f"{ms_of(r):,.2f} {ms_of(r) / r.step_ms:6.1%}" for r in ranks)]


def _pass(found: summary.Pass | None) -> str:
    return f"{found.ms:,.2f} x{found.calls:<5g}" if found else ""
