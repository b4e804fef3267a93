"""``make chapter-100``: all experiments of a chapter. Those with a result are skipped, small ones
share the GPUs of the machine."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import UserError, first_line
from harness.experiment import identity
from harness.experiment.catalog import EXPERIMENTS
from harness.experiment.experiment import Experiment
from harness.launching.active_run import POLL_S, ActiveRun, Finished
from harness.launching.launch import check_ready, show_progress
from harness.launching.processes import Signals
from harness.launching.reservation import reserve
from harness.launching.terminal import Terminal, open_terminal, summary
from harness.machine import gpus
from harness.run import directory

if TYPE_CHECKING:
    from harness.planning.plan import Plan

HAS_RESULT = ("ok", "oom")
"""Statuses that another run of the same experiment would repeat."""


@dataclass(frozen=True)
class ExperimentOutcome:
    """What happened to one experiment of a chapter.

    ``good``: it ended ok, or ran out of memory like the published run.
    """

    status: str
    note: str
    good: bool = False


def run_chapter(
    experiments: Sequence[Experiment],
    plan_for: Callable[[Experiment], Plan],
    *,
    hang_seconds: float | None = None,
    pack: bool = True,
    force: bool = False,
    terminal: Terminal | None = None,
) -> int:
    """Run ``experiments`` and print a table of what happened; a failure does not stop the others.

    Args:
        plan_for: plans an experiment for this machine; a UserError skips it, with its reason.
        hang_seconds: see ``ActiveRun``.
        pack: run as many at the same time as the GPUs allow; else one at a time, for timing. CPU
            runs are never packed.
        force: also run experiments that have a result.

    Returns:
        the exit status: 0 if all that ran, now or before, ended ok or ran out of memory like the
        published run; 1 if not, or if none ran; 128 + signal if it was stopped.
    """
    with Signals() as signals, terminal or open_terminal() as shown:
        chapter = _Chapter(shown, hang_seconds, pack)
        for experiment in experiments:
            chapter.add(experiment, plan_for, force)
        return chapter.run(signals)


class _Chapter:
    """The runs of a chapter: waiting, held, running, over."""

    def __init__(self, shown: Terminal, hang_seconds: float | None, pack: bool) -> None:
        self._shown, self._hang_seconds, self._pack = shown, hang_seconds, pack
        self._outcomes: dict[str, ExperimentOutcome] = {}
        self._waiting: list[Plan] = []
        self._running: list[ActiveRun] = []
        self._held: ActiveRun | None = None
        self._free: list[int] | None = None
        self._gpus: tuple[int, ...] = ()
        self._stopped_by: signal.Signals | None = None

    def add(
        self, experiment: Experiment, plan_for: Callable[[Experiment], Plan], force: bool
    ) -> None:
        """Queue an experiment that can run here and has no result."""
        try:
            plan = plan_for(experiment)
            self._check(plan)
        except UserError as error:
            self._outcomes[experiment.name] = ExperimentOutcome("skipped", first_line(error))
            return
        here = next((gpu.name for gpu in gpus.list_gpus()), None) if plan.device == "cuda" else None
        earlier = None if force else earlier_result(plan, here)
        if earlier:
            self._outcomes[experiment.name] = _judge(
                earlier, f"{earlier.dir.label} has its result, FORCE=1 runs it again"
            )
        else:
            self._outcomes[experiment.name] = ExperimentOutcome("not run", "")
            self._waiting.append(plan)

    def run(self, signals: Signals) -> int:
        """Run the queued experiments, print the table, return the exit status."""
        self._shown.print(f"{len(self._waiting)} of {len(self._outcomes)} experiments to run")
        try:
            while self._waiting or self._running or self._held:
                if number := signals.take():
                    self._stopped_by = self._stopped_by or number
                    self._stop(number, signals.ended)
                self._start_what_fits()
                self._hold_the_next()
                for run in self._running.copy():
                    if run.poll():
                        show_progress(run, self._shown)
                    else:
                        self._close(run)
                time.sleep(POLL_S)
        finally:
            self._stop(signal.SIGTERM)
            for run in self._running:
                run.abort()
            self._drop_held()
        self._shown.print(_table(self._outcomes))
        if self._stopped_by:
            return 128 + self._stopped_by
        ran = [outcome for outcome in self._outcomes.values() if outcome.status != "skipped"]
        return 0 if ran and all(outcome.good for outcome in ran) else 1

    def _check(self, plan: Plan) -> None:
        """Raise UserError where this node is too small for ``plan``."""
        e = plan.experiment
        if e.nodes > 1:
            raise UserError(f"it needs {e.nodes} nodes: make {e.id} alone says how")
        if plan.device == "cuda":
            if self._free is None:
                self._gpus = tuple(sorted(gpus.available(plan.place.gpu_ids)))
                self._free = list(self._gpus)
            if e.ranks_per_node > len(self._free):
                raise UserError(
                    f"it needs {e.ranks_per_node} GPUs, {len(self._free)} are free here"
                )
        if e.half_of and (self._free is None or 2 * e.ranks_per_node <= len(self._free)):
            raise UserError(
                f"{e.half_of} itself fits here; make {e.id} runs its half-size companion all the "
                "same"
            )

    def _start_what_fits(self) -> None:
        if (
            self._held
            and set(self._held.gpu_ids) <= set(self._free or ())
            and not (self._running and not self._pack)
        ):
            held, self._held = self._held, None
            self._occupy_gpus(held)
            held.release()
        for plan in self._waiting.copy():
            count = plan.experiment.ranks_per_node if plan.device == "cuda" else 0
            alone = plan.device == "cpu" or not self._pack
            if count <= len(self._free or ()) and not (alone and (self._running or self._held)):
                self._waiting.remove(plan)
                if run := self._launch(plan, tuple((self._free or ())[:count])):
                    self._occupy_gpus(run)

    def _hold_the_next(self) -> None:
        """While the GPUs are busy, start the next run held.

        Importing takes as long as twenty steps of a short run, and needs no GPU.
        """
        if self._held or not self._running or not self._waiting:
            return
        plan = self._waiting[0]
        count = plan.experiment.ranks_per_node
        if plan.device == "cuda" and (count == len(self._gpus) or not self._pack):
            self._waiting.remove(plan)
            self._held = self._launch(plan, self._gpus[:count], held=True)

    def _launch(self, plan: Plan, gpu_ids: tuple[int, ...], held: bool = False) -> ActiveRun | None:
        try:
            check_ready(plan)
            reserved = reserve(plan, plan.experiment.label, self._shown.print)
        except UserError as error:
            self._outcomes[plan.experiment.name] = ExperimentOutcome("not run", first_line(error))
            return None
        try:
            return ActiveRun(plan, reserved, gpu_ids, self._hang_seconds, held=held)
        except BaseException as error:
            reserved.abandon(error)
            raise

    def _occupy_gpus(self, run: ActiveRun) -> None:
        """Move ``run`` to the running ones, and its GPUs out of the free ones."""
        self._free = self._free and [gpu for gpu in self._free if gpu not in run.gpu_ids]
        for other in self._running:
            other.packed_with.add(run.label)
            run.packed_with.add(other.label)
        self._running.append(run)

    def _drop_held(self) -> None:
        """End a held run and remove its directory."""
        if self._held:
            with suppress(UserError):  # its directory was deleted
                self._held.abort()
            shutil.rmtree(self._held.dir.path, ignore_errors=True)
            self._held = None

    def _close(self, run: ActiveRun) -> None:
        self._running.remove(run)
        self._free = sorted([*(self._free or ()), *run.gpu_ids])
        try:
            finished = run.finish()
        except UserError as error:
            self._shown.finish(run.label)
            self._outcomes[run.plan.experiment.name] = ExperimentOutcome("crash", first_line(error))
            return
        show_progress(run, self._shown)
        self._shown.finish(run.label)
        self._shown.print(summary(run.label, finished.dir.path, finished.result))
        self._outcomes[run.plan.experiment.name] = _judge(finished, finished.dir.label)

    def _stop(self, number: signal.Signals, because_ended: str | None = None) -> None:
        """Start no further run, and end the running ones."""
        self._waiting.clear()
        self._drop_held()
        for run in self._running:
            run.stop(number, because_ended)


def earlier_result(plan: Plan, gpu: str | None = None) -> Finished | None:
    """The newest run of the same experiment whose status is in ``HAS_RESULT``; on a GPU called
    ``gpu``, where that is given."""
    runs, _ = directory.runs(plan.outdir)
    same = [
        Finished(run.dir, run.result)
        for run in runs
        if run.state in HAS_RESULT
        and run.device == plan.device
        and identity.same(run.experiment, plan.experiment)
        and not run.result.mixed
        and gpu in (None, run.result.gpu)
    ]
    return max(same, key=lambda finished: finished.result.started, default=None)


def _judge(finished: Finished, note: str) -> ExperimentOutcome:
    result = finished.result
    if result.status == "oom" and as_published(finished):
        return ExperimentOutcome("oom", f"as published; {note}", good=True)
    return ExperimentOutcome(result.status, note, good=result.status == "ok")


def as_published(finished: Finished) -> bool:
    """Whether a run ended like the published one, on a comparable card: ok, or out of memory.

    Half-size experiments are not published: one that ran out of memory ended as published if the
    full-size experiment did so.
    """
    from harness.evidence.references import load_references
    from harness.evidence.results import collect

    references = load_references()
    rows = collect(finished.dir.path.parent, EXPERIMENTS / "records", references).rows
    row = next((row for row in rows if row.label == finished.dir.label), None)
    if row is None:
        return False
    whole = (
        references.published.matching(row.experiment.half_of) if row.experiment.half_of else None
    )
    return bool(
        row.as_published
        or (row.state == "oom" and whole and whole.reference and whole.reference.oom)
    )


def _table(outcomes: dict[str, ExperimentOutcome]) -> str:
    width = max(map(len, outcomes))
    return "\n".join(
        f"{name:{width}}  {o.status:8}  {o.note}".rstrip() for name, o in outcomes.items()
    )
