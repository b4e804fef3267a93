"""The points of a sweep: what each runs, its predicted time and memory, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from harness.errors import UserError, first_line
from harness.evidence.plans import LAID_OUT
from harness.evidence.speed import predictable
from harness.experiment import identity, overrides
from harness.experiment.constraints import violations
from harness.experiment.experiment import Experiment
from harness.experiment.extra_arguments import unpredictable
from harness.machine import gpus
from harness.planning import plan, resolved
from harness.planning.plan import Plan
from harness.predict.capacity import Verdict, verdict
from harness.predict.memory import predict
from harness.predict.step_time import unknown
from harness.search.further import further
from harness.search.layouts import Layout, faster
from harness.search.layouts import Search as LayoutSearch
from harness.sweep import grid
from harness.sweep.request import SweepRequest

AS_IT_STANDS = "the row as it stands"
NAMED = 3
"""Candidates that are named one by one."""


@dataclass(frozen=True)
class Candidate:
    """Settings that may become a point.

    Attributes:
        shown: those that tell it from the row with the settings of every run.
        typed: all that is typed after ``make <id>``.
    """

    shown: Mapping[str, str]
    typed: Mapping[str, str]

    @property
    def name(self) -> str:
        """What tells it from the others of a sweep."""
        return overrides.typed(self.shown) or AS_IT_STANDS

    @property
    def is_row(self) -> bool:
        return not self.shown


@dataclass(frozen=True)
class Point:
    """A candidate that can run here.

    Attributes:
        step_ms: predicted, at full size; None: not predicted.
        band: relative error of such predictions, their 90th percentile; None: unknown.
        gib: predicted memory as nvidia-smi shows it.
        fits: whether that fits the card; None: not predicted.
        also: other candidates that are the same experiment.
    """

    candidate: Candidate
    plan: Plan
    step_ms: float | None
    band: float | None
    gib: float | None
    fits: Verdict | None
    also: tuple[Candidate, ...] = ()

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def is_row(self) -> bool:
        return any(one.is_row for one in (self.candidate, *self.also))

    @cached_property
    def key(self) -> str:
        """Equal for equal experiments."""
        return identity.frozen(self.plan.experiment).model_dump_json()

    @property
    def is_too_large(self) -> bool:
        """Whether it runs out of memory whatever the prediction's error."""
        return self.plan.device == "cuda" and self.fits == "does not fit"

    @property
    def is_at_the_border(self) -> bool:
        """Whether it may run out of memory."""
        return self.plan.device == "cuda" and self.fits == "may run out"

    @property
    def tokens(self) -> int:
        """Of a step."""
        experiment = self.plan.experiment
        return experiment.global_batch_size * experiment.seq_length

    @property
    def speed_rank(self) -> tuple[float, str]:
        """Sorts the fastest first, those without a prediction last."""
        return (math.inf if self.step_ms is None else self.step_ms), self.name


@dataclass
class Selection:
    """What of a sweep is run, the predicted fastest first, and what is not, with the reason."""

    points: list[Point] = field(default_factory=list)
    too_large: list[Point] = field(default_factory=list)
    refused: dict[str, list[Candidate]] = field(default_factory=dict)

    @property
    def row(self) -> Point | None:
        """The row as it stands, where it can run here."""
        return next((point for point in self.points if point.is_row), None)


def candidates(request: SweepRequest) -> Iterator[Candidate]:
    """The row as it stands, then what ``GRID=`` or ``TOP=`` asks for.

    Raises UserError where no step time of the row is predicted, for ``TOP=``.
    """
    yield Candidate({}, request.base)
    if request.grid is not None:
        for chosen in grid.points(request.grid):
            yield Candidate(chosen, {**request.base, **chosen})
    else:
        yield from _best_predicted(request)


def select(request: SweepRequest) -> Selection:
    """Plan and predict every candidate.

    Raises:
        UserError: none of them can run here; the message says why.
    """
    found = sort_out(request, candidates(request))
    if not found.points:
        reasons = [f"  {reason}: {in_words(refused)}" for reason, refused in found.refused.items()]
        reasons += [
            f"  needs {point.gib:.1f} GiB, more than {request.card.name} has: {point.name}"
            for point in found.too_large
        ]
        raise UserError("\n".join([f"{request.row.id}: no point of the sweep can run", *reasons]))
    return found


def in_words(those: Sequence[Candidate]) -> str:
    """The candidates by name; of several, how many, and the settings that all of them have."""
    if len(those) <= NAMED:
        return ", ".join(one.name for one in those)
    common = dict(set.intersection(*(set(one.shown.items()) for one in those)))
    shared = {key: value for key, value in those[0].shown.items() if key in common}
    return f"{len(those)} points{' with ' * bool(shared)}{overrides.typed(shared)}"


def sort_out(request: SweepRequest, asked: Iterable[Candidate]) -> Selection:
    """Which candidates can run; those that are the same experiment count once."""
    found, by_key = Selection(), {}
    for candidate in asked:
        try:
            point = planned(request, candidate)
        except UserError as error:
            reason = first_line(error).removeprefix(f"{request.row.id}: ")
            found.refused.setdefault(reason, []).append(candidate)
            continue
        first = by_key.setdefault(point.key, point)
        if first is not point and candidate.name != first.name:
            by_key[point.key] = replace(first, also=(*first.also, candidate))
    for point in sorted(by_key.values(), key=lambda point: point.speed_rank):
        (found.too_large if point.is_too_large else found.points).append(point)
    return found


def planned(request: SweepRequest, candidate: Candidate) -> Point:
    """The point of ``candidate``. Raises UserError where a constraint or the card forbids it."""
    settings = dict(candidate.typed)
    if request.device == "cuda" and not gpus.list_gpus():
        settings.pop("CARD", None)  # nothing to cap here: it is only shown, or a job's
    _check_size(request, resolved.with_settings(request.row, settings, request.outdir), settings)
    made = plan.plan(request.row, settings, request.device)
    full = made.full
    if request.device == "cuda":
        on_card = full.model_copy(update={"card": request.card.key})
        if broken := next(violations(on_card), None):
            raise UserError(broken)
    if unpredictable(full.extra_args):
        return Point(candidate, made, None, None, None, None)
    memory = predict(full)
    fits = verdict(memory, request.card)
    step_ms, band = _step(request, full)
    return Point(candidate, made, step_ms, band, memory.in_all, fits)


def _check_size(request: SweepRequest, experiment: Experiment, settings: Mapping[str, str]) -> None:
    """Raise UserError where this machine has too few GPUs; without one it is another's plan."""
    if request.base.get("SLURM") == "1":
        return
    if experiment.nodes > 1 and (request.device == "cuda" or "NODES" in settings):
        raise UserError(f"needs {experiment.nodes} nodes; SLURM=1 makes the sweep a job array")
    there = len(gpus.list_gpus())
    if request.device == "cuda" and there and experiment.ranks_per_node > there:
        raise UserError(f"needs {experiment.ranks_per_node} GPUs, this machine has {there}")


def _step(request: SweepRequest, experiment: Experiment) -> tuple[float | None, float | None]:
    """Predicted step time in ms, and its relative error; None where unknown."""
    machine = request.machine
    if machine is None or unknown(experiment):
        return None, None
    band = machine.band(experiment)
    return machine.predict(experiment).total, band and band.most


def _best_predicted(request: SweepRequest) -> Iterator[Candidate]:
    """The fastest set-ups of the same work by formula.

    Layouts, as ``make faster-101`` lists them, and settings in the best of them that keep the
    arithmetic.
    """
    experiment, machine = predictable(request.experiment), request.machine
    if machine is None:
        raise UserError(
            f"{request.card.name} has no bf16, in which steps are predicted; GRID= names the points"
        )
    layouts = faster(experiment, machine, request.top)
    search = LayoutSearch(experiment, experiment.world_size, machine.card, machine)
    best = layouts[0] if layouts else _as_layout(experiment, request)
    options = [one for one in further(best, search) if not one.other_arithmetic]
    ahead = sorted([*layouts, *options], key=lambda one: one.step.total)[: request.top]
    left = {key: value for key, value in request.base.items() if key not in _LAYOUT_SETTINGS}
    for one in ahead:
        changed = {key: value for key, value in one.experiment.overrides.items() if key != "CARD"}
        shown = {key: value for key, value in changed.items() if request.base.get(key) != value}
        yield Candidate(shown, left | changed)


_LAYOUT_SETTINGS = {*LAID_OUT.values(), "GPUS", "NODES"}
"""Settings that the search for layouts types itself, where they are needed."""


def _as_layout(experiment: Experiment, request: SweepRequest) -> Layout:
    machine = request.machine
    return Layout(
        experiment, predict(experiment), machine.predict(experiment), machine.error(experiment)
    )
