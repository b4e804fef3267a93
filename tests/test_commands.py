"""Every command that README, docs, help, comments and messages tell a reader to type is planned, on a CPU and at full size."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import spoken_commands

from harness import ROOT
from harness.experiment.command_line import SETTINGS
from harness.planning.request import FOR_GPUS

REFUSED = {
    "make 438 VPP=5": "try VPP in {1, 3, 9}",
    "make 612 CARD=a100-80gb": "has none (Ada, Hopper and later do)",
    "make 101 CROSS_ENTROPY_IMPL=te CROSS_ENTROPY_FUSION=1": "can be predicted, not run",
    "make 219 SLURM=1 CLUSTER=./mine.yaml": "there is no such file",
    "make cancel JOB=77": "job 77 is over",
    "make jobs-77_0": "exit status 1",  # as of a run that left no result
    "make jobs-77_3": "exit status 1",
    "make jobs JOB=77_0": "exit status 1",
    "make speed-620": "its step time cannot be predicted",
}
"""Commands that the documents show for what they refuse -> what is said."""


@dataclass(frozen=True)
class Planned:
    """What became of a command on a device."""

    line: str
    device: str
    refused: str | None
    said: str


class Copy:
    """A copy of the repository with data sets and without runs, where commands are planned by tests/plan_commands.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("harness", "experiments", "scripts", "benchmarks", "clusters"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (
            "Makefile",
            "pyproject.toml",
            "tests/plan_commands.py",
            *(f"data/{p.name}" for p in (ROOT / "data").iterdir() if p.is_file()),
        ):
            (path / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / file, path / file)

        jobs = {"job": "77", "first": "77", "tasks": ["101"] * 4, "time": 0.0}
        (path / "outdir").mkdir()
        (path / "outdir" / "slurm-77.json").write_text(json.dumps(jobs))

    def plan(self, commands: Iterable[tuple[str, ...]]) -> list[Planned]:
        """Plan each once a device."""
        (self.path / "commands.json").write_text(json.dumps([*dict.fromkeys(commands)]))
        done = subprocess.run(
            [sys.executable, "tests/plan_commands.py", "commands.json"],
            cwd=self.path,
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(self.path)},
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = map(json.loads, done.stdout.splitlines())
        return [
            Planned(
                " ".join(["make", *each["words"]]), each["device"], each["refused"], each["said"]
            )
            for each in found
        ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return Copy(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def spoken() -> dict[tuple[str, ...], str]:
    """Every command, and the first place where it stands."""
    found: dict[tuple[str, ...], str] = {}
    for command in (*spoken_commands.in_pages(), *spoken_commands.in_sources()):
        found.setdefault(command.words, command.where)
    return found


@pytest.fixture(scope="module")
def planned(copy: Copy, spoken: dict[tuple[str, ...], str]) -> list[Planned]:
    return copy.plan(spoken)


def wrong(planned: Iterable[Planned]) -> list[str]:
    """Commands that are refused, though they should not be, and the other way round; of what is not installed, nothing is known."""
    found = []
    for each in planned:
        expected = REFUSED.get(each.line)
        if each.refused and each.refused.startswith("not installed"):
            continue
        if re.search(r"runs on \d+ nodes .*; on each of them", each.refused or ""):
            continue  # rightly: it runs where each node is told its rank
        if (
            each.device == "cpu"
            and "K8S=" in each.line
            and "pods have GPUs" in (each.refused or "")
        ):
            continue  # it was planned with DEVICE=cpu
        if each.device == "cpu" and any(
            word.partition("=")[0] in FOR_GPUS for word in each.line.split()
        ):
            if "needs a GPU" not in (each.refused or "") and re.match(r"make \d", each.line):
                found.append(f"{each.line} runs on a CPU")
            continue
        if (expected is None and each.refused) or (
            expected and expected not in (each.refused or "")
        ):
            found.append(f"{each.line} on {each.device}: {each.refused}")
    return found


def test_every_command_that_is_written_down_can_run(
    planned: list[Planned], spoken: dict[tuple[str, ...], str]
) -> None:
    where = {" ".join(["make", *words]): place for words, place in spoken.items()}
    assert not [f"{where[line.partition(' on ')[0]]}: {line}" for line in wrong(planned)]


def test_every_command_that_is_printed_can_run(
    copy: Copy, planned: list[Planned], spoken: dict[tuple[str, ...], str]
) -> None:
    """Advice of what the commands themselves print: the fastest layout, what to set where memory does not suffice, what to type next."""
    printed = {
        command.words
        for each in planned
        for command in spoken_commands.in_text(each.said, each.line)
    }
    advised = printed - {*spoken}
    assert any(re.search(r"[A-Z]P=", " ".join(words)) for words in advised)
    assert not wrong(copy.plan(advised))


def test_commands_that_cannot_run_are_noticed(copy: Copy) -> None:
    """The planning above refuses what make would."""
    cannot = {
        ("122", "LOAD=label", "TP=2", "PP=2"): "try TP in {1, 5, 25}",
        ("101", "STEP=20"): "unknown setting STEP",
        ("tabel",): "did you mean table?",
        ("show-999",): "no experiment 999",
        ("101", "DATA=openwebtext"): "did you mean openwebtext-10k?",
        ("compare", "A=101", "B=999"): "no experiment 999",
        ("export-hf", "RUN=101"): "OUT missing",
        ("parity", "TP=2"): "make parity does not take TP=2",
        ("train-gpt3", "STEPS=3"): "did you mean train-gpt3-345m",
        ("12*",): None,
        ("125*",): "no target begins with 125",
        ("memory-101", "CARD=h1000"): "CARD=h1000",
        ("list", "CHAPTER=990"): "no chapter 990",
        ("table", "FORMAT=xml"): "FORMAT=xml",
    }
    found = {each.line: each.refused for each in copy.plan(cannot) if each.device == "cpu"}
    for words, said in cannot.items():
        refused = found[" ".join(["make", *words])]
        assert refused is None if said is None else refused and said in refused, (words, refused)


def test_commands_are_found_wherever_they_stand(spoken: dict[tuple[str, ...], str]) -> None:
    lines = {" ".join(words): where for words, where in spoken.items()}
    assert len(lines) > 250
    assert lines["111 DROPOUT=0 CROSS_ENTROPY_FUSION=1 FP8=tensorwise"] == "choosing.md", (
        "a key with a digit"
    )
    assert lines["802 WEIGHTS=801 DATA=toy-chat:0.5 toy-chat-2:0.5"] == "finetuning.md", (
        "a quoted value with a blank"
    )
    assert (
        lines["219 NODES=2 NODE_RANK=0 RENDEZVOUS=first-node:29500"]
        == "harness/planning/checked.py"
    ), "a message with expressions"
    assert lines["import-hf HF=folder NAME=mine DATA=mine TP=2 PP=2 EP=2"] == "targets.mk", (
        "optional words of the help"
    )
    assert lines["half-282h*"] == "02-tensor-parallel.md", "a tab"
    assert {s.key for s in SETTINGS} <= {
        word.partition("=")[0] for words in spoken for word in words[1:]
    }, "every setting's example"
    assert not [line for line in lines if "UNKNOWN" in line], "give EXPRESSIONS a value for it"


def test_other_commands_of_the_documents_name_what_is_there() -> None:
    pages = "\n".join(path.read_text() for path in spoken_commands.PAGES)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    pinned = {
        re.split(r"[\[=]", entry)[0]
        for group in groups.values()
        for entry in group
        if isinstance(entry, str)
    }
    files = set(
        re.findall(r"(?<![\w/.])((?:benchmarks|scripts|docker|tests)/[\w.-]+\.(?:py|sh))", pages)
    )
    assert len(files) > 5 and not [file for file in files if not (ROOT / file).is_file()]
    assert {
        stage
        for words in re.findall(r"scripts/setup\.sh ([a-z -]+)", pages)
        for stage in words.split(" --")[0].split()
    } <= {*groups}
    assert set(re.findall(r"\.venv/bin/(\w+)", pages)) - {"python"} <= pinned
