"""What is shown: phases from upstream's log, lines for pipes, a display for terminals, the summary."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.launching import terminal
from harness.launching.terminal import PlainTerminal, Snapshot, phase_of, step_line, summary
from harness.run.schema import Losses, MemoryGib, Result, Spread

ROOT = Path(__file__).resolve().parent.parent


def at(step: int, steps: int = 20, **changes) -> Snapshot:
    fields = {
        "label": "101-x",
        "steps": steps,
        "phase": "building data",
        "elapsed_s": 7,
        "step": step,
    }
    numbers = {"loss": 10.98765, "step_ms": 186.84, "left_s": 62.0} if step else {}
    return Snapshot(**{**fields, **numbers, **changes})


def result(**changes) -> Result:
    fields = {
        "status": "ok",
        "exit_code": 0,
        "started": 0,
        "finished": 41.2,
        "steps": 20,
        "steps_done": 20,
        "window": (6, 20),
        "step_ms": Spread(
            median=186.8, q1=186.1, q3=187.9, mean=187.1, stdev=1.23, min=185.1, max=190.2, n=15
        ),
        "tflops": 54.04,
        "mfu": 0.0546,
        "peak_tflops": 989.5,
        "tokens_per_s": 5482.3,
        "memory_gib": MemoryGib(allocated=28.014, reserved=30.5, nvml=32.2),
        "loss": Losses(first=10.98765, last=9.12346),
        "data": "mock",
        "device": "cuda",
    }
    return Result(**{**fields, **changes})


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        (
            "using world size: 8, data-parallel size: 2, context-parallel size: 1, ",
            "reading arguments",
        ),
        ("> initializing torch distributed ...", "connecting ranks"),
        ("> compiling dataset index builder ...", "compiling helpers"),
        ("building GPT model ...", "building the model"),
        ("> building train, validation, and test datasets for GPT ...", "building data"),
        ("done with setup ...", "first step"),
        ("training ...", "first step"),
        ("[after training is done] datetime: 2026-11-21 08:47:11 ", "finishing"),
        ("  training_steps .................. 20", None),
        ("", None),
    ],
)
def test_phases_are_read_from_upstreams_log(line, phase):
    assert phase_of(line) == phase


def test_a_step_fits_into_80_columns_with_everything():
    line = step_line(at(12, 100, tflops=421.96, mfu=0.4264, memory_gib=76.31, left_s=92))
    assert (
        line == " 12/100  loss 10.9877  186.8 ms  422 TFLOP/s/GPU  MFU 42.6%  76.3 GiB  1:32 left"
    )
    assert len(line) == 80
    assert "left" not in step_line(at(20)), "the last step has nothing left"
    assert "TFLOP" not in step_line(at(1, tflops=0.0002)), "a miniature's rate says nothing"


def test_a_pipe_gets_phases_and_every_step_of_a_short_run():
    out = io.StringIO()
    with PlainTerminal(out) as shown:
        waits = [at(0), at(0), at(0, phase="first step")]
        for progress in [*waits, *(at(step) for step in range(1, 21) for _ in range(3))]:
            shown.show(progress)
        shown.finish("101-x")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["0:07  building data", "0:07  first step"]
    assert [line.split("/")[0].strip() for line in lines[2:]] == [
        str(step) for step in range(1, 21)
    ]


def test_a_pipe_gets_few_lines_of_a_long_run_but_always_the_first_and_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with PlainTerminal(out) as shown:
        for step in range(1, 998):
            now[0] += 0.01
            shown.show(at(step, 1000))
        shown.finish("101-x")
    steps = [int(line.split("/")[0]) for line in out.getvalue().splitlines()]
    assert steps[0] == 1 and steps[-1] == 997 and 8 <= len(steps) <= 12


def test_runs_side_by_side_are_told_apart():
    out = io.StringIO()
    with PlainTerminal(out) as shown:
        shown.show(at(0, label="101-x"))
        shown.show(at(1, label="104-y"))
        shown.show(at(1, label="101-x"))
    assert [line.split()[0] for line in out.getvalue().splitlines()][1:] == ["104", "101"]


def test_the_summary_has_the_numbers_and_over_which_steps():
    text = summary("101-x", Path("/elsewhere/101-x"), result(packed_with=("104-y",)))
    assert "101-x: ok, 20 of 20 steps, 0:41" in text
    assert "186.8 ± 0.9 ms, median ± half IQR of steps 6-20 (185.1 to 190.2)" in text
    assert "54.0 TFLOP/s/GPU, MFU 5.5% of 989.5, 5,482 tokens/s; of model FLOPs" in text
    assert "GiB of the fullest rank: 28.01 allocated, 30.50 reserved, 32.20 in all" in text
    assert "10.9877 -> 9.1235" in text
    assert "the node with 104" in text and "files   /elsewhere/101-x/" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_summary_of_a_failure_has_its_rank_and_advice():
    detail = "OutOfMemoryError: no\n(after step 0 of 20)"
    failed = result(status="oom", rank=3, detail=detail, advice="MBS=2", step_ms=None, window=None)
    lines = summary("121-x", Path.cwd() / "outdir" / "121-x", failed).splitlines()
    assert lines[0].startswith("121-x: oom on rank 3")
    assert lines[1:4] == ["  OutOfMemoryError: no", "  (after step 0 of 20)", "  -> MBS=2"]
    assert lines[-1] == "  files   outdir/121-x/"


def test_a_run_shorter_than_the_window_says_so():
    short = result(
        steps=3, steps_done=3, step_ms=None, window=None, tflops=None, mfu=None, miniature=True
    )
    text = summary("101-x", Path("/x"), short)
    assert "no median: the averaging window begins after step 3" in text and "miniature" in text


DRAW = """
from harness.launching.terminal import Snapshot, open_terminal
with open_terminal() as t:
    t.print("101 [starts] here")
    for step in range(4):
        t._drawn_at = 0
        t.show(Snapshot("101-gpt2xl-dp1-gbs1-bf16", 3, "building data", 5, step, *((10.5, 12.5) if step else ())))
    t.finish("101-gpt2xl-dp1-gbs1-bf16")
    t.print("over")
"""


def on_a_terminal(**environment: str) -> str:
    """What DRAW writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")
    } | environment
    environment = {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW], cwd=ROOT, stdout=follower, env=environment
    )
    os.close(follower)
    written = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    os.close(leader)
    assert process.wait() == 0
    return written.decode()


def test_a_terminal_gets_a_display_in_place():
    pytest.importorskip("rich")
    written = on_a_terminal()
    assert "\x1b[2K" in written, "lines are redrawn"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "3/3" in plain and "loss 10.5000" in plain and "building data" in plain
    assert "101 [starts] here" in plain and plain.rstrip().endswith("over")
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", plain))
    assert "\x1b[1m" in written, "bold, in colour"


def test_no_color_is_respected():
    pytest.importorskip("rich")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", on_a_terminal(NO_COLOR="1"))


def test_a_dumb_terminal_gets_lines():
    assert "\x1b" not in on_a_terminal(TERM="dumb")


def test_rich_is_imported_on_terminals_only():
    code = "import sys\nfrom harness.launching.terminal import open_terminal\nopen_terminal()\nprint('rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
