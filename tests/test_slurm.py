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
from harness.launching import jobs, scheduler, slurm, submission
from harness.planning.plan import Plan, plan
from harness.planning.script import Extras
from harness.run import writing
from harness.run.checkpoints import Saving
from harness.system.files import write_json

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


def options(script: str) -> dict[str, str]:
    """What the script asks sbatch for."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


SETTINGS = {"SLURM": "1", "PARTITION": "gpu", "ACCOUNT": "team", "TIME": "1-02:30:00", "STEPS": "5"}


def test_the_script_asks_for_what_the_experiment_needs(tmp_path):
    script = slurm.render_sbatch(job(tmp_path, nodes=2), SETTINGS)
    assert options(script) == {
        "job-name": "219-tiny-tp4",
        "partition": "gpu",
        "account": "team",
        "time": "1-02:30:00",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "cpus-per-task": "16",
        "signal": "B:USR1@60",
        "requeue": "",
        "open-mode": "append",
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
        f'shift 2; for SLURM_NODEID in $(seq 0 {nodes - 1}); do export SLURM_NODEID; ("$@"); done',
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
    assert submission.submit_or_print(planned, SETTINGS) == 0
    assert (tmp_path / "submitted").read_text() == slurm.render_sbatch(planned, SETTINGS)
    printed = capsys.readouterr().out
    assert "submitted job 77: 219-tiny-tp4" in printed and "slurm-77.txt" in printed
    assert planned.outdir.is_dir(), "Slurm writes its output there"


def test_a_dry_run_prints_and_submits_nothing(tmp_path, programs, capsys):
    program(programs, "sbatch", f"touch {tmp_path}/submitted")
    planned = job(tmp_path)
    assert submission.submit_or_print(planned, {**SETTINGS, "DRY_RUN": "1"}) == 0
    assert capsys.readouterr().out == slurm.render_sbatch(planned, {**SETTINGS, "DRY_RUN": "1"})
    assert not (tmp_path / "submitted").exists() and not planned.outdir.exists()


def test_without_sbatch_the_script_is_printed_with_where_to_submit_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submission.submit_or_print(job(tmp_path), {"SLURM": "1"}) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash\n#SBATCH") and "login node" in err


def test_what_slurm_refuses_is_told(tmp_path, programs):
    program(
        programs, "sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1'
    )
    with pytest.raises(UserError, match="invalid partition specified"):
        submission.submit_or_print(job(tmp_path), SETTINGS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"TIME": "soon"},
        {"PARTITION": "gpu\n#SBATCH --x"},
        {"ACCOUNT": "$(reboot)"},
        {"QOS": "a b"},
        {"CONSTRAINT": "a;b"},
        {"GRACE": "soon"},
        {"GRACE": "1800", "TIME": "30"},
    ],
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
    environment = os.environ | {"SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", script],
        text=True,
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert f"ARGS={value}" in done.stdout.split("\0") and f"DATA={value}" in done.stdout.split("\0")
    assert not (ROOT / "touched").exists() and not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:30:15", 5415),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:15", 217815),
    ],
)
def test_time_limits_are_read_as_sbatch_does(limit, seconds):
    """sbatch(1), --time."""
    assert slurm.duration_s(limit) == seconds


def test_settings_for_slurm_become_its_options(tmp_path):
    asked = {**SETTINGS, "QOS": "high", "CONSTRAINT": "h100&ib", "EXCLUSIVE": "1", "GRACE": "300"}
    script = slurm.render_sbatch(job(tmp_path), asked)
    wanted = {"qos": "high", "constraint": '"h100&ib"', "exclusive": "", "signal": "B:USR1@300"}
    assert wanted.items() <= options(script).items()
    words = re.search(r"^run=(.*)$", script, re.MULTILINE)[1]
    assert not re.search("QOS|CONSTRAINT|EXCLUSIVE|GRACE", words), "launchers would refuse them"


def saving(tmp_path: Path, **settings: str) -> Plan:
    return replace(job(tmp_path), extras=Extras(saving=Saving(5)))


def test_a_job_that_saves_has_more_time_to(tmp_path):
    assert options(slurm.render_sbatch(saving(tmp_path), {}))["signal"] == "B:USR1@120"


def test_on_a_cpu_a_job_asks_for_cores_and_no_gpus(tmp_path):
    script = slurm.render_sbatch(replace(job(tmp_path), device="cpu"), {})
    assert options(script)["cpus-per-task"] == "8" and "gpu" not in " ".join(options(script))
    assert "DEVICE=cpu" in script


def run_script(script: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run a batch script without installing anything."""
    return subprocess.run(
        ["bash", "-c", script.replace("scripts/setup.sh light heavy", ":")],
        env=os.environ | {"SLURM_JOB_ID": "77"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("again", "chain", "requeued"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
def test_a_job_is_requeued_where_its_launcher_asks_for_it(
    tmp_path, programs, again, chain, requeued
):
    planned = saving(tmp_path)
    planned.outdir.mkdir()
    program(programs, "scontrol", f'echo "$@" >> {tmp_path}/asked; exit 1')
    program(programs, "srun", f'{"touch" if again else ":"} "$HARNESS_JOB_FILES.again"; exit 143')
    settings = {"CHAIN": "2"} if chain else {}
    assert run_script(slurm.render_sbatch(planned, settings), tmp_path).returncode == 143
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 77\n" if requeued else "")
    assert not list(planned.outdir.glob("slurm-77.*")), "the next start must not find them"


def test_the_jobs_of_a_chain_wait_for_each_other_and_know_the_first(tmp_path, programs, capsys):
    program(
        programs, "sbatch", f'n=$(cat {tmp_path}/n 2>/dev/null || echo 76); echo $((n + 1)) | tee {tmp_path}/n; '
        f'echo "$@" >> {tmp_path}/asked'
    )  # fmt: skip
    assert submission.submit_or_print(saving(tmp_path), {"CHAIN": "3"}) == 0
    assert (tmp_path / "asked").read_text().splitlines() == [
        "--parsable",
        "--parsable --dependency=afterany:77 --export=ALL,HARNESS_CHAIN=77",
        "--parsable --dependency=afterany:78 --export=ALL,HARNESS_CHAIN=77",
    ]
    assert "submitted jobs 77, 78, 79" in capsys.readouterr().out
    recorded = submission.submitted(tmp_path / "out dir")
    assert [(each.job, each.first) for each in recorded] == [
        ("79", "77"),
        ("78", "77"),
        ("77", "77"),
    ]


def test_a_chain_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="keeps none: add SAVE_EVERY=100"):
        submission.submit_or_print(job(tmp_path), {"CHAIN": "2"})


def test_experiments_of_one_size_become_an_array(tmp_path, programs):
    program(programs, "sbatch", f"cat >> {tmp_path}/submitted; echo 77")
    plans = [job(tmp_path, id=id_) for id_ in ("218", "219")] + [job(tmp_path, id="220", nodes=2)]
    assert submission.submit_all(plans, {"STEPS": "5"}, "chapter-200") == 0
    first, second = re.split(r"^#!.*\n", (tmp_path / "submitted").read_text(), flags=re.MULTILINE)[
        1:
    ]
    assert options(first)["array"] == "0-1" and "array" not in options(second)
    assert options(first)["job-name"] == "chapter-200"
    assert options(first)["output"].endswith('slurm-%A_%a.txt"')
    program(programs, "srun", 'printf "<%s>" "${@:3}"; echo "<$HARNESS_JOB>"')
    environment = os.environ | {"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "77"}
    for task, id_ in (("0", "218"), ("1", "219")):
        said = subprocess.run(
            ["bash", "-c", first.replace("scripts/setup.sh light heavy", ":")],
            env=environment | {"SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"<run><{id_}><STEPS=5>" in said and f"<77_{task}>" in said


SINFO = """\
gpu|up|2-00:00:00|8|128|gpu:h100:8(S:0-1)|h100,ib|gpu*
gpu|up|2-00:00:00|2|128|gpu:h200:4|h200|gpu*
dev|up|30:00|1|64|gpu:h100:2|h100|dev
login|up|infinite|2|16|(null)|(null)|login
"""
ASK = scheduler.Ask("gpu", 3600, 1, 32, 4, None)


@pytest.fixture
def offered(programs):
    program(programs, "sinfo", f"cat <<'END'\n{SINFO}END")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"partition": None}, None),
        ({"partition": "gpus"}, "PARTITION=gpus; did you mean gpu?"),
        (
            {"partition": "dev", "limit_s": 60},
            "needs 4 GPUs of a node, and nodes of partition dev have at most 2",
        ),
        ({"partition": "login"}, "needs 4 GPUs of a node, and nodes of partition login have"),
        ({"partition": "dev", "gpus": 2, "limit_s": 3600}, "partition dev ends jobs after 1800 s"),
        ({"limit_s": 3 * 86400}, "TIME: 259200 s, and partition gpu ends jobs after 172800 s"),
        ({"constraint": "h100&ib"}, None),
        ({"constraint": "h100&h200"}, "features there: h100, h200, ib"),
        ({"constraint": "h100|a100"}, None),
        ({"constraint": "h200", "gpus": 8}, "needs 8 GPUs of a node"),
        ({"nodes": 10}, None),
        ({"nodes": 11}, "NODES=11: partition gpu has 10"),
        ({"nodes": 9, "constraint": "h100"}, "NODES=9: partition gpu has 8"),
        ({"cpus": 200}, "needs 200 cores"),
    ],
)
def test_what_no_node_can_run_is_refused(offered, changes, said):
    ask = scheduler.Ask(**{**vars(ASK), **changes})
    if said is None:
        scheduler.check(ask)
        return
    with pytest.raises(UserError, match=re.escape(said)):
        scheduler.check(ask)


def test_where_sinfo_does_not_answer_nothing_is_refused(programs):
    program(programs, "sinfo", "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1")
    scheduler.check(scheduler.Ask("nowhere", 1, 1, 1, 1, None))


SQUEUE = """\
77|RUNNING|None|1:02|30:00|node1
78|PENDING|Dependency|0:00|30:00|
80_0|FAILED|NonZeroExitCode|0:10|30:00|node2
"""


def test_jobs_are_listed_with_state_and_progress(tmp_path, programs, capsys):
    program(programs, "sbatch", "echo 77")
    program(programs, "squeue", f"cat <<'END'\n{SQUEUE}END")
    program(programs, "sacct", 'echo "79|CANCELLED by 1000|None|0:03|00:30:00|node1"')
    outdir = tmp_path / "out"
    outdir.mkdir()
    for number, first in (("77", "77"), ("78", "77"), ("79", "79")):
        record = {"job": number, "tasks": ["219-tiny"], "first": first, "time": float(number)}
        write_json(outdir / f"slurm-{number}.json", record)
    run = writing.create(outdir, "219-tiny")
    write_json(run.running, {"pid": 1, "host": "h", "started": 1.0, "job": "77"})
    run.metrics.write_text('{"step": 12, "loss": 2.5, "step_ms": 1.0, "time": 1.0}\n')
    assert jobs.show(outdir) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        "79 cancelled 0:03/00:30:00 219-tiny",
        "78 pending 0:00/30:00 step 12, loss 2.5000 219-tiny",
        "77 running 1:02/30:00 step 12, loss 2.5000 219-tiny",
    ]


def test_cancel_takes_what_waits_first_and_has_what_runs_save(tmp_path, programs, capsys):
    program(programs, "sbatch", "echo 77")
    program(programs, "squeue", f"cat <<'END'\n{SQUEUE}END")
    program(programs, "scancel", f'echo "$@" >> {tmp_path}/asked')
    for number in ("77", "78"):
        record = {"job": number, "tasks": ["219-tiny"], "first": "77", "time": float(number)}
        write_json(tmp_path / f"slurm-{number}.json", record)
    assert jobs.cancel(tmp_path, "77", at_once=False) == 0
    assert (tmp_path / "asked").read_text() == "78\n--batch --signal=TERM 77\n"
    assert jobs.cancel(tmp_path, "77", at_once=True) == 0
    assert (tmp_path / "asked").read_text().endswith("78\n77\n")
    with pytest.raises(UserError, match=r"JOB=76: no such job of .*; did you mean 78, 77"):
        jobs.cancel(tmp_path, "76", at_once=True)
