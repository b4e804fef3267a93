"""An adaptive search of a grid by Optuna, for one that is too large to run whole.

The prior is the predictor's: half of the runs are its best points. Points that break a constraint
or do not fit teach the search where not to look, and cost no run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.predict.capacity import usable_gib
from harness.sweep import grid
from harness.sweep.measured import Measured
from harness.sweep.points import Point, Selection
from harness.sweep.request import SweepRequest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

STORAGE = "optuna.log"
"""Optuna's journal in the sweep's folder: the same command resumes the search."""
OF_THE_PREDICTOR = 0.5
"""Share of the runs that are the predictor's best points."""
MOST_IN_VAIN = 20
"""Proposals in a row that need no run, after which the predictor's best point left is taken."""
NO_STEP_MS = 1e9
"""Objective of a point that breaks a constraint; constraints alone decide how it ranks."""
RAN = "ran"
"""Attribute of a trial that ran."""

Measure = Callable[[Sequence[Point]], Mapping[str, Measured] | None]
"""Runs points and returns what they measured by name; None where a signal stopped it."""


@dataclass(frozen=True)
class _Known:
    """What a point measured; None: it failed."""

    ms_per_token: float | None
    ran_out: bool


class AdaptiveSearch:
    """The search of one sweep; what it tried is in ``STORAGE`` of ``folder``.

    Attributes:
        tried: points that ran, in their order.
    """

    def __init__(self, request: SweepRequest, found: Selection, folder: Path) -> None:
        from optuna import create_study, logging
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        logging.set_verbosity(logging.WARNING)
        self._request, self._grid = request, request.grid or {}
        self._points = _by_settings(found.points)
        self._too_large = _by_settings(found.too_large)
        self._in_order = [point for point in found.points if self._chosen(point)]
        self._known: dict[str, _Known] = {}
        self.tried: list[Point] = []
        storage = JournalStorage(JournalFileBackend(str(folder / STORAGE)))
        self._study: Study = create_study(
            storage=storage, study_name="sweep", direction="minimize", load_if_exists=True
        )
        self._resume() if self._study.trials else self._begin()

    def run(self, measure: Measure, width: int = 1) -> bool:
        """Run points until TRIALS= of them ran, or all; False where a signal stopped it.

        Args:
            width: points that run at the same time, and so are chosen together.
        """
        trials = min(self._request.search.trials, len(self._in_order))
        while len(self.tried) < trials:
            wave = self._wave(min(width, trials - len(self.tried)))
            results = measure([point for _, point in wave])
            if results is None:
                return False
            for trial, point in wave:
                self._tell(trial, point, results[point.name])
        return True

    def _begin(self) -> None:
        """Propose the predictor's best."""
        most = self._request.search.trials
        for point in self._in_order[: max(1, round(OF_THE_PREDICTOR * most))]:
            self._study.enqueue_trial(self._chosen(point))

    def _resume(self) -> None:
        """Take over what ran before; what was interrupted comes first."""
        from optuna.trial import TrialState

        for trial in self._study.trials:
            point = self._points.get(_settings_of(trial))
            if trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
                if point:
                    self._study.enqueue_trial(trial.params)
            elif RAN in trial.user_attrs and point and point.key not in self._known:
                over = any(value > 0 for value in (trial.constraints or {}).values())
                self._known[point.key] = _Known(trial.value, over)
                self.tried.append(point)

    def _wave(self, width: int) -> list[tuple[Trial, Point]]:
        """So many points that have not run, each with its trial."""
        chosen: list[tuple[Trial, Point]] = []
        in_vain = 0
        while len(chosen) < width:
            waiting = {point.key for _, point in chosen}
            if in_vain >= MOST_IN_VAIN:
                left = (
                    point
                    for point in self._in_order
                    if point.key not in self._known and point.key not in waiting
                )
                self._study.enqueue_trial(self._chosen(next(left)))
                in_vain = 0
            trial, point = self._ask()
            if point is None or point.key in self._known or point.key in waiting:
                self._tell_without_a_run(trial, point)
                in_vain += 1
                continue
            chosen.append((trial, point))
        return chosen

    def _ask(self) -> tuple[Trial, Point | None]:
        """The next proposal; None: it breaks a constraint or does not fit."""
        from optuna.distributions import CategoricalDistribution
        from optuna.samplers import TPESampler

        # seeded for each trial, so that an interrupted search goes the same way
        self._study.sampler = TPESampler(
            seed=self._request.search.seed + len(self._study.trials),
            n_startup_trials=max(1, round(OF_THE_PREDICTOR * self._request.search.trials)),
            multivariate=True,
        )
        trial = self._study.ask(
            {key: CategoricalDistribution(values) for key, values in self._grid.items()}
        )
        return trial, self._points.get(_settings_of(trial))

    def _tell(self, trial: Trial, point: Point, result: Measured) -> None:
        self.tried.append(point)
        trial.set_user_attr(RAN, result.row.label if result.row else "")
        ran_out = result.status == "oom"
        ms_per_token = (result.ms or NO_STEP_MS) / point.tokens if result.ms or ran_out else None
        self._known[point.key] = _Known(ms_per_token, ran_out)
        self._tell_known(trial, point)

    def _tell_without_a_run(self, trial: Trial, point: Point | None) -> None:
        """Tell Optuna of a proposal that is known: measured, of another trial, or impossible."""
        if point:
            self._tell_known(trial, point)
            return
        too_large = self._too_large.get(_settings_of(trial))
        over = too_large.gib / usable_gib(self._request.card) - 1 if too_large else 0.0
        trial.set_constraint("rules", 0.0 if too_large else 1.0)
        trial.set_constraint("memory", over)
        self._study.tell(trial, NO_STEP_MS)

    def _tell_known(self, trial: Trial, point: Point) -> None:
        from optuna.trial import TrialState

        known = self._known.get(point.key)  # None: another trial of the wave runs it
        if known is None or known.ms_per_token is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("rules", 0.0)
        trial.set_constraint("memory", 1.0 if known.ran_out else 0.0)
        self._study.tell(trial, known.ms_per_token)

    def _chosen(self, point: Point) -> dict[str, str] | None:
        """Its values in the grid; None where it is not of the grid, as the row may not be."""
        for candidate in (point.candidate, *point.also):
            chosen = {key: candidate.shown.get(key, "") for key in self._grid}
            if all(chosen[key] in values for key, values in self._grid.items()):
                return chosen
        return None


def _by_settings(points: Sequence[Point]) -> dict[frozenset[tuple[str, str]], Point]:
    return {
        frozenset(candidate.shown.items()): point
        for point in points
        for candidate in (point.candidate, *point.also)
    }


def _settings_of(trial: Trial | FrozenTrial) -> frozenset[tuple[str, str]]:
    return frozenset(grid.typed(trial.params).items())
