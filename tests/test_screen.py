"""What is printed fits the terminal."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from harness import ROOT, cli
from harness.system import screen


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a terminal of 60 columns."""
    monkeypatch.setattr(screen, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say("word " * 40)
    assert capsys.readouterr().out == "word " * 40 + "\n" and screen.width(piped=7) == 7


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("words", [["list"], ["speed", "408"], ["claims"]])
def test_nothing_is_wider_than_the_terminal(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    assert max(map(len, re.sub(r"\033\[\d*m", "", capsys.readouterr().out).splitlines())) <= 60


@pytest.mark.usefixtures("narrow")
def test_colour_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert screen.colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not screen.colour()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not screen.colour()


def test_help_says_the_same_in_a_narrow_terminal() -> None:
    def lines(width: int) -> list[str]:
        command = [
            "awk",
            "-v",
            f"width={width}",
            "-f",
            "scripts/help.awk",
            "experiments/targets.mk",
        ]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert max(map(len, lines(80))) <= 80
    assert " ".join(lines(80)).split() == " ".join(lines(0)).split()


def test_ctrl_c_while_it_is_imported_says_nothing() -> None:
    program = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'harness.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "runpy.run_module('harness', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
