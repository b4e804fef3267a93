"""Batch scripts for Slurm; sbatch, srun and scontrol are replaced at their border."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.launching import slurm
from harness.planning.plan import Plan, plan

ROOT = Path(__file__).resolve().parent.parent


def job(tmp_path: Path, **changes) -> Plan:
    model = Model(name="tiny", num_layers=2, hidden_size=64, num_attention_heads=4)
    fields = {
        "id": "219",
        "slug": "tiny-tp4",
        "chapter": 200,
        "shows": "it's two nodes",
        "model": model,
    }
    sizes = {"tp": 4, "dp": 2, "mbs": 1, "gbs": 2, "seq": 64}
    e = Experiment(**{**fields, **sizes, "published_data": None, **changes})
    return plan(e, {"SLURM": "1", "DEVICE": "cuda", "OUTDIR": str(tmp_path / "out dir")}, "cuda")


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


SETTINGS = {"SLURM": "1", "PARTITION": "gpu", "ACCOUNT": "team", "TIME": "1-02:30:00", "STEPS": "5"}


def test_the_script_asks_for_what_the_experiment_needs(tmp_path):
    script = slurm.render_sbatch(job(tmp_path, nodes=2), SETTINGS)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    assert options == {
        "job-name": "219-tiny-tp4",
        "partition": "gpu",
        "account": "team",
        "time": "1-02:30:00",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "cpus-per-gpu": "4",
        "signal": "TERM@60",
        "output": f'"{tmp_path}/out dir/slurm-%j.txt"',
    }
    assert (
        "torchrun --nnodes 2 --node-rank $SLURM_NODEID" in script
        and "--rdzv-endpoint $RENDEZVOUS" in script
    )


def test_without_settings_slurm_decides(tmp_path):
    script = slurm.render_sbatch(job(tmp_path), {"SLURM": "1"})
    assert (
        "--partition" not in script
        and "--account" not in script
        and "#SBATCH --time=00:30:00" in script
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_script_pleases_shellcheck(tmp_path, nodes):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    script = slurm.render_sbatch(
        job(tmp_path, nodes=nodes), {**SETTINGS, "ARGS": "--lr 1e-4 --name 'a b'"}
    )
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_node_runs_a_launcher_with_the_users_settings(tmp_path, programs, nodes):
    """The script itself is run, with an srun that plays both nodes and a set-up that tells its arguments."""
    program(programs, "scontrol", 'printf "%s\\n" node-a node-b')
    program(
        programs,
        "srun",
        f'for SLURM_NODEID in $(seq 0 {nodes - 1}); do export SLURM_NODEID; ("$@"); done',
    )
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    program(repository / "scripts", "setup.sh", 'printf "<%s>" "$@"; echo')
    script = slurm.render_sbatch(job(tmp_path, nodes=nodes), {**SETTINGS, "ARGS": "--name 'a b'"})
    script = script.replace(f"cd {ROOT}", f"cd {repository}")
    environment = os.environ | {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "40123"}
    done = subprocess.run(
        ["bash"], input=script, env=environment, capture_output=True, text=True, check=True
    )
    first, *launchers = done.stdout.splitlines()
    assert first == "<light><heavy>"
    common = "<light><--><-m><harness><run><219><STEPS=5><ARGS=--name 'a b'><DEVICE=cuda>"
    common += f"<OUTDIR={tmp_path}/out dir>"
    meeting = "<RENDEZVOUS=node-a:20123>"
    several = [f"{common}<NODE_RANK={node}>{meeting}" for node in range(nodes)]
    assert launchers == (several if nodes > 1 else [common])


def test_a_job_is_submitted_where_sbatch_exists(tmp_path, programs, capsys):
    program(programs, "sbatch", f'cat > {tmp_path}/submitted; echo "77;cluster"')
    planned = job(tmp_path)
    assert slurm.submit_or_print(planned, SETTINGS) == 0
    assert (tmp_path / "submitted").read_text() == slurm.render_sbatch(planned, SETTINGS)
    printed = capsys.readouterr().out
    assert "submitted job 77: 219-tiny-tp4" in printed and "slurm-77.txt" in printed
    assert planned.outdir.is_dir(), "Slurm writes its output there"


def test_a_dry_run_prints_and_submits_nothing(tmp_path, programs, capsys):
    program(programs, "sbatch", f"touch {tmp_path}/submitted")
    planned = job(tmp_path)
    assert slurm.submit_or_print(planned, {**SETTINGS, "DRY_RUN": "1"}) == 0
    assert capsys.readouterr().out == slurm.render_sbatch(planned, {**SETTINGS, "DRY_RUN": "1"})
    assert not (tmp_path / "submitted").exists() and not planned.outdir.exists()


def test_without_sbatch_the_script_is_printed_with_where_to_submit_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.submit_or_print(job(tmp_path), {"SLURM": "1"}) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash\n#SBATCH") and "login node" in err


def test_what_slurm_refuses_is_told(tmp_path, programs):
    program(
        programs, "sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1'
    )
    with pytest.raises(UserError, match="invalid partition specified"):
        slurm.submit_or_print(job(tmp_path), SETTINGS)


@pytest.mark.parametrize(
    "wrong", [{"TIME": "soon"}, {"PARTITION": "gpu\n#SBATCH --x"}, {"ACCOUNT": "$(reboot)"}]
)
def test_malformed_settings_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        slurm.render_sbatch(job(tmp_path), {**SETTINGS, **wrong})


@pytest.mark.parametrize("name", ["a\ntouch touched\nb", 'a"b', "a'b", "a\\b", "a\x1b[31m"])
def test_a_folder_that_would_end_a_line_of_options_is_refused(tmp_path, name):
    with pytest.raises(
        UserError, match="sbatch takes no folder with quotes, backslashes or line breaks"
    ):
        slurm.render_sbatch(replace(job(tmp_path), outdir=tmp_path / name), SETTINGS)


def test_a_folder_means_itself_to_sbatch(tmp_path):
    script = slurm.render_sbatch(replace(job(tmp_path), outdir=Path("/tmp/100%j done")), SETTINGS)
    assert '#SBATCH --output="/tmp/100%%j done/slurm-%j.txt"' in script


@pytest.mark.parametrize(
    "value",
    ["$(touch touched)", "`touch touched`", "'; touch touched; '", "a\ntouch touched\n", "é # x"],
)
def test_settings_reach_the_nodes_as_typed_and_nothing_executes(tmp_path, programs, value):
    program(programs, "srun", 'printf "%s\\0" "$@"')
    script = slurm.render_sbatch(job(tmp_path), {**SETTINGS, "ARGS": value, "DATA": value})
    script = script.replace("scripts/setup.sh light heavy", ":")
    done = subprocess.run(
        ["bash", "-c", script], text=True, capture_output=True, check=True, cwd=tmp_path
    )
    assert f"ARGS={value}" in done.stdout.split("\0") and f"DATA={value}" in done.stdout.split("\0")
    assert not (ROOT / "touched").exists() and not (tmp_path / "touched").exists()
