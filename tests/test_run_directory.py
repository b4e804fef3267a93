"""Run directories: created once, written atomically, read whatever state a run left them in."""

import errno
import json
import os
import shutil
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.run import cleaning, directory, schema, writing
from harness.run.directory import RunDir
from harness.run.schema import Result
from harness.system import locks
from harness.system.files import told_if_unwritable, write_json

RESULT = {
    "status": "ok",
    "exit_code": 0,
    "started": 1.0,
    "finished": 2.0,
    "steps": 20,
    "steps_done": 20,
    "data": "mock",
    "device": "cpu",
}


def experiment() -> Experiment:
    model = Model(name="tiny", num_layers=2, hidden_size=64, num_attention_heads=4)
    return Experiment(
        id="101",
        slug="tiny-dp1",
        chapter=100,
        shows="one GPU",
        model=model,
        mbs=1,
        gbs=1,
        seq=64,
        steps=20,
    )


def make_run(outdir: Path, label: str = "101-tiny-dp1", result: dict | None = None) -> RunDir:
    run_dir = writing.create(outdir, label)
    run_dir.freeze_experiment(experiment(), "cpu", "abc")
    if result:
        write_json(run_dir.result, result)
    return run_dir


def test_a_label_is_never_used_twice(tmp_path):
    assert [writing.create(tmp_path, "101").label for _ in range(3)] == ["101", "101.2", "101.3"]


def test_launchers_that_start_at_once_get_directories_of_their_own(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: writing.create(tmp_path, "101").path, range(64)))
    assert len(set(made)) == 64


@pytest.mark.parametrize("label", ["", "../x", "a/b", "a b", ".hidden", "-x", "x" * 201, "a\n"])
def test_a_label_that_is_no_file_name_is_refused(tmp_path, label):
    with pytest.raises(UserError, match="run label"):
        writing.create(tmp_path, label)


def test_an_outdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for outdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write to"):
            writing.create(outdir, "101")


@pytest.mark.parametrize(
    ("code", "way_out"),
    [(errno.EROFS, "writable"), (errno.EACCES, "writable"), (errno.ENOSPC, "make clean")],
)
def test_an_outdir_that_cannot_be_written_is_refused_with_the_way_out(
    tmp_path, monkeypatch, code, way_out
):
    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=way_out):
        writing.create(tmp_path / "out", "101")


def test_a_nearly_full_disk_is_refused_with_the_value(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: usage(2**40, 2**40 - 150 * 2**20, 150 * 2**20)
    )
    with pytest.raises(UserError, match="150 MiB free"):
        writing.create(tmp_path, "101")


def test_json_is_replaced_whole_and_has_no_nan(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"loss": float("nan"), "all": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"loss": None, "all": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert json.loads(path.read_text())["all"] == [1.5, None], "a failed write keeps what was there"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"No space left on device\n.*make clean"),
        told_if_unwritable(tmp_path),
    ):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_the_experiment_comes_back_as_it_was_frozen(tmp_path):
    run_dir = make_run(tmp_path)
    assert run_dir.read_experiment() == experiment()
    assert run_dir.read_device() == "cpu"


def test_metrics_survive_a_torn_last_line(tmp_path):
    run_dir = writing.create(tmp_path, "101")
    whole = "".join(
        f'{{"step": {step}, "loss": {loss}, "step_ms": 12.5, "time": 1.0}}\n'
        for step, loss in [(1, 10.5), (2, "NaN")]
    )
    for torn in ("", "{", '{"step": 3, "lo', '{"step": 3}', "3"):
        run_dir.metrics.write_text(whole + torn)
        steps = run_dir.read_metrics()
        assert [s.step for s in steps] == [1, 2]
        assert steps[0].loss == 10.5
    assert RunDir(tmp_path / "absent").read_metrics() == ()


def test_rank_files_are_told_apart(tmp_path):
    run_dir = writing.create(tmp_path, "101")
    for rank in (10, 2):
        write_json(
            run_dir.ranks / f"{rank}.json",
            {"rank": rank, "local_rank": rank, "pid": 1, "host": "h"},
        )
    write_json(
        run_dir.ranks / "2.error.json",
        {"rank": 2, "type": "ValueError", "message": "no", "time": 1.0},
    )
    (run_dir.ranks / "3.json").write_text("{")
    (run_dir.ranks / "2.stacks.txt").write_text("Thread")
    assert [r.rank for r in run_dir.read_ranks()] == [2, 10]
    assert [(e.rank, e.type) for e in run_dir.read_rank_errors()] == [(2, "ValueError")]
    assert list(run_dir.stacks()) == [2]


def test_state_follows_the_lock_and_no_clock(tmp_path):
    run_dir = make_run(tmp_path)
    here = {"pid": os.getpid(), "host": os.uname().nodename, "started": time.time()}
    write_json(run_dir.running, here)
    assert run_dir.state() == "killed", "nobody has its lock"

    locks.take(run_dir.path)
    for started in (1.0, time.time() + 7200):  # the clock was set meanwhile
        write_json(run_dir.running, here | {"started": started})
        os.utime(run_dir.path / locks.FILE, (1, 1))
        assert run_dir.state() == "running"
        cleaning.clean(tmp_path, agreed=True, everything=True)
        assert run_dir.running.exists()

    write_json(run_dir.result, RESULT)
    assert run_dir.state() == "running", "it is being resumed"
    locks.release(run_dir.path)
    assert run_dir.state() == "ok"


def test_corrupt_runs_are_left_out_with_a_warning_each(tmp_path):
    good = make_run(tmp_path, "101-good", RESULT)
    make_run(tmp_path, "102-torn").result.write_text('{"status": "ok"')
    make_run(tmp_path, "103-strange", {**RESULT, "status": "splendid"})
    make_run(tmp_path, "104-empty").experiment_json.write_text("")
    make_run(tmp_path, "106-list").experiment_json.write_text("[]")
    make_run(tmp_path, "107-nowhere").freeze_experiment(experiment(), "tpu", None)
    make_run(tmp_path, "105-older", RESULT).experiment_json.write_text(
        '{"id": "101", "device": "cpu"}'
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / ".gitkeep").touch()

    found, warnings = directory.runs(tmp_path)

    assert [(run.dir, run.state, run.experiment.id) for run in found] == [(good, "ok", "101")]
    assert found[0].result == Result(**RESULT)
    assert [Path(w.split(":")[0]).name for w in warnings] == [
        "102-torn",
        "103-strange",
        "104-empty",
        "105-older",
        "106-list",
        "107-nowhere",
    ]
    assert "splendid" in warnings[1] or "status" in warnings[1]


def test_an_absent_outdir_holds_no_runs(tmp_path):
    assert directory.runs(tmp_path / "absent") == ((), ())


def test_two_evaluations_of_one_step_are_one(tmp_path):
    """Upstream evaluates again at the end, on other batches; the first is what decides whether a loss is reached."""
    lines = [
        (6, "validation", 3.0),
        (12, "validation", 2.5),
        (12, "validation", 2.75),
        (12, "test", 2.25),
    ]
    found = [
        schema.Validation(step=step, split=split, loss=loss, time=0) for step, split, loss in lines
    ]
    run = directory.RunDir(tmp_path)
    run.validation.write_text("".join(f"{line.model_dump_json()}\n" for line in found))
    assert run.read_validation() == (found[0], found[1], found[3])


@pytest.mark.parametrize("field", ["step_ms", "tflops", "time"])
def test_a_step_that_took_for_ever_is_no_line_of_metrics(field):
    """Statistics of an infinite number end with a traceback; a loss may be infinite, and is kept."""
    line = {"step": 1, "step_ms": 100.0, "tflops": 2.0, "time": 1.0}
    assert schema.parse_metrics(json.dumps(line)) is not None
    assert (
        schema.parse_metrics(
            json.dumps(line | {field: 1}).replace(f'"{field}": 1', f'"{field}": 1e999')
        )
        is None
    )
