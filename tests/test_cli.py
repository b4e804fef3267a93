"""Mistakes on the command line: one clear message, the right exit status, no traceback; light commands stay light."""

import io
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from harness import ROOT
from harness.cli import main


def harness(*words: str) -> str:
    """Standard output of a command that must succeed, in this process."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(list(words)) == 0
    return out.getvalue()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "407"], "no experiment 407; nearest ids: 401, 402, 404, 408, 416"),
        (["run", "101", f"DATA={300 * 'x'}"], "file name too long"),
        (["report", "REPORT=docs"], "REPORT=docs is a folder; name a file in it"),
        (["run", "101", "DRY_RUN=yes"], "DRY_RUN=yes: expected 0 or 1"),
        (["docs", "CHECK=2"], "CHECK=2: expected 0 or 1"),
        (
            ["chapter", "100", "DRY_RUN=1"],
            "DRY_RUN=1 is for one experiment: make 101 DRY_RUN=1\nmake list CHAPTER=100",
        ),
        (["chapter", "100", "SLURM=1", "CHAIN=2"], "CHAIN= is for one experiment"),
        (["run", "tabel"], "no target tabel; did you mean table?"),
        (["run", "101-gpt2xl"], "101 is 101-gpt2xl-dp1-gbs1-bf16"),
        (["run"], "which experiment?"),
        (
            ["run", "231", "TP=3"],
            "num_attention_heads (16) must be divisible by TP (3); try TP in {1, 2, 4, 8, 16}",
        ),
        (["run", "101", "DEVICE=tpu"], "DEVICE=tpu: expected cpu or cuda"),
        (["run", "101", "DATA=nowhere"], "DATA=nowhere"),
        (
            ["run", "219", "DEVICE=cpu", "NODES=2"],
            "make 219 NODES=2 NODE_RANK=0 RENDEZVOUS=first-node:29500",
        ),
        (
            ["run", "219", "DEVICE=cpu", "NODES=2", "RENDEZVOUS=here"],
            "RENDEZVOUS=here: expected host:port",
        ),
        (["run", "101", "GPUS_IDS=zero", "DEVICE=cpu"], "GPUS_IDS=zero needs a GPU"),
        (["run", "219", "SLURM=1", "CLUSTER=lumi"], "CLUSTER=lumi; did you mean lumi-g?"),
        (["run", "219", "SLURM=1", "CLUSTER=./mine.yaml"], "CLUSTER=./mine.yaml: there is no such"),
        (["run", "219", "SLURM=1", "IMAGE=x"], "IMAGE=x: how are containers started there?"),
        (["run", "219", "SLURM=1", "CLUSTER=dgx-h100"], "has no image: name one, IMAGE=file"),
        (["run", "219", "NUMA_BINDING=x"], "NUMA_BINDING=x; did you mean exclusive"),
        (["jobs", "JOB=last"], "JOB=last: expected the number of a job"),
        (["cancel"], "JOB missing"),
        (["chapter", "150"], "no chapter 150"),
        (["list", "MODEL=bert"], "MODEL=bert; valid: deepseek-v3"),
        (["compare", "A=101"], "B missing: make compare A=101 B=111"),
        (["record"], "RUN missing"),
        (["record", "RUN=nothing"], "no run nothing"),
        (["stop", "RUN=nothing"], "no run"),
        (["table", "FORMAT=xml"], "xml"),
        (["rum", "101"], "unknown command rum; did you mean run"),
    ],
)
def test_a_mistake_is_one_clear_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told
    assert len(told.splitlines()) <= 4


def test_a_file_that_is_no_report_is_replaced_only_when_asked(tmp_path, capsys) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("<title>mine</title>")
    assert main(["report", f"REPORT={notes}", f"OUTDIR={tmp_path}"]) == 2
    assert (
        f"REPORT={notes} exists and was not written by make report\nFORCE=1 replaces it"
        in capsys.readouterr().err
    )
    assert notes.read_text() == "<title>mine</title>"
    for force in (["FORCE=1"], []):
        assert main(["report", f"REPORT={notes}", f"OUTDIR={tmp_path}", *force]) == 0
    assert "measured and published" in notes.read_text()


def test_several_broken_rules_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "502", "EP=3", "TP=3"]) == 2
    assert capsys.readouterr().err.count("502: ") >= 2


def test_the_process_exits_with_the_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run", "407"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no experiment 407")


@pytest.mark.parametrize(
    "words", [["list"], ["show", "408"], ["show", "512", "DEVICE=cuda"], ["table"]]
)
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "harness", *words]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if "|" in line
    }
    assert not imported & {"torch", "matplotlib", "megatron", "transformers", "datasets"}


def test_list_filters() -> None:
    listed = harness("list", "CHAPTER=400", "GPUS=8")
    assert "408-gpt2-8.3B-pp8-m8" in listed and "101-" not in listed
    small = harness("list", "GPUS=1")
    assert "101-" in small and "104-" not in small


def test_show_prints_any_device_without_having_it() -> None:
    full = harness("show", "408", "DEVICE=cuda")
    assert "--num-layers 72" in full and "HARNESS_DEVICE=cuda" in full
    assert "--num-layers 8 " in harness("show", "408", "DEVICE=cpu")


def test_dry_run_runs_nothing() -> None:
    assert harness("run", "101", "DEVICE=cpu", "DRY_RUN=1") == harness("show", "101", "DEVICE=cpu")


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m harness list | head -n 1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and not done.stderr


def test_conversations_that_are_made_here_are_prepared_before_a_run_and_said_to_lack_in_a_script(
    monkeypatch, capsys
):
    pytest.importorskip("numpy", reason="the set-up stage `heavy` is not installed")
    from harness import cli
    from harness.data import data_sets
    from harness.data.chat import prepare
    from harness.errors import UserError

    brought = []
    monkeypatch.setattr(data_sets, "prepared_names", lambda: ())
    monkeypatch.setattr("harness.machine.packages.install", lambda *stages: None)
    monkeypatch.setattr(prepare, "prepare_known", lambda known: brought.append(known.name))
    monkeypatch.setattr(data_sets, "default_for", lambda e: "mock")
    for words in (["show", "801", "DEVICE=cpu"], ["run", "801", "DEVICE=cpu", "DRY_RUN=1"]):
        assert cli.main(words) == 0
        said = capsys.readouterr()
        assert (
            "--mock-data" in said.out
            and "# With mock data, because toy-chat is not prepared; make 801 prepares it"
            in said.err
        )
    assert (
        cli.main(["show", "101", "DEVICE=cpu"]) == 0
        and "With mock data" not in capsys.readouterr().err
    )
    assert not brought

    def stop(*args):
        raise UserError("planned")

    monkeypatch.setattr("harness.planning.plan.plan", stop)
    for words in (
        ["run", "801"],
        ["run", "101", "DATA=toy-chat-2"],
        ["run", "801", "DATA=mock"],
        ["run", "811"],
        ["chapter", "800"],
    ):
        assert cli.main([*words, "DEVICE=cpu"]) in (1, 2)
    assert brought == ["toy-chat", "toy-chat-2", "toy-chat", "toy-chat-2"]
