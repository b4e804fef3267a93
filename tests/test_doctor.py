import subprocess
import sys
from pathlib import Path

import pytest

from harness import doctor
from harness.doctor import Torch
from harness.errors import UserError
from harness.machine import gpus

ROOT = Path(__file__).resolve().parent.parent


def test_report_on_this_machine_imports_nothing_heavy():
    code = "import sys; from harness.doctor import doctor; s = doctor(); print('torch' in sys.modules); sys.exit(s)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr == ""
    assert said.stdout.splitlines()[-1] == "False"
    for topic in (
        "Python",
        "stage light",
        "PyTorch",
        "Megatron-LM",
        "disk",
        "/dev/shm",
        "open files",
        "sbatch",
    ):
        assert f"  {topic} " in said.stdout
    verdict = said.stdout.splitlines()[-2]
    assert verdict.startswith("Runs can start" if said.returncode == 0 else "Runs cannot start")


@pytest.mark.parametrize(
    ("found", "on_gpu", "driver", "state", "remedy"),
    [
        (None, False, None, "note", "make setup"),
        (Torch("2.11.0+cpu", None), False, None, "ok", ""),
        (Torch("2.11.0+cu130", "13.0"), False, None, "ok", ""),
        (Torch("2.11.0+cpu", None), True, "13.0", "missing", "make setup-gpu"),
        (Torch("2.11.0+cu130", "13.0"), True, "12.8", "missing", "driver"),
        (Torch("2.11.0+cu130", "13.0"), True, "13.1", "ok", ""),
        (Torch("2.11.0+cu126", "12.6"), True, "13.0", "ok", ""),
    ],
)
def test_torch_must_fit_the_device(found, on_gpu, driver, state, remedy):
    finding = doctor.torch(found, on_gpu, driver)
    assert finding.state == state
    assert remedy in finding.remedy


def test_missing_on_the_gpu_means_runs_cannot_start(monkeypatch, capsys):
    monkeypatch.setattr(
        gpus, "list_gpus", lambda: (gpus.LocalGpu(0, "NVIDIA H100 80GB HBM3", "GPU-1", 81559.0),)
    )
    monkeypatch.setattr(gpus, "driver_versions", lambda: ("580.95", "13.0"))
    monkeypatch.setattr(gpus, "use", lambda: (gpus.GpuUse(gpus.list_gpus()[0], 70.0),))
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    assert doctor.doctor() == 1
    said = capsys.readouterr().out
    assert "Runs cannot start on 1 GPU: " in said and "Transformer Engine" in said.splitlines()[-1]
    assert "NVIDIA H100 80GB HBM3, 80 GiB; busy: 70.0 GiB used" in said


def test_torch_is_read_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch/version.py").write_text(
        "__version__ = '2.9.0a0+nv25.09'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert doctor.installed_torch() == Torch("2.9.0a0+nv25.09", "13.0")
    (tmp_path / "torch/version.py").write_text(
        "__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\n"
    )
    assert doctor.installed_torch() == Torch("2.11.0+cpu", None)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An upstream tree in a git repository of its own, named by MEGATRON_LM."""
    for part in ("megatron/core", "megatron/training"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "pretrain_gpt.py").touch()
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    return tmp_path


def test_upstream_named_by_the_environment(tree):
    assert "commit unknown" in doctor.upstream().text
    (tree / "COMMIT").write_text("5be9626\n")
    assert doctor.upstream().text.endswith(", 5be9626")
    git = ["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    finding = doctor.upstream()
    assert finding.state == "ok" and head in finding.text


def test_upstream_half_checked_out(tree):
    (tree / "pretrain_gpt.py").unlink()
    finding = doctor.upstream()
    assert finding.state == "missing"
    assert "git submodule update --init" in finding.remedy


def test_links_and_amounts():
    assert doctor.nvlink(28, 28).state == "ok"
    assert doctor.nvlink(4, 28).state == "warn" and "4 of 28" in doctor.nvlink(4, 28).text
    enough, short = (
        doctor.amount("/dev/shm", gib, 1, "NCCL uses it", "", "--ipc=host")
        for gib in (16.0, 0.0625)
    )
    assert (enough.state, short.state) == ("ok", "warn")
    assert short.remedy == "--ipc=host"


def test_a_line_shows_state_topic_text_and_the_way_out():
    finding = doctor.Finding("disk", "warn", "1.0 GiB free", "make room\nor move")
    assert doctor.line(finding, colour=False).splitlines() == [
        "  warn     disk                  1.0 GiB free",
        " " * 31 + "→ make room",
        " " * 31 + "→ or move",
    ]
    assert "\033[33mwarn" in doctor.line(finding, colour=True)


def tool(folder: Path, name: str, script: str) -> None:
    """A command on a PATH of its own."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("DOCKER", raising=False)
    return folder


@pytest.mark.parametrize(
    "look, name, works, broken, why",
    [
        (
            doctor.containers,
            "docker",
            "[[ $1 == info ]]",
            "echo Cannot connect to the Docker daemon. >&2; exit 1",
            "does not answer: Cannot connect to the Docker daemon.",
        ),
        (
            doctor.compiler,
            "c++",
            "exec /bin/true",
            "echo vector: No such file >&2; exit 1",
            "does not compile: vector: No such file",
        ),
    ],
)
def test_what_is_ok_works(commands, look, name, works, broken, why):
    assert look().state == "note"
    tool(commands, name, works)
    assert look().state == "ok"
    tool(commands, name, broken)
    assert look().state == "warn" and why in look().text


def test_a_container_tool_that_docker_names(commands, monkeypatch):
    tool(commands, "podman", "exit 0")
    assert doctor.containers() == doctor.Finding(
        "podman", "ok", f"{commands}/podman, and it answers"
    )
    tool(commands, "sudo", 'shift; [[ "$*" == info ]] && echo denied >&2; exit 1')
    monkeypatch.setenv("DOCKER", "sudo docker")
    assert doctor.containers().state == "warn" and "denied" in doctor.containers().text


def test_slurm_without_its_controller(commands):
    tool(commands, "sbatch", "exit 0")
    tool(commands, "scontrol", "echo Slurmctld(primary) at head is DOWN; exit 1")
    assert doctor.slurm().state == "warn" and "is DOWN" in doctor.slurm().text
    tool(commands, "scontrol", "exit 0")
    assert doctor.slurm().state == "ok"


def test_what_does_not_answer_is_not_waited_for(commands, monkeypatch):
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 0.2)
    tool(commands, "docker", "exec /bin/sleep 30")
    assert "no answer within 0.2 s" in doctor.containers().text


def test_a_damaged_data_set_is_not_ok(monkeypatch):
    def find(name):
        if name == "torn":
            raise UserError("cut short")

    monkeypatch.setattr(doctor.data_sets, "prepared_names", lambda: ("good", "torn"))
    monkeypatch.setattr(doctor.data_sets, "find", find)
    assert doctor.prepared_data() == doctor.Finding(
        "data sets", "warn", "damaged: torn", "make data-check NAME=torn"
    )
    monkeypatch.setattr(doctor.data_sets, "prepared_names", lambda: ("good",))
    assert doctor.prepared_data().state == "ok"


def test_transformer_engine_without_its_extension(monkeypatch):
    monkeypatch.setattr(doctor, "_has_torch_extension", lambda: False)
    assert doctor.transformer_engine("2.19.0", on_gpu=True).state == "missing"
    assert doctor.transformer_engine("2.19.0", on_gpu=False).state == "note"
    monkeypatch.setattr(doctor, "_has_torch_extension", lambda: True)
    assert doctor.transformer_engine("2.19.0", on_gpu=True).state == "ok"


def test_the_extension_lies_beside_or_within_transformer_engine(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert not doctor._has_torch_extension()
    (tmp_path / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    assert doctor._has_torch_extension()


def test_a_stage_with_deleted_files_is_not_ok(monkeypatch, tmp_path):
    class Environment:
        stamp = staticmethod(lambda name: tmp_path)
        ready = staticmethod(lambda name: True)
        damaged = staticmethod(lambda: [Path("torch-2.11.0.dist-info")])

    finding = doctor.stage("light", Environment(), "make help")
    assert finding.state == "warn" and "torch" in finding.text


def test_upstream_with_edited_files(tree):
    git = ["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "pretrain_gpt.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    assert doctor.upstream().state == "ok"
    (tree / "pretrain_gpt.py").write_text("edited")
    assert doctor.upstream().state == "warn" and "differ from that commit" in doctor.upstream().text
