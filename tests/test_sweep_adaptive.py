"""Adaptive search of a grid: deterministic, resumable, and no run is spent on what cannot run."""

from types import SimpleNamespace

import pytest

from harness.machine import gpus
from harness.sweep import points
from harness.sweep.request import read_sweep

pytest.importorskip("optuna", reason="Optuna is not installed: scripts/setup.sh search")

from harness.sweep import adaptive

GRID = "MBS=1,2,3,5,6,10,15,30 CUDA_GRAPHS=0,1 RECOMPUTE=none,full GRADIENTS=,bf16 TP=1,2"


@pytest.fixture
def found(tmp_path, monkeypatch):
    there = (gpus.LocalGpu(0, "NVIDIA H200", "GPU-0", 143771),)
    monkeypatch.setattr(gpus, "list_gpus", lambda: there)

    def select(trials=12, seed=1, grid=GRID):
        settings = {"ID": "111", "GRID": grid, "METHOD": "optuna", "OUTDIR": str(tmp_path)}
        request = read_sweep({**settings, "TRIALS": str(trials), "SEED": str(seed), "GBS": "30"})
        return request, points.select(request)

    return select


class Machine:
    """Runs points: a step takes what ``ms`` says of its experiment."""

    def __init__(self, ms, stop_after=None):
        self.ms, self.ran, self.stop_after = ms, [], stop_after

    def __call__(self, wave):
        results = {}
        for point in wave:
            if self.stop_after is not None and len(self.ran) >= self.stop_after:
                return None
            self.ran.append(point.name)
            ms = self.ms(point.plan.experiment)
            status = "ok" if isinstance(ms, int | float) else ms
            number = ms if status == "ok" else None
            results[point.name] = SimpleNamespace(ms=number, status=status, row=None)
        return results


def unlike_predicted(e):
    """Small micro-batches are fast here, which the formula would not say."""
    return 100 + 20 * e.micro_batch_size + 50 * (e.recompute == "full") - 30 * bool(e.cuda_graphs)


def searched(request, selection, folder, machine, width=1):
    folder.mkdir(exist_ok=True)
    search = adaptive.AdaptiveSearch(request, selection, folder)
    return search, search.run(machine, width)


def test_half_of_the_runs_are_the_predictors_best_and_none_is_wasted(tmp_path, found):
    request, selection = found()
    machine = Machine(unlike_predicted)
    search, finished = searched(request, selection, tmp_path / "a", machine)
    assert finished and len(machine.ran) == len({*machine.ran}) == 12
    assert machine.ran[:6] == [point.name for point in selection.points[:6]]
    assert {*machine.ran} <= {point.name for point in selection.points}, "25 heads forbid TP=2"
    assert selection.refused and [point.name for point in search.tried] == machine.ran


def test_it_learns_from_what_it_measured(tmp_path, found):
    """After the predictor's best, which are slow here, it comes nearer to the fastest than they."""
    request, selection = found(trials=24)
    machine = Machine(unlike_predicted)
    searched(request, selection, tmp_path / "a", machine)
    ms = {point.name: unlike_predicted(point.plan.experiment) for point in selection.points}
    assert len(selection.points) > 40
    assert min(ms[name] for name in machine.ran) < min(ms[name] for name in machine.ran[:12])
    assert min(ms[name] for name in machine.ran) <= sorted(ms.values())[3]


def test_the_same_seed_chooses_the_same_points(tmp_path, found):
    ran = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        machine = Machine(unlike_predicted)
        searched(*found(seed=seed), tmp_path / name, machine)
        ran.append(machine.ran)
    assert ran[0] == ran[1] and ran[0] != ran[2]


def test_an_interrupted_search_resumes(tmp_path, found):
    request, selection = found()
    first = Machine(unlike_predicted, stop_after=8)
    search, finished = searched(request, selection, tmp_path / "a", first)
    assert not finished and len(search.tried) == 8
    second = Machine(unlike_predicted)
    search, finished = searched(request, selection, tmp_path / "a", second)
    assert finished and len(search.tried) == 12 and len(second.ran) == 4
    assert not {*first.ran} & {*second.ran}, "what was measured is not run again"
    third = Machine(unlike_predicted)
    search, _ = searched(*found(trials=14), tmp_path / "a", third)
    assert len(third.ran) == 2 and len(search.tried) == 14, "more trials go on"


def test_what_runs_out_of_memory_or_fails_is_not_proposed_again(tmp_path, found):
    request, selection = found(trials=16)
    how = {15: "oom", 30: "crash"}
    machine = Machine(lambda e: how.get(e.micro_batch_size, unlike_predicted(e)))
    _, finished = searched(request, selection, tmp_path / "a", machine)
    assert finished and len(machine.ran) == len({*machine.ran}) == 16
    again = Machine(unlike_predicted)
    searched(request, selection, tmp_path / "a", again)
    assert not again.ran


def test_points_that_run_together_are_chosen_together(tmp_path, found):
    request, selection = found()
    waves = []
    machine = Machine(unlike_predicted)
    searched(
        request, selection, tmp_path / "a", lambda wave: waves.append(len(wave)) or machine(wave), 5
    )
    assert waves == [5, 5, 2] and len({*machine.ran}) == 12


def test_a_grid_with_fewer_points_than_trials_is_run_whole(tmp_path, found):
    request, selection = found(trials=50, grid="MBS=1,2,3 TP=1,2")
    machine = Machine(unlike_predicted)
    _, finished = searched(request, selection, tmp_path / "a", machine)
    assert finished and {frozenset(name.split()) for name in machine.ran} == {
        frozenset({"TP=1", f"MBS={size}"}) for size in (1, 2, 3)
    }
