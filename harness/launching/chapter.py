"""Batches of runs, such as ``make chapter-100``: those with a result are skipped, small ones share
the GPUs of the machine."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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
from harness.system import locks

if TYPE_CHECKING:
    from harness.planning.plan import Plan

HAS_RESULT = ("ok", "oom")
"""Statuses that another run of the same experiment would repeat."""
ELSEWHERE_S = 5.0
"""Time between two looks at a run of another launcher whose result is waited for."""


@dataclass(frozen=True)
class ExperimentOutcome:
    """What happened to one experiment of a batch.

    ``good``: it ended ok, or ran out of memory like the published run.
    """

    status: str
    note: str
    good: bool = False


@dataclass(frozen=True)
class Job:
    """One run of a batch.

    Attributes:
        name: what tells it from the others of the batch.
        plan: plans it for this machine; a UserError skips it, with its reason.
        skipped_if_whole_fits: of a half-size companion: skip it where its experiment fits.
    """

    name: str
    plan: Callable[[], Plan]
    skipped_if_whole_fits: bool = False


@dataclass(frozen=True)
class Batch:
    """How runs are started together.

    Attributes:
        pack: run as many at the same time as the GPUs allow; else one at a time, for timing. CPU
            runs are never packed.
        force: also run what has a result.
        hang_seconds: see ``ActiveRun``.
        guard: a folder that exists. Batches with the same one never run the same experiment twice:
            one that another launcher runs is waited for, and its result taken.
    """

    pack: bool = True
    force: bool = False
    hang_seconds: float | None = None
    guard: Path | None = None


@dataclass(frozen=True)
class BatchEnd:
    """What happened to each job, by name, and the signal that stopped the batch, if one did."""

    outcomes: Mapping[str, ExperimentOutcome]
    stopped_by: signal.Signals | None


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
        hang_seconds, pack, force: see ``Batch``.

    Returns:
        the exit status: 0 if all that ran, now or before, ended ok or ran out of memory like the
        published run; 1 if not, or if none ran; 128 + signal if it was stopped.
    """
    jobs = [Job(one.name, partial(plan_for, one), bool(one.half_of)) for one in experiments]
    with Signals() as signals, terminal or open_terminal() as shown:
        end = run_batch(jobs, Batch(pack, force, hang_seconds), shown, signals)
        shown.print(_table(end.outcomes))
    if end.stopped_by:
        return 128 + end.stopped_by
    ran = [outcome for outcome in end.outcomes.values() if outcome.status != "skipped"]
    return 0 if ran and all(outcome.good for outcome in ran) else 1


def run_batch(jobs: Sequence[Job], batch: Batch, shown: Terminal, signals: Signals) -> BatchEnd:
    """Run ``jobs`` in their order; a failure does not stop the others, a signal does."""
    running = _Batch(shown, batch)
    for job in jobs:
        running.add(job)
    return running.run(signals)


@dataclass
class _Queued:
    """A job that waits.

    Attributes:
        ask_again_at: monotonic time before which it is not asked again whether another launcher
            runs it.
    """

    job: Job
    plan: Plan
    ask_again_at: float = field(default=0.0, init=False)


class _Batch:
    """The runs of a batch: waiting, held, running, over."""

    def __init__(self, shown: Terminal, batch: Batch) -> None:
        self._shown, self._batch, self._pack = shown, batch, batch.pack
        self._outcomes: dict[str, ExperimentOutcome] = {}
        self._waiting: list[_Queued] = []
        self._running: list[ActiveRun] = []
        self._name_of: dict[ActiveRun, str] = {}
        self._held: ActiveRun | None = None
        self._free: list[int] | None = None
        self._gpus: tuple[int, ...] = ()
        self._stopped_by: signal.Signals | None = None
        self._stored: dict[Path, tuple[directory.StoredRun, ...]] = {}

    def add(self, job: Job) -> None:
        """Queue a job that can run here and has no result."""
        try:
            plan = job.plan()
            self._check(plan, job.skipped_if_whole_fits)
        except UserError as error:
            self._outcomes[job.name] = ExperimentOutcome("skipped", first_line(error))
            return
        if plan.outdir not in self._stored:
            self._stored[plan.outdir] = directory.runs(plan.outdir)[0]
        if not self._has_result(job.name, plan, self._stored[plan.outdir]):
            self._outcomes[job.name] = ExperimentOutcome("not run", "")
            self._waiting.append(_Queued(job, plan))

    def run(self, signals: Signals) -> BatchEnd:
        """Run the queued jobs; return what happened to all."""
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
        return BatchEnd(self._outcomes, self._stopped_by)

    def _has_result(self, name: str, plan: Plan, stored: Sequence[directory.StoredRun]) -> bool:
        """Whether one of the runs ``stored`` makes another one needless; if so, take its result."""
        here = next((gpu.name for gpu in gpus.list_gpus()), None) if plan.device == "cuda" else None
        earlier = None if self._batch.force else earlier_result(plan, stored, here)
        if earlier:
            note = f"{earlier.dir.label} has its result, FORCE=1 runs it again"
            self._outcomes[name] = _judge(earlier, note)
        return earlier is not None

    def _check(self, plan: Plan, skipped_if_whole_fits: bool) -> None:
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
        whole_fits = self._free is None or 2 * e.ranks_per_node <= len(self._free)
        if skipped_if_whole_fits and whole_fits:
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
        for queued in self._waiting.copy():
            plan = queued.plan
            count = plan.experiment.ranks_per_node if plan.device == "cuda" else 0
            alone = plan.device == "cpu" or not self._pack
            if count <= len(self._free or ()) and not (alone and (self._running or self._held)):
                run = self._launch(queued, tuple((self._free or ())[:count]))
                if run:
                    self._occupy_gpus(run)

    def _hold_the_next(self) -> None:
        """While the GPUs are busy, start the next run held.

        Importing takes as long as twenty steps of a short run, and needs no GPU.
        """
        if self._held or not self._running or not self._waiting:
            return
        plan = self._waiting[0].plan
        count = plan.experiment.ranks_per_node
        if plan.device == "cuda" and (count == len(self._gpus) or not self._pack):
            self._held = self._launch(self._waiting[0], self._gpus[:count], held=True)

    def _launch(
        self, queued: _Queued, gpu_ids: tuple[int, ...], held: bool = False
    ) -> ActiveRun | None:
        """Start a waiting run; None where it cannot start, or goes on waiting."""
        if time.monotonic() < queued.ask_again_at:
            return None
        with self._turn() as mine:
            if not mine or not self._may_start(queued):
                return None
            self._waiting.remove(queued)
            run = self._start(queued, gpu_ids, held)
            if run:
                self._name_of[run] = queued.job.name
            return run

    def _start(self, queued: _Queued, gpu_ids: tuple[int, ...], held: bool) -> ActiveRun | None:
        plan, name = queued.plan, queued.job.name
        try:
            check_ready(plan)
            reserved = reserve(plan, plan.experiment.label, self._shown.print)
        except UserError as error:
            self._outcomes[name] = ExperimentOutcome("not run", first_line(error))
            return None
        try:
            return ActiveRun(plan, reserved, gpu_ids, self._batch.hang_seconds, held=held)
        except BaseException as error:
            reserved.abandon(error)
            raise

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether no other batch of the same guard looks for what to start at this moment."""
        guard = self._batch.guard
        try:
            if guard:
                locks.take(guard, self._shown.print)
        except locks.Taken:
            yield False
            return
        try:
            yield True
        finally:
            if guard:
                locks.release(guard)

    def _may_start(self, queued: _Queued) -> bool:
        """Whether no other launcher runs it, or has run it meanwhile; then its result is taken."""
        if not self._batch.guard:
            return True
        plan, name = queued.plan, queued.job.name
        stored = directory.runs(plan.outdir)[0]
        if other := next((run for run in stored if _runs_now(run, plan)), None):
            if not queued.ask_again_at:
                self._shown.print(f"{other.dir.label} runs already: its result is waited for")
            queued.ask_again_at = time.monotonic() + ELSEWHERE_S
            return False
        if self._has_result(name, plan, stored):
            self._waiting.remove(queued)
            return False
        return True

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
        name = self._name_of.pop(run)
        try:
            finished = run.finish()
        except UserError as error:
            self._shown.finish(run.label)
            self._outcomes[name] = ExperimentOutcome("crash", first_line(error))
            return
        show_progress(run, self._shown)
        self._shown.finish(run.label)
        self._shown.print(summary(run.label, finished.dir.path, finished.result))
        self._outcomes[name] = _judge(finished, finished.dir.label)

    def _stop(self, number: signal.Signals, because_ended: str | None = None) -> None:
        """Start no further run, and end the running ones."""
        self._waiting.clear()
        self._drop_held()
        for run in self._running:
            run.stop(number, because_ended)


def earlier_result(
    plan: Plan, stored: Sequence[directory.StoredRun], gpu: str | None = None
) -> Finished | None:
    """The newest of ``stored`` that is the same experiment and whose status is in ``HAS_RESULT``.

    On a GPU called ``gpu``, where that is given.
    """
    same = [
        Finished(run.dir, run.result)
        for run in stored
        if run.state in HAS_RESULT
        and _is_run_of(run, plan)
        and not run.result.mixed
        and gpu in (None, run.result.gpu)
    ]
    return max(same, key=lambda finished: finished.result.started, default=None)


def _runs_now(run: directory.StoredRun, plan: Plan) -> bool:
    return run.state == "running" and _is_run_of(run, plan)


def _is_run_of(run: directory.StoredRun, plan: Plan) -> bool:
    return run.device == plan.device and identity.same(run.experiment, plan.experiment)


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


def _table(outcomes: Mapping[str, ExperimentOutcome]) -> str:
    width = max(map(len, outcomes))
    return "\n".join(
        f"{name:{width}}  {o.status:8}  {o.note}".rstrip() for name, o in outcomes.items()
    )
