"""``make sweep``: run many set-ups of one row, packed on this machine's GPUs, and compare them."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping, Sequence

from harness.experiment import command_line, overrides
from harness.launching import terminal
from harness.launching.chapter import HAS_RESULT, Batch, BatchEnd, ExperimentOutcome, Job, run_batch
from harness.launching.commands import prepare_conversations
from harness.launching.processes import Signals
from harness.launching.terminal import Terminal
from harness.machine import gpus, packages
from harness.sweep import arrays, plot, table
from harness.sweep.measured import NOT_RUN, Measured, measured
from harness.sweep.outline import outline
from harness.sweep.points import Point, Selection, select
from harness.sweep.request import FOLDER, OWN, SweepRequest, read_sweep
from harness.system.files import make_folder, told_if_unwritable, write_text
from harness.system.screen import say

FOR_PROGRAMS = ("csv", "json")
"""Formats that leave standard output to the table."""


def sweep(settings: Mapping[str, str]) -> int:
    """Run the points of ``GRID=`` or ``TOP=`` around the row ``ID=``, the predicted fastest first.

    Returns the exit status: 0 where points were measured and none failed but by its memory; 1
    where not; 128 + signal where it was stopped.

    Raises:
        UserError: a setting is invalid, or no point can run here.
    """
    request = read_sweep(settings)
    dry_run, on_slurm = settings.get("DRY_RUN") == "1", settings.get("SLURM") == "1"
    if not dry_run and not on_slurm:
        gpus.keep_awake()
        prepare_conversations([request.row], settings)
    found = select(request)
    format = settings.get("FORMAT", "terminal")
    before = measured(request, found.points)
    if format not in FOR_PROGRAMS:
        done = {one.point.name: one.ms for one in before if one.ms}
        for line in outline(request, found, done, settings.get("PACK") != "0"):
            say(line, hang=4)
    known = [one for one in before if one.row or (dry_run and format in FOR_PROGRAMS)]
    if on_slurm:
        _show(request, known, format)
        return arrays.submit_or_print(request, _without_result(found, before, settings), settings)
    if dry_run:
        _show(request, known, format)
        return 0
    return _run(request, found, settings)


def _run(request: SweepRequest, found: Selection, settings: Mapping[str, str]) -> int:
    """Run what has no result, then print and write the table."""
    searches = request.search and len(found.points) > request.search.trials
    tracks = "WANDB" in settings
    packages.install("heavy", *["tracking"] * tracks, *["search"] * bool(searches))
    format = settings.get("FORMAT", "terminal")
    with told_if_unwritable(request.folder):
        make_folder(request.folder)
    batch = Batch(
        pack=settings.get("PACK") != "0",
        force=settings.get("FORCE") == "1",
        hang_seconds=command_line.count_in(settings, "HANG"),
        guard=request.outdir / FOLDER,
    )
    stream = sys.stderr if format in FOR_PROGRAMS else None
    with Signals() as signals, terminal.open_terminal(stream) as shown:
        runner = Runner(request, batch, shown, signals)
        points = runner.search(found) if searches else runner.run(found.points)
    results = measured(request, points, runner.outcomes)
    _write(request, results, settings)
    _show(request, results, format)
    if runner.stopped_by:
        return 128 + runner.stopped_by
    failed = [one for one in results if one.status not in (*HAS_RESULT, NOT_RUN)]
    return 1 if failed or not any(one.ms for one in results) else 0


class Runner:
    """Runs points of a sweep in batches.

    Attributes:
        outcomes: what happened to each point, by name.
        stopped_by: the signal that stopped it.
    """

    def __init__(
        self, request: SweepRequest, batch: Batch, shown: Terminal, signals: Signals
    ) -> None:
        self._request, self._batch, self._shown, self._signals = request, batch, shown, signals
        self.outcomes: dict[str, ExperimentOutcome] = {}
        self.stopped_by: signal.Signals | None = None

    def run(self, points: Sequence[Point]) -> Sequence[Point]:
        """Run ``points`` in their order."""
        jobs = [
            Job(point.name, lambda point=point: point.plan)
            for point in points
            if point.name not in self.outcomes
        ]
        end: BatchEnd = run_batch(jobs, self._batch, self._shown, self._signals)
        self.outcomes |= end.outcomes
        self.stopped_by = end.stopped_by
        return points

    def search(self, found: Selection) -> Sequence[Point]:
        """Run the points that Optuna chooses, and the row as it stands."""
        from harness.sweep import adaptive

        folder = self._request.folder
        if self._batch.force:
            (folder / adaptive.STORAGE).unlink(missing_ok=True)
        search = adaptive.AdaptiveSearch(self._request, found, folder)
        row = [found.row] if found.row else []
        if row:
            self.run(row)
        if not self.stopped_by:
            search.run(self._measure, self._width(found))
        return [*row, *(point for point in search.tried if point not in row)]

    def _measure(self, points: Sequence[Point]) -> Mapping[str, Measured] | None:
        self.run(points)
        if self.stopped_by:
            return None
        return {one.point.name: one for one in measured(self._request, points, self.outcomes)}

    def _width(self, found: Selection) -> int:
        """Points that this machine runs at the same time."""
        if self._request.device == "cpu" or not self._batch.pack:
            return 1
        most = max(point.plan.experiment.ranks_per_node for point in found.points)
        return max(len(gpus.list_gpus()) // most, 1)


def _without_result(
    found: Selection, before: Sequence[Measured], settings: Mapping[str, str]
) -> list[Point]:
    """The points that are still to run."""
    if settings.get("FORCE") == "1":
        return found.points
    done = {one.point.name for one in before if one.status in HAS_RESULT}
    return [point for point in found.points if point.name not in done]


def _write(request: SweepRequest, results: Sequence[Measured], settings: Mapping[str, str]) -> None:
    """The table and the plot, in the sweep's folder."""
    kept = {*OWN, *request.base} - {"FORMAT"}
    command = overrides.typed({key: settings[key] for key in settings if key in kept})
    title = f"{request.row.name}: {request.command}"
    text = [f"# {title}", "", f"    make sweep {command}", "", table.render(results, "markdown")]
    text += ["", "```", *table.advice(results, request), "```", ""]
    with told_if_unwritable(request.folder):
        write_text(request.folder / "table.md", "\n".join(text))
        write_text(request.folder / "table.csv", table.render(results, "csv") + "\n")
        write_text(request.folder / "plot.svg", plot.draw(results, title))


def _show(request: SweepRequest, results: Sequence[Measured], format: str) -> None:
    if format in FOR_PROGRAMS:
        print(table.render(results, format))
        return
    if not results:
        return
    print(f"\n{table.render(results, format)}\n")
    for line in table.advice(results, request):
        say(line, hang=4)
    if (request.folder / "plot.svg").exists():
        say(f"plot and table: {shlex.quote(str(request.folder))}")
