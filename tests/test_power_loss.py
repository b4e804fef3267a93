"""What a power cut leaves of a run: every checkpoint that counted, and the metrics before it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import write
from crash_image import CrashImage

from harness.run import checkpoints, checksums
from harness.run.directory import RunDir
from harness.system.files import make_folder, write_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def synced(monkeypatch) -> list[Path]:
    """The files and folders that were synced, in order."""
    paths, fsync = [], os.fsync

    def note(handle: int) -> None:
        paths.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    return paths


def test_a_checkpoint_is_synced_with_its_folders_before_its_checksums_say_that_it_is_whole(
    tmp_path, synced
):
    folder = tmp_path / "run" / "checkpoints"
    path = write(folder, 10)
    checkpoints.settle(path)
    sealed = next(n for n, found in enumerate(synced) if checksums.NAME in found.name)
    for name in ("__0_0.distcp", ".metadata", "metadata.json"):
        assert synced.index(path / name) < sealed, name
    for later in (path, folder / checkpoints.TRACKER, folder, folder.parent):
        assert later in synced[sealed:], later
    assert checkpoints.examine(path, 10).has_checksums


def test_a_file_that_is_replaced_keeps_its_name(tmp_path, synced):
    write_text(tmp_path / "x.json", "{}")
    assert synced[-1] == tmp_path and len(synced) == 2
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}


@pytest.fixture
def disk(tmp_path) -> CrashImage:
    try:
        image = CrashImage(tmp_path)
    except OSError as error:
        pytest.skip(f"no loop device or mount here: {error}")
    yield image
    image.unmount()


@pytest.mark.full
@pytest.mark.cpu
@pytest.mark.parametrize("saves", [1, 3, 6])
def test_what_counted_before_a_power_cut_counts_after_it(disk, saves):
    outdir = disk.root / "outdir"
    words = [
        "DEVICE=cpu",
        "DATA=mock",
        "STEPS=3000",
        "SAVE_EVERY=10",
        "KEEP=1",
        "EVAL_EVERY=10",
        "EVAL_STEPS=1",
    ]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "harness", "run", "101", *words, f"OUTDIR={outdir}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while (
        len(
            counted := [
                save.step for found in outdir.glob("*/") for save in RunDir(found).read_saves()
            ]
        )
        < saves
    ):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    disk.stop()
    everyone = [
        *psutil.Process(launcher.pid).children(recursive=True),
        psutil.Process(launcher.pid),
    ]
    for process in everyone:
        process.kill()
    launcher.wait()
    psutil.wait_procs(everyone, timeout=30)
    disk.restart()

    (run,) = map(RunDir, outdir.glob("*/"))
    assert [save.step for save in run.read_saves()][: len(counted) - 1] == counted[
        :-1
    ]  # the last line is synced behind it
    newest = checkpoints.newest_whole(run.checkpoints)
    assert newest and newest.step >= counted[-1] and newest.has_checksums
    assert [metrics.step for metrics in run.read_metrics()][: newest.step] == list(
        range(1, newest.step + 1)
    )
    held_out = [
        validation.step for validation in run.read_validation() if validation.step <= newest.step
    ]
    assert held_out == list(range(10, newest.step + 1, 10))
    assert run.read_experiment().id == "101" and run.read_running() and run.command.stat().st_size
