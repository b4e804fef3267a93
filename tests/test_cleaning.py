"""make clean: what can be resumed stays, what goes is said first, and nothing goes unasked."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import write
from test_run_directory import RESULT, make_run

from harness import cli
from harness.run import cleaning
from harness.run.checkpoints import Saving
from harness.run.directory import RunDir
from harness.system import locks
from harness.system.files import write_json


def labels(outdir: Path) -> set[str]:
    return {path.name for path in outdir.iterdir()}


def killed(outdir: Path, label: str) -> RunDir:
    run = make_run(outdir, label)
    write_json(
        run.running, {"pid": os.getpid(), "host": os.uname().nodename, "started": time.time()}
    )
    return run


@pytest.fixture
def outdir(tmp_path, monkeypatch) -> Path:
    """Runs of every end; no installed packages stand in for .venv."""
    monkeypatch.setattr(cleaning, "ROOT", tmp_path / "repository")
    folder = tmp_path / "outdir"
    for label, status in (
        ("101-ok", "ok"),
        ("121-oom", "oom"),
        ("101-crash", "crash"),
        ("122-missed", "target-missed"),
    ):
        make_run(folder, label, {**RESULT, "status": status})
    make_run(folder, "101-torn").result.write_text("{")
    killed(folder, "101-killed").logs.write_bytes(b"x" * 3 * 2**20)
    killed(folder, "101-running")
    locks.take(folder / "101-running")
    (folder / "notes").mkdir()
    yield folder
    locks.release(folder / "101-running")


KEPT = {"101-ok", "121-oom", "122-missed", "101-running", "notes"}


def test_clean_keeps_results_and_what_still_runs(outdir, capsys):
    assert cleaning.clean(outdir, agreed=True) == 0
    assert labels(outdir) == KEPT
    assert capsys.readouterr().out.endswith("removed 101-crash, 101-killed, 101-torn\n")
    assert (
        cleaning.clean(outdir, everything=True, agreed=True) == 1
    )  # what still runs is still there, and .venv with it
    assert labels(outdir) == {"101-running", "notes"}
    assert cleaning.clean(outdir) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_what_can_be_resumed_stays_wherever_its_checkpoints_lie(outdir, tmp_path, capsys):
    write(killed(outdir, "101-here").checkpoints, 10)
    write(make_run(outdir, "101-crashed-later", {**RESULT, "status": "crash"}).checkpoints, 20)
    away = killed(outdir, "101-away")
    away.freeze_experiment(away.read_experiment(), "cpu", None, Saving(5, None, tmp_path / "kept"))
    write(tmp_path / "kept", 30)
    broken = write(killed(outdir, "101-broken").checkpoints, 10)
    (broken / "__0_0.distcp").unlink()
    adapters = killed(outdir, "801-adapters").path / "adapters"
    adapters.mkdir()
    (adapters / "adapters.json").write_text("{}")
    assert cleaning.clean(outdir, agreed=True) == 0
    assert labels(outdir) == KEPT | {"101-here", "101-crashed-later", "101-away", "801-adapters"}
    said = capsys.readouterr().out
    assert "kept: 101-here (killed): RESUME=101-here continues after step 10" in said
    assert "kept: 101-away (killed): RESUME=101-away continues after step 30" in said
    assert "removed 101-broken, 101-crash, 101-killed, 101-torn" in said
    assert cleaning.clean(outdir, everything=True) == 1
    assert "101-here           killed, step 10 can be resumed" in capsys.readouterr().out


def test_without_a_terminal_and_without_yes_it_says_what_would_go_and_removes_nothing(
    outdir, capsys, monkeypatch
):
    before = labels(outdir)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert (
        cli.main(["clean", f"OUTDIR={outdir}"]) == 1
        and cli.main(["clean", "ALL=1", f"OUTDIR={outdir}"]) == 1
    )
    said = capsys.readouterr().out
    assert labels(outdir) == before and "nothing was removed; YES=1" in said
    (line,) = [
        line for line in said.splitlines() if line.startswith("  101-killed") and "killed" in line
    ][:1]
    assert line.split()[1:] == ["killed", "3.0", "MiB"]
    assert cli.main(["clean", "YES=no", f"OUTDIR={outdir}"]) == 2 and labels(outdir) == before
    assert cli.main(["clean", "YES=1", f"OUTDIR={outdir}"]) == 0 and labels(outdir) == KEPT


@pytest.mark.parametrize("answer, status", [("y", 0), ("yes", 0), ("", 1), ("n", 1), ("Y es", 1)])
def test_on_a_terminal_it_asks(outdir, monkeypatch, answer, status):
    before = labels(outdir)
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert cleaning.clean(outdir) == status and labels(outdir) == (before if status else KEPT)


def test_the_packages_are_named_before_they_go(outdir, capsys):
    packages = cleaning.ROOT / ".venv" / "lib"
    packages.mkdir(parents=True)
    (packages / "torch.so").write_bytes(b"x" * 2**20)
    assert cleaning.clean(outdir, everything=True) == 1
    assert f"{cleaning.ROOT}/.venv" in (said := capsys.readouterr().out) and "1.0 MiB" in said


def test_a_run_that_begins_between_the_question_and_its_answer_stays(outdir, monkeypatch):
    def taken(folder, *_):
        raise locks.Taken(folder, None)

    monkeypatch.setattr(locks, "take", taken)
    assert cleaning.clean(outdir, agreed=True) == 0 and (outdir / "101-killed").exists()
