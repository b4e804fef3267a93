"""Cluster profiles: what they hold, how they change a batch script, and what is refused in them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.launching import clusters, slurm
from harness.planning.plan import plan

IMAGES = {"dgx-h100": "nvcr.io#nvidia/pytorch:25.11-py3", "aws-p5": "/fsx/image.sqsh"}


def rendered(tmp_path: Path, **settings: str) -> str:
    """The batch script of experiment 219 on two nodes."""
    cluster = settings.get("CLUSTER", "generic")
    asked = {"SLURM": "1", "NODES": "2", "OUTDIR": str(tmp_path / "out"), **settings}
    if cluster in IMAGES:
        asked.setdefault("IMAGE", IMAGES[cluster])
    asked = clusters.find(asked).settings({**asked, "DEVICE": "cuda"})
    return slurm.render_sbatch(plan(load_catalog().find("219"), asked, "cuda"), asked)


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def srun(script: str) -> list[str]:
    (line,) = re.findall(r"^srun (.*) &$", script, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("name", clusters.names())
def test_every_profile_renders_a_script_that_pleases_shellcheck(tmp_path, name):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    script = rendered(tmp_path, CLUSTER=name)
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", clusters.names())
def test_a_profile_says_where_it_ran_and_where_its_values_are_from(name):
    profile = clusters.read(clusters.FOLDER / f"{name}.yaml")
    assert profile.tried == "rendered, never run" or name == "generic"
    assert profile.sources or name == "generic"


def test_lumi_gets_one_task_of_56_cores_whose_torchrun_binds_ranks(tmp_path):
    """LUMI-AI-Guide, 05-multi-gpu-and-node/run_ddp_torchrun_4.sh."""
    script = rendered(tmp_path, CLUSTER="lumi-g", ACCOUNT="project_1", TIME="2:00:00")
    wanted = {
        "partition": "standard-g",
        "account": "project_1",
        "time": "2:00:00",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "56",
        "mem": "480G",
    }
    assert wanted.items() <= options(script).items()
    words = srun(script)
    assert "--cpus-per-task=56" in words and "--rocm" in words and "--nv" not in words
    at = words.index("singularity")
    assert words[at : at + 2] == ["singularity", "run"]
    assert words[-2:] == [
        "/appl/local/laifs/containers/lumi-multitorch-latest.sif",
        "${command[@]}",
    ]
    assert "module load lumi-aif-singularity-bindings\n" in script
    for line in (
        "export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3",
        "export NCCL_NET_GDR_LEVEL=PHB",
        "export FI_CXI_DEFAULT_CQ_SIZE=131072",
        "export VENV=0",
    ):
        assert f"\n{line}\n" in script
    assert "scripts/setup.sh light heavy" not in script, "packages are the container's"
    assert "--numa-binding exclusive" in script and "--no-rope-fusion" in script


def test_a_user_may_choose_otherwise_than_the_profile(tmp_path):
    settings = {"PARTITION": "small-g", "EXCLUSIVE": "0", "NUMA_BINDING": "node"}
    script = rendered(tmp_path, CLUSTER="lumi-g", **settings, ARGS="--lr 1e-4", CONTAINER="0")
    assert options(script)["partition"] == "small-g" and "exclusive" not in options(script)
    assert "--numa-binding node" in script and "singularity run" not in script
    arguments = "--no-rope-fusion --no-gradient-accumulation-fusion --lr 1e-4"
    assert f"'ARGS={arguments}'" in script


def test_pyxis_is_told_image_and_folders(tmp_path):
    script = rendered(tmp_path, CLUSTER="dgx-h100", SAVE=str(tmp_path / "kept"))
    words = srun(script)
    assert "--container-image=nvcr.io#nvidia/pytorch:25.11-py3" in words
    (mounts,) = [word for word in words if word.startswith("--container-mounts=")]
    for folder in (tmp_path / "out", tmp_path / "kept", slurm.ROOT):
        assert f"{folder}:{folder}" in mounts
    assert f"--container-workdir={slurm.ROOT}" in words
    assert words.index(mounts) < words.index("${command[@]}")


def test_apptainer_starts_the_command_inside(tmp_path):
    words = srun(rendered(tmp_path, CONTAINER="apptainer", IMAGE="/images/a b.sif"))
    at = words.index("apptainer")
    assert words[at : at + 3] == ["apptainer", "exec", "--nv"]
    assert words[-2:] == ["/images/a b.sif", "${command[@]}"]


def test_gpus_are_asked_for_as_the_cluster_wants(tmp_path):
    assert options(rendered(tmp_path, CLUSTER="aws-p5"))["gres"] == "gpu:8"
    assert "gpus-per-node" not in options(rendered(tmp_path, CLUSTER="aws-p5"))


PROFILE = "about: mine\ntried: here\noptions: {partition: big, reservation: tutorial}\n"


@pytest.mark.parametrize("beside", [True, False])
def test_a_profile_of_your_own_is_found_by_path_or_name(tmp_path, monkeypatch, beside):
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    if beside:
        monkeypatch.setattr(clusters, "FOLDER", tmp_path)
    (tmp_path / "generic.yaml").write_text("about: a\ntried: b\n")
    script = rendered(tmp_path, CLUSTER="mine" if beside else str(path))
    assert options(script)["partition"] == "big" and options(script)["reservation"] == "tutorial"
    assert options(script)["gpus-per-node"] == "8"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpu: 8", "mine.yaml: unknown key 'gpu'; did you mean gpus"),
        ("gpus_per_node: eight", "mine.yaml: gpus_per_node = 'eight': input should be a valid int"),
        ("gpus: intel", "mine.yaml: gpus = 'intel'; valid: 'nvidia' or 'amd'"),
        ("environment: {OMP_NUM_THREADS: 1}", "environment.OMP_NUM_THREADS = 1: input should be a"),
        ('environment: {"A B": "1"}', "'A B' is no environment variable"),
        ('srun: "-v"', "mine.yaml: srun = '-v': input should be a valid tuple"),
        ("container: {kind: docker}", "container.kind = 'docker'; valid: 'pyxis', 'apptainer'"),
        ('arguments: "\'"', 'mine.yaml: arguments = "\'": No closing quotation'),
    ],
)
def test_what_is_wrong_in_a_profile_is_said_with_its_key(tmp_path, line, said):
    path = tmp_path / "mine.yaml"
    path.write_text(f"about: mine\ntried: here\n{line}\n")
    with pytest.raises(UserError, match=re.escape(said)):
        clusters.find({"CLUSTER": str(path)})


def test_an_option_cannot_end_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('about: mine\ntried: here\noptions: {comment: "a\\n#SBATCH --x"}\n')
    with pytest.raises(UserError, match="characters that are not printable"):
        clusters.read(path)
