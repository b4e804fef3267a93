"""A reader that goes away, as head does, ends no work and changes no exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A command that prints more than any pipe holds, starts a program that prints, too, and then does its work.
COMMAND = """
import subprocess, sys
from pathlib import Path
from harness import cli
from harness.commands import Command

def work(settings):
    for _ in range(20000):
        print("a line", file=sys.{stream})
    done = subprocess.run(["bash", "-c", "echo a line of a program; echo one more"]).returncode
    Path(settings["MODEL"]).write_text(f"done, {{done}}")
    return 3

Command.function = lambda command: work
sys.exit(cli.main(["list", "MODEL=" + sys.argv[1]]))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_whose_reader_went_away_does_its_work_and_tells_its_status(tmp_path, stream):
    command = [sys.executable, "-c", COMMAND.format(stream=stream), str(tmp_path / "work")]
    where = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, **where)
    with getattr(process, stream) as pipe:
        pipe.readline()
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "work").read_text() == "done, 0"


def test_a_mistake_is_one_though_nobody_reads_of_it(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "harness", "table", "CHAPTER=999", f"OUTDIR={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 2


@pytest.mark.parametrize("target", ["", "help", "list", "show-101"])
def test_what_is_only_read_ends_quietly_in_head(target):
    environment = os.environ | {"DEVICE": "cpu"}
    command = f"make {target} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (
        done.stdout.splitlines()[-1] == "0"
        and "roken pipe" not in done.stderr
        and "Error" not in done.stderr
    )
