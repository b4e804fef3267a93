"""The container scripts: with a fake docker what they call, with buildah (make test-full) the Dockerfile for real."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a filled submodule, and a docker that prints the words it is called with."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    (tmp_path / "megatron-lm").mkdir()
    (tmp_path / "megatron-lm/pretrain_gpt.py").touch()
    fake = tmp_path / "bin/docker"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nfor word; do echo \"$word\"; done\n")
    fake.chmod(0o755)
    return tmp_path


def call(checkout, script, *words, **environment):
    environment = {"PATH": f"{checkout}/bin:/usr/bin:/bin", **environment}
    return subprocess.run([checkout / "docker" / script, *words], env=environment, capture_output=True, text=True)


def test_build(checkout):
    said = call(checkout, "build.sh", "--no-cache", BASE="debian:13")
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == ["build", "--build-arg", "BASE=debian:13", "--file", "docker/Dockerfile",
                                   "--tag", "megatron-harness", "--no-cache", "."]


def test_run_mounts_results_and_gives_ranks_what_they_need(checkout):
    said = call(checkout, "run.sh", "make", "101")
    assert said.returncode == 0, said.stderr
    words = said.stdout.split("\n")
    assert words[-4:] == ["megatron-harness", "make", "101", ""]
    for needed in ("--ipc=host", "memlock=-1", "stack=67108864", "--network=host"):
        assert needed in words
    inside = re.search(r"WORKDIR (.*)", (ROOT / "docker/Dockerfile").read_text())[1]
    for folder in ("outdir", "data"):
        assert f"{checkout}/{folder}:{inside}/{folder}" in words
        assert (checkout / folder).is_dir()
    assert ("--gpus" in words) == Path("/dev/nvidiactl").exists()
    assert "--tty" not in words, "a pipe is no terminal"


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_without_docker(checkout, script):
    said = call(checkout, script, DOCKER="no-such-docker")
    assert said.returncode == 2
    assert said.stderr.startswith("error: no no-such-docker here")


@pytest.mark.full
def test_dockerfile_builds_and_make_completes_inside(tmp_path):
    if os.geteuid() or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("needs root, buildah and debootstrap")
    said = subprocess.run([ROOT / "docker/prove.sh", tmp_path], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert re.search(r"make 101<tab>: 101-\S+$", said.stdout, re.MULTILINE)
    assert re.search(r"^\d+ experiments", said.stdout, re.MULTILINE)
