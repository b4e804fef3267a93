"""Saving and resuming with upstream's loop on the CPU: the same losses, bit by bit or, in another layout, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.run import checkpoints
from harness.run.directory import RunDir

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parent.parent

STEPS, EVERY, FROM = 6, 2, 4
"""Runs save every second step; others go on from the fourth."""
SAVE = f"--save-interval {EVERY} --async-save --use-persistent-ckpt-worker --async-strategy mcore"
LOAD = f"--ckpt-step {FROM} --override-opt_param-scheduler --exit-on-missing-checkpoint"
SP2 = {"tp": 2, "sequence_parallel": True}
ZERO = {"sharding": "optim"}
FSDP2 = {"dp": 2, "sharding": "torch_fsdp2", "precision": "bf16"}
EIGHT_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
LONGER = {"steps": 8}
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"

# (name, model, layout, arguments, name of the run it goes on with, variables)
JOBS = [
    ("dropout", "DENSE", SP2 | {"precision": "bf16"}, DROPOUT, None, {"HARNESS_KEEP": "2"}),
    ("dropout again", "DENSE", SP2 | {"precision": "bf16"}, DROPOUT, "dropout", {}),
    ("tp2", "DENSE", SP2, "", None, {}),
    ("tp2 to pp2", "DENSE", {"pp": 2}, "", "tp2", {}),
    ("fsdp2", "DENSE", FSDP2, "", None, EIGHT_QUEUES),
    ("fsdp2 again", "DENSE", FSDP2, "", "fsdp2", EIGHT_QUEUES),
]
MORE_JOBS = [
    ("dp4", "DENSE", {"dp": 4} | ZERO, RESHARDABLE, None, {}),
    ("dp4 to tp2 dp2", "DENSE", SP2 | {"dp": 2} | ZERO, RESHARDABLE, "dp4", {}),
    ("ep2", "MOE", {"dp": 2, "ep": 2} | ZERO | LONGER, RESHARDABLE, None, {}),
    ("ep2 to ep1", "MOE", {"dp": 2} | ZERO | LONGER, RESHARDABLE, "ep2", {}),
    (
        "ep2 to ep1 to ep2",
        "MOE",
        {"dp": 2, "ep": 2} | ZERO | LONGER,
        f"{RESHARDABLE} --ckpt-step 6",
        "ep2 to ep1",
        {},
    ),
]

DRIVER = """
import json, os, shutil, sys, time, warnings
from pathlib import Path
from harness import parity
from harness.upstreams.megatron_lm.environment import variables
from harness.entry import rank

folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
os.environ |= {v.name: v.value for v in variables(parity.tiny(parity.DENSE, {}), "cpu")} | {"OMP_NUM_THREADS": "1"}
warnings.simplefilter("ignore")
rank.prepare_for_forks()
for name, model, changes, arguments, variables_ in jobs:
    for key in ("HARNESS_KEEP", "HARNESS_UNTIL"):
        os.environ.pop(key, None)
    os.environ |= variables_
    run = parity.ParityRun(name, parity.tiny(getattr(parity, model), changes), folder / name, tuple(arguments))
    run.start()
    while not run.ended():
        time.sleep(0.02)
    if run.failure:
        print(f"{name}: {run.failure}", (run.folder / "logs.txt").read_text()[-3000:], sep="\\n")
"""


def train(folder: Path, jobs) -> Path:
    """Run ``jobs`` one after another in ``folder``, forked from one process that has imported everything."""
    words = []
    for name, model, changes, arguments, from_, variables in jobs:
        load = ["--load", str(folder / from_ / "saved"), *LOAD.split()] if from_ else []
        options = ["--save", str(folder / name / "saved"), *SAVE.split(), *load, *arguments.split()]
        words.append((name, model, {"steps": STEPS} | changes, options, variables))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), json.dumps(words)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert not done.returncode and not done.stdout, done.stdout + done.stderr
    return folder


def losses(folder: Path) -> dict[int, float]:
    return {step.step: step.loss for step in RunDir(folder).read_metrics()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), JOBS)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("more-runs"), MORE_JOBS)


def goes_on_alike(folder: Path, before: str, after: str) -> bool:
    expected, found = losses(folder / before), losses(folder / after)
    assert list(found) == list(expected)[-len(found) :] and 2 <= len(found) < len(expected)
    return found == pytest.approx({step: expected[step] for step in found}, rel=2e-6)


@pytest.mark.parametrize("name", ["dropout", "fsdp2"])
def test_the_same_layout_goes_on_bit_by_bit(runs, name):
    whole, again = losses(runs / name), losses(runs / f"{name} again")
    assert list(again) == [5, 6]
    assert again == {step: whole[step] for step in again}


def test_a_pipeline_goes_on_with_tensor_parallel_checkpoints(runs):
    assert goes_on_alike(runs, "tp2", "tp2 to pp2")


@pytest.mark.full
@pytest.mark.parametrize(
    "before, after",
    [("dp4", "dp4 to tp2 dp2"), ("ep2", "ep2 to ep1"), ("ep2", "ep2 to ep1 to ep2")],
)
def test_another_layout_goes_on_with_a_sharded_optimizer(more_runs, before, after):
    assert goes_on_alike(more_runs, before, after)


def test_saves_are_asynchronous(runs):
    saves = RunDir(runs / "tp2").read_saves()
    assert [save.step for save in saves] == [2, 4, 6] and all(save.asynchronous for save in saves)
    assert saves[0].whole_at_step > saves[0].step and all(
        save.blocked_ms < save.whole_after_s * 1e3 for save in saves
    )
    log = (runs / "tp2" / "logs.txt").read_text()
    assert (
        log.count("scheduled an async checkpoint save") == 3 and "Disabling --async-save" not in log
    )


def test_a_flipped_bit_is_noticed_in_weights_in_the_optimizer_and_beside_them(runs, tmp_path):
    from shutil import copytree

    path = copytree(runs / "tp2" / "saved" / "iter_0000004", tmp_path / "iter_0000004")
    found = checkpoints.verify(checkpoints.examine(path, 4))
    assert found.damage is None and found.has_checksums
    places = [
        (name, at)
        for name in ("__0_0.distcp", "__1_0.distcp", ".metadata")
        for at in range(50, (path / name).stat().st_size, (path / name).stat().st_size // 5)
    ]
    for name, at in places:
        with (path / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))
            file.flush()
            damage = checkpoints.verify(checkpoints.examine(path, 4)).damage
            assert damage and name in damage, (name, at)
            file.seek(at)
            file.write(bytes([byte]))
    assert checkpoints.verify(checkpoints.examine(path, 4)).damage is None


def test_only_the_newest_are_kept_and_nothing_is_left_of_others(runs):
    kept = runs / "dropout" / "saved"
    assert sorted(path.name for path in kept.iterdir()) == [
        "iter_0000004",
        "iter_0000006",
        checkpoints.TRACKER,
    ]
    assert [save.step for save in RunDir(runs / "dropout").read_saves()] == [2, 4, 6]


def test_a_checkpoint_tells_what_it_holds_without_torch(runs):
    found = checkpoints.in_folder(runs / "tp2" / "saved")[0]
    assert found.damage is None and found.contents.has_optimizer
    assert found.contents.shapes["embedding.word_embeddings.weight"] == (256, 64)
    hidden, layers, vocabulary, positions = 64, 4, 256, 32
    layer = 12 * hidden**2 + 13 * hidden
    assert found.contents.parameters == layers * layer + (vocabulary + positions + 2) * hidden
    code = "import sys, pathlib, harness.run.checkpoints as c; c.in_folder(pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code, str(runs / "tp2" / "saved")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.stdout == "False\n"


def test_bytes_that_a_killed_save_leaves_are_no_checkpoint(runs, tmp_path):
    """Upstream writes tensors, .metadata, metadata.json, tracker, in this order: whatever is missing is noticed."""
    from shutil import copytree

    whole = runs / "tp2" / "saved" / "iter_0000002"
    for number, missing in enumerate(
        [{"metadata.json"}, {"metadata.json", ".metadata"}, {"__1_0.distcp"}], 1
    ):
        left = copytree(whole, tmp_path / f"iter_{number:07d}")
        for name in missing:
            (left / name).unlink()
    copytree(whole, tmp_path / "iter_0000004")
    with (tmp_path / "iter_0000004" / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    damages = [found.damage for found in checkpoints.in_folder(tmp_path)]
    assert (
        damages[:2] == ["it was not written to its end"] * 2
        and damages[2] == "__1_0.distcp is missing"
    )
    assert damages[3].startswith("__0_0.distcp has 1,000 bytes of ")


@pytest.mark.full
def test_no_room_is_told_before_training(tmp_path):
    """A save that cannot fit is refused at the start; the disk's free bytes are what rank 0 sees."""
    patch = "import shutil; shutil.disk_usage = lambda path: type('U', (), {'free': 2_000_000})"
    driver = DRIVER.replace("import json,", patch + "\nimport json,", 1)
    words = [
        (
            "full",
            "DENSE",
            {"steps": STEPS},
            ["--save", str(tmp_path / "full" / "saved"), *SAVE.split()],
            {},
        )
    ]
    done = subprocess.run(
        [sys.executable, "-c", driver, str(tmp_path), json.dumps(words)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert (
        "UserError" in done.stdout
        and "3 checkpoints of 2.5 MiB need 7.5 MiB, 1.9 MiB are free" in done.stdout
    )
    assert not checkpoints.in_folder(tmp_path / "full" / "saved") and not losses(tmp_path / "full")
