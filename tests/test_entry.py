"""The entry script as far as it goes without torch: which upstream, how a rank ends, what it reports, a step's time."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from harness.entry import build_helpers
from harness.entry.metrics import StepClock
from harness.entry.report import RankReport
from harness.errors import UserError
from harness.machine import upstream
from harness.run.directory import RunDir

ROOT = Path(__file__).resolve().parent.parent


def megatron(folder: Path, *parts: str) -> Path:
    """A source tree with these parts."""
    for part in parts:
        (folder / part).mkdir(parents=True) if "." not in part else (folder / part).touch()
    return folder


WHOLE = ("megatron/core", "megatron/training", "pretrain_gpt.py")


def test_upstream_is_the_tree_that_megatron_lm_names(tmp_path, monkeypatch):
    tree = megatron(tmp_path, *WHOLE)
    monkeypatch.setenv("MEGATRON_LM", str(tree))
    assert upstream.locate() == tree.resolve()


@pytest.mark.parametrize("there", [(), ("megatron/core",), ("megatron/core", "pretrain_gpt.py")])
def test_megatron_lm_must_be_whole(tmp_path, monkeypatch, there):
    monkeypatch.setenv("MEGATRON_LM", str(megatron(tmp_path, *there)))
    with pytest.raises(UserError, match=r"MEGATRON_LM .*training.*\n.*git submodule update --init"):
        upstream.locate()


@pytest.fixture
def submodule(tmp_path, monkeypatch) -> Path:
    """Where a repository of its own has the submodule."""
    monkeypatch.delenv("MEGATRON_LM", raising=False)
    monkeypatch.setattr(upstream, "ROOT", tmp_path)
    return tmp_path / "megatron-lm"


@pytest.mark.parametrize("content", [None, (), (".git",)])
def test_an_empty_submodule_means_the_wheel(submodule, content):
    if content is not None:
        submodule.mkdir()
        for name in content:
            (submodule / name).touch()
    assert upstream.locate() is None


def test_a_whole_submodule_is_used(submodule):
    tree = megatron(submodule, *WHOLE)
    assert upstream.locate() == tree.resolve()


def test_a_half_submodule_is_refused(submodule):
    megatron(submodule, "megatron/core")
    with pytest.raises(UserError, match=r"pretrain_gpt.py.*\n.*git submodule update --init"):
        upstream.locate()


ENDING = """
import sys
from pathlib import Path
from harness.entry.failures import ended_at_once
from harness.entry.report import RankReport
from harness.errors import UserError
from harness.run.directory import RunDir
report = RankReport(RunDir(Path(sys.argv[1])))
report.start()
report.step = 7
with ended_at_once(report):
    exec(sys.argv[2])
report.finished()
"""


def ended(folder: Path, work: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "3", "HARNESS_DEVICE": "cpu"}
    command = [sys.executable, "-c", ENDING, str(folder), work]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("work", "status", "kind"),
    [
        ("raise UserError('no such thing')", 2, "UserError"),
        ("raise ValueError('broken')", 1, "ValueError"),
        ("sys.exit(4)", 4, "SystemExit"),
        ("sys.exit('why')", 1, "SystemExit"),
    ],
)
def test_a_failing_rank_ends_at_once_and_on_record(tmp_path, work, status, kind):
    # a thread that would never end, as a collective without its other ranks would
    done = ended(
        tmp_path,
        f"import threading; threading.Thread(target=threading.Event().wait).start(); {work}",
    )
    assert done.returncode == status
    (error,) = RunDir(tmp_path).read_rank_errors()
    assert (error.rank, error.type, error.step) == (3, kind, 7)
    assert ("Traceback" in done.stderr) == (kind == "ValueError")
    assert kind != "UserError" or done.stderr == "error: no such thing\n"


@pytest.mark.parametrize("work", ["pass", "sys.exit(0)", "sys.exit()"])
def test_a_rank_that_is_done_leaves_no_error(tmp_path, work):
    done = ended(tmp_path, work)
    assert (done.returncode, done.stderr) == (0, "")
    assert [rank.step for rank in RunDir(tmp_path).read_ranks()] == [7]
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["3.json"]


def test_stacks_on_request(tmp_path):
    waits = "import time\ndef waits_for_the_others(): time.sleep(60)\nwaits_for_the_others()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "3", "HARNESS_DEVICE": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING, str(tmp_path), waits], env=environment
    )
    try:
        while not (ranks := RunDir(tmp_path).read_ranks()):
            time.sleep(0.02)
        assert ranks[0].pid == process.pid
        stacks = tmp_path / "ranks" / "3.stacks.txt"
        while "waits_for_the_others" not in stacks.read_text():
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_reports_are_rare_after_the_first_steps(tmp_path, monkeypatch):
    report = RankReport(RunDir(tmp_path))
    written = []
    monkeypatch.setattr(
        "harness.entry.report.write_json", lambda path, value: written.append(value["step"])
    )
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for step in range(1, 51):
        now = step * 0.9
        report.after_step(step)
    assert written[:2] == [1, 2]
    assert {b - a for a, b in pairwise(written[1:])} == {12}


class Timer:
    """Upstream's interval timer (megatron/core/timers.py): its answer grows until it is reset."""

    def __init__(self):
        self.seconds = 0.0

    def elapsed(self, reset=True, barrier=False):
        answer, self.seconds = self.seconds, 0.0 if reset else self.seconds
        return answer


def test_every_step_gets_its_own_time():
    timer, clock, heard = Timer(), StepClock(), []
    for step, seconds in enumerate([9.0, 2.0, 3.0, 4.0], start=1):
        clock.listen(timer)
        timer.seconds += seconds
        timer.elapsed(reset=step != 1)  # upstream does not reset after the first step
        heard.append(clock.answer_s)
    assert heard == [9.0, 2.0, 3.0, 4.0]


def test_steps_between_two_log_lines_share_their_mean():
    timer, clock, heard = Timer(), StepClock(), []
    for step in range(1, 7):
        clock.listen(timer)
        timer.seconds += step
        if step == 1 or step % 3 == 0:
            timer.elapsed(reset=step != 1)
        heard.append(clock.answer_s)
    assert heard == [1.0, None, 2.5, None, None, 5.0]


COMPILER = """#!/bin/sh
echo run >> "$(dirname "$0")/runs"
sleep 0.3
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that counts its runs, and an empty cache."""
    pytest.importorskip("pybind11", reason="the heavy stage of the set-up brings it")
    script = tmp_path / "c++"
    script.write_text(COMPILER)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return script


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "helpers.cpp"
    path.write_text("// helpers")
    return path


def test_the_helpers_are_compiled_once_a_node(compiler, source):
    ask = f"from pathlib import Path; from harness.entry.build_helpers import compiled; print(compiled(Path({str(source)!r})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    (folder,) = {rank.communicate()[0].strip() for rank in ranks}
    assert compiler.with_name("runs").read_text() == "run\n"
    assert [path.name for path in Path(folder).glob("*.so")] == [build_helpers.library_name()]


def test_other_source_is_compiled_anew(compiler, source):
    first = build_helpers.compiled(source)
    source.write_text("// mended")
    assert build_helpers.compiled(source) != first
    assert build_helpers.compiled(source) != first
    assert compiler.with_name("runs").read_text() == "run\nrun\n"


def test_a_failed_compilation_leaves_nothing_to_import(compiler, source):
    compiler.write_text("#!/bin/sh\necho 'helpers.cpp:1: error: no such thing' >&2\nexit 1\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"could not compile .*helpers.cpp(.|\n)*no such thing"):
            build_helpers.compiled(source)
    assert not list(source.parent.rglob("*.so"))


def test_without_a_compiler_the_message_says_how_to_get_one(compiler, source, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no C\+\+ compiler\n.*install g\+\+"):
        build_helpers.compiled(source)


def test_a_cache_that_cannot_be_written_is_named(compiler, source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    with pytest.raises(UserError, match=r"cannot write .*\n.*XDG_CACHE_HOME"):
        build_helpers.compiled(source)
