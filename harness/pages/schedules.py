"""Timelines of pipeline schedules, with what is written around them, for plots and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from harness.errors import UserError
from harness.evidence.references import load_references
from harness.experiment import command_line, overrides
from harness.experiment.catalog import Catalog
from harness.experiment.experiment import Experiment
from harness.pages.axes import ticks
from harness.predict.calibrations import Machine, machine_measured_by
from harness.predict.step_time import unknown
from harness.predict.timeline import Timeline, Times, bubble_fraction, simulate
from harness.profiling.profile import FOLDER, Profile, of_run
from harness.run import directory
from harness.system.files import read_object

PIPELINES = (("408", "438"), ("408h", "438h"))
"""Pairs of a plain and an interleaved pipeline; the first pair that was profiled is drawn."""
ASSUMED = "forward : backward = 1 : 2, assumed, not measured"


@dataclass(frozen=True)
class Key:
    """One entry of a timeline's legend."""

    words: str
    kind: str
    """CSS class: ``own``, ``own late`` for even chunks, or ``idle``."""
    colour: int | None
    """0 for forward, 1 for backward passes, None for idle time."""


@dataclass(frozen=True)
class Schedule:
    """A pipeline's timeline and where its times come from."""

    name: str
    title: str
    timeline: Timeline
    times_from: str
    until: float
    """End of the time axis."""
    unit: str | None = None
    """None where times count forward passes of one micro-batch through one stage."""

    @property
    def axis_title(self) -> str:
        return f"time, {self.unit or 'forward passes of one micro-batch through one stage'}"

    @property
    def ticks(self) -> list[float]:
        return [at for at in ticks(0, self.until) if at <= self.until]

    @property
    def keys(self) -> tuple[Key, ...]:
        chunks = ("odd", "even") if self.timeline.chunks > 1 else ("",)
        passes = [
            Key(f"{name}, {chunk} chunk" if chunk else name, "own late" if i else "own", colour)
            for colour, name in enumerate(("forward", "backward"))
            for i, chunk in enumerate(chunks)
        ]
        return (*passes, Key("idle", "idle", None))

    @property
    def caption(self) -> tuple[str, str]:
        """The bubble, measured in the timeline and by formula; where the times come from."""
        plan = self.timeline
        p, m, v = plan.stages, plan.micro_batches, plan.chunks
        formula = f"(p-1)/m with p = {p}, m = {m}"
        if v > 1:
            formula = f"(p-1)/(v m) with p = {p}, m = {m}, v = {v}"
        return (
            f"Bubble, idle over ideal time: {plan.bubble_fraction:.1%}. Narayanan et al. 2021:"
            f" {formula}, {bubble_fraction(p, m, v):.1%}.",
            f"Times: {self.times_from}. Numbers are micro-batches.",
        )


def pair(catalog: Catalog, profiles: Mapping[str, Profile]) -> tuple[Schedule, ...]:
    """A plain and an interleaved pipeline on one time axis.

    They are figures 3 and 4 of Narayanan et al. 2021: the first of ``PIPELINES`` of which both were
    profiled; where none were, the first by formula.
    """
    pairs = [[catalog.find(id_) for id_ in ids] for ids in PIPELINES]
    measured = [
        two
        for two in pairs
        if all(one.id in profiles and stage_times(one, profiles[one.id]) for one in two)
    ]
    names = ("400-timeline-1f1b", "400-timeline-interleaved")
    found = [
        schedule(
            name,
            f"{'Interleaved ' * (experiment.vpp > 1)}1F1B: {experiment.name}",
            experiment,
            profiles.get(experiment.id) if measured else None,
        )
        for name, experiment in zip(names, (measured or pairs)[0], strict=True)
    ]
    until = max(one.until for one in found)
    return tuple(replace(one, until=until) for one in found)


def every(catalog: Catalog, profiles: Mapping[str, Profile]) -> Iterable[Schedule]:
    """The schedule of every pipeline; the pair that the chapter draws comes first."""
    first = PIPELINES[0]
    for experiment in sorted(catalog.experiments, key=lambda one: one.id not in first):
        if experiment.pp > 1:
            title = f"{experiment.id}: {experiment.layout}"
            yield schedule(experiment.id, title, experiment, profiles.get(experiment.id))


def schedule(name: str, title: str, experiment: Experiment, profile: Profile | None) -> Schedule:
    """The timeline of a pipeline with stage times of ``profile``, else by formula, else assumed.

    Raises:
        UserError: the interleaved schedule has no order for these sizes.
    """
    times = stage_times(experiment, profile) if profile else None
    unit: str | None = "ms"
    if times:
        traced = f"steps {profile.first_step} to {profile.last_step} of {experiment.id}"
        source = f"measured: how long each stage computes in {traced} on {profile.gpu}"
    elif (machine := _published_machine()) and not unknown(experiment):
        times = machine.stage_times(experiment)
        source = f"by formula for {machine.card.name} (make speed-{experiment.id})"
    else:
        times, source, unit = Times.alike(experiment.pp), ASSUMED, None
    timeline = simulate(experiment.num_microbatches, times, experiment.vpp)
    return Schedule(name, title, timeline, source, timeline.end, unit)


def stage_times(experiment: Experiment, profile: Profile) -> Times | None:
    """Busy ms of one micro-batch in each stage, by a traced rank of each; None where one lacks."""
    traced = [rank for rank in profile.ranks if rank.forward_pass and rank.backward_pass]
    stages = {rank.coordinates.get("pp"): rank for rank in reversed(traced)}
    if not set(range(experiment.pp)) <= stages.keys():
        return None
    passes = [(stages[i].forward_pass, stages[i].backward_pass) for i in range(experiment.pp)]
    forward, backward = zip(
        *((p.ms * p.calls / experiment.num_microbatches for p in both) for both in passes),
        strict=True,
    )
    return Times(forward, backward)


def load_profiles(outdir: Path | None, records: Path) -> dict[str, Profile]:
    """Profiles by experiment id, of records and of traced GPU runs in ``outdir``.

    Only runs of the catalogue's own work count.
    """
    found = {}
    for path in sorted(records.glob(f"*/{FOLDER}/*.json")):
        try:
            content = read_object(path)
            experiment = directory.experiment_in(content["experiment"])
            if _as_catalogued(experiment):
                found.setdefault(experiment.id, Profile.model_validate(content))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    for run in directory.runs(outdir)[0] if outdir else ():
        traced = run.experiment.profile and run.device == "cuda" and run.dir.profile.exists()
        if traced and _as_catalogued(run.experiment):
            with suppress(UserError, ValueError):
                found[run.experiment.id] = of_run(run.dir)
    return found


@cache
def _published_machine() -> Machine | None:
    return machine_measured_by(load_references().published.name)


def _as_catalogued(experiment: Experiment) -> bool:
    allowed = command_line.SAME_WORK | {"PROFILE"}
    return not experiment.miniature and overrides.is_same_work(experiment, allowed)
