"""What PyTorch reserves and nvidia-smi shows: the allocator's rules, and runs on H200s."""

from pathlib import Path
from statistics import mean

import pytest

from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.hardware import find_card
from harness.predict.allocator import MIB, Allocator
from harness.predict.capacity import ERROR_SHARE, verdict
from harness.predict.memory import predict
from harness.run.directory import RunDir
from tests.missed_memory import marks

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()


def read_runs():
    """Experiment and measured memory of each run directory that is kept and ended well."""
    for path in sorted((ROOT / "experiments" / "runs").glob("*/*/result.json")):
        run = RunDir(path.parent)
        result = run.read_result()
        if result.status == "ok" and result.memory_gib.nvml:
            yield pytest.param(
                run.read_experiment(), result.memory_gib, id=run.label, marks=marks(run.label)
            )


RUNS = list(read_runs())


def of_kind(wanted):
    return [run for run in RUNS if wanted(run.values[0])]


def test_a_large_tensor_gets_a_segment_of_its_own_in_steps_of_two_mib() -> None:
    allocator = Allocator()
    allocator.allocate(39.0625 * MIB)
    assert allocator.reserved == allocator.allocated == 40 * MIB, "0.94 MiB are not split off"
    allocator.allocate(37.5 * MIB - 2 * MIB)
    assert allocator.reserved == 76 * MIB and allocator.allocated == 76 * MIB
    assert allocator.requested == (39.0625 + 35.5) * MIB


def test_medium_tensors_share_segments_and_small_ones_are_left_out() -> None:
    allocator = Allocator()
    allocator.allocate_all([6 * MIB] * 3)
    assert (allocator.reserved, allocator.allocated) == (20 * MIB, 18 * MIB)
    allocator.allocate(100)
    assert (allocator.reserved, allocator.allocated) == (20 * MIB, 18 * MIB)


def test_the_smallest_free_block_is_split_and_neighbours_merge() -> None:
    allocator = Allocator()
    small, large = allocator.allocate_all([30 * MIB, 60 * MIB])
    allocator.free(small, large)
    first, second = allocator.allocate_all([28 * MIB, 20 * MIB])
    assert allocator.reserved == 90 * MIB
    allocator.free(first, second)
    allocator.allocate_all([30 * MIB, 60 * MIB])
    assert allocator.reserved == allocator.most_reserved == 90 * MIB


def test_only_whole_free_segments_are_released() -> None:
    allocator = Allocator()
    kept, free = allocator.allocate_all([20 * MIB, 40 * MIB])
    allocator.free(kept, free)
    kept = allocator.allocate(12 * MIB)
    allocator.release_cache()
    assert (allocator.reserved, allocator.most_reserved) == (20 * MIB, 60 * MIB)
    allocator.free(kept)
    allocator.release_cache()
    assert allocator.reserved == 0


@pytest.mark.parametrize(
    ("experiment", "measured"), of_kind(lambda e: e.id in ("101", "111") and not e.cuda_graphs)
)
def test_blocks_of_gpt2_xl_are_rounded(experiment, measured) -> None:
    """Of 1,600 x 6,400 fp32 weights each loses 0.94 MiB: 0.3 to 0.45 GiB in all."""
    memory = predict(experiment)
    assert memory.total == pytest.approx(measured.allocated, rel=0.001)
    assert memory.total - memory.rounding < 0.996 * measured.allocated


@pytest.mark.parametrize(("experiment", "measured"), RUNS)
def test_allocated_memory_is_within_half_a_percent(experiment, measured) -> None:
    """Without blocks' rounding 101 has 1.5 % too little; without graphs' pool 111 23 % too much.

    706 had 2.1 % too much with gradients at the loss, 672 2.3 % too little with a split embedding.
    """
    exact = 0.006 if experiment.cuda_graphs else 0.005
    assert predict(experiment).total == pytest.approx(measured.allocated, rel=exact)


@pytest.mark.parametrize(("experiment", "measured"), of_kind(lambda e: e.cuda_graphs))
def test_graphs_hold_activations_outside_of_what_is_allocated(experiment, measured) -> None:
    """Upstream's own graphs leave what the first step cached to a stream that nothing uses again:
    without it 604 had 14 % too little, and 300 10 % too much."""
    memory = predict(experiment)
    assert memory.total == pytest.approx(measured.allocated, rel=0.006)
    assert memory.in_all == pytest.approx(measured.nvml, rel=0.035)


@pytest.mark.parametrize(("experiment", "measured"), RUNS)
def test_nvidia_smi_shows_what_is_predicted(experiment, measured) -> None:
    """A run of 101 has 0.4 GiB in reserve, one of 611 6.3: no share of allocated memory fits both."""
    exact = 0.055 if measured.nvml > 10 else 0.08
    assert predict(experiment).in_all == pytest.approx(measured.nvml, rel=exact)


def test_errors_of_nvidia_smi() -> None:
    errors = sorted(
        abs(predict(experiment).in_all / measured.nvml - 1)
        for experiment, measured in (run.values for run in RUNS if not run.marks)
    )
    assert mean(errors) < 0.02
    assert errors[len(errors) * 9 // 10] < ERROR_SHARE


@pytest.mark.parametrize(
    ("id_", "settings"),
    [
        ("625", {}),
        ("623", {"CROSS_ENTROPY_FUSION": "1", "OPTIMIZER_STATE": "bf16"}),
    ],
)
def test_what_ran_out_of_memory_is_not_said_to_fit(id_, settings) -> None:
    """Both ran out of memory on two H200s."""
    two_gpus = {"GPUS": "2", "EP": "2", "GBS": "4"}
    experiment = overrides.admitted(CATALOG.find(id_), two_gpus | settings)
    assert verdict(predict(experiment), find_card("h200-141gb")) != "fits"
