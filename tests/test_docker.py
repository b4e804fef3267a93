"""The image: what goes into it, what its scripts ask of docker and podman; with buildah (make test-full) the Dockerfile for real."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
INSIDE = re.search(r"^WORKDIR (.*)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)[1]

spec = importlib.util.spec_from_file_location("docker_packages", ROOT / "docker/packages.py")
packages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(packages)


# What is in the image.


def ignored(patterns: str, path: str) -> bool:
    """Whether Docker leaves ``path`` out: patterns cleaned as Go's filepath.Clean does, matched against the path and each
    folder above it, the last match deciding (moby/patternmatcher, MatchesOrParentMatches)."""
    out, above = False, [path.rsplit("/", n)[0] for n in range(path.count("/") + 1)]
    for line in patterns.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        exception, line = (
            line.startswith("!"),
            os.path.normpath(line.removeprefix("!").strip()).lstrip("/"),
        )
        if any(re.fullmatch(expression(line), part) for part in above):
            out = not exception
    return out


def expression(pattern: str) -> str:
    """A pattern of .dockerignore as a regular expression: ``*`` stays within a folder, ``**`` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meaning.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts
    )


def test_docker_drops_the_trailing_slash_of_a_pattern():
    assert ignored("data/*/", "data/datasets.yaml") and ignored("data/*/", "data/mine/a.bin")
    assert not ignored("data/*", "data2/a") and not ignored("*.yaml", "data/datasets.yaml")
    assert ignored("*\n!data/*.yaml", "data/mine.bin") and not ignored(
        "*\n!data/*.yaml", "data/mine.yaml"
    )
    assert ignored("*\n!harness\n**/__pycache__", "harness/data/__pycache__/a.pyc")


def tracked() -> list[str]:
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="which files are the checkout's is known to git alone"
)
def test_image_has_what_runs_read_and_nothing_else():
    patterns = (ROOT / ".dockerignore").read_text()
    files = tracked()
    inside = {path for path in files if not ignored(patterns, path)}
    assert {
        "data/datasets.yaml",
        "data/rules-sv.yaml",
        "data/toy-chat.jsonl",
        "Makefile",
        "pyproject.toml",
        "LICENSE",
    } <= inside
    for folder in ("harness", "experiments", "scripts"):
        needed = {path for path in files if path.startswith(f"{folder}/")}
        assert needed and needed <= inside
    assert {path.split("/")[0] for path in inside} <= {
        "LICENSE",
        "Makefile",
        "README.md",
        "data",
        "docker",
        "experiments",
        "harness",
        "megatron-lm",
        "pyproject.toml",
        "scripts",
        "uv.lock",
    }
    for private in (
        "data/mine/mine_text_document.bin",
        "data/mine/manifest.json",
        "weights/llama/model/__0_0.distcp",
        ".git",
        ".git/config",
        "outdir/101/result.json",
        ".venv/bin/python",
        ".venv-2/lib/a.py",
        ".gpu/x",
        ".env",
        "tests/test_cli.py",
        "megatron-lm/.git",
        "megatron-lm/tests/unit_tests/a.py",
        "harness/__pycache__/a.pyc",
        "id_rsa",
    ):
        assert ignored(patterns, private), private
    for upstream in (
        "megatron-lm/pretrain_gpt.py",
        "megatron-lm/megatron/core/datasets/helpers.cpp",
    ):
        assert not ignored(patterns, upstream)


def test_base_is_pinned_by_digest():
    text = (ROOT / "docker/Dockerfile").read_text()
    assert re.search(
        r"^ARG BASE=nvcr\.io/nvidia/pytorch:[\w.-]+@sha256:[0-9a-f]{64}$", text, re.MULTILINE
    )
    assert re.findall(r"^FROM (.*)", text, re.MULTILINE) == ["${BASE}"]


def test_image_does_not_run_as_root():
    assert (
        re.findall(r"^USER (.*)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)[-1]
        == "harness"
    )


# Its packages.


def test_an_exported_lock_is_read_by_name():
    exported = (
        "einops==0.8.2 \\\n    --hash=sha256:0\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n"
    )
    locked = packages.entries(exported)
    assert "".join(locked.values()) == exported
    assert list(locked) == ["einops", "colorama"]


LOCKED = "".join(
    f"{pin} \\\n    --hash=sha256:{n}\n"
    for n, pin in enumerate(("einops==0.8.2", "torch==2.11.0", "typer==0.29.2"))
)


@pytest.fixture
def base(monkeypatch):
    """A base with its own torch and an older typer; uv, which would add einops and another typer, notes what it is asked."""
    asked = []

    def run(*words):
        asked.append(words)
        files = {
            word: Path(words[n + 1]) for n, word in enumerate(words[:-1]) if word.startswith("--")
        }
        if "export" in words:
            return packages.locked
        if "--dry-run" in words:
            asked.append(files["--constraints"].read_text())
            return "Would install 2 packages\n + Einops==0.8.2\n - typer==0.1\n + typer==0.30.0\n"
        if "--requirements" in words:
            asked.append(files["--requirements"].read_text())
        return ""

    class Distribution:
        def __init__(self, name, version):
            self.name, self.version = name, version

    there = [Distribution("torch", "2.9.0a0+50eac811a6.nv25.09"), Distribution("Typer", "0.1")]
    monkeypatch.setattr(packages.metadata, "distributions", lambda: there)
    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(packages, "locked", LOCKED, raising=False)
    monkeypatch.setattr(
        packages.stages, "missing", lambda stage: ("einops==0.8.2",) if stage == "heavy" else ()
    )
    monkeypatch.setattr(packages.setup, "check", asked.append)
    return asked


def test_the_layer_of_packages_has_every_module_that_it_imports(tmp_path):
    before, _ = (
        (ROOT / "docker" / "Dockerfile").read_text().split("RUN python3 docker/packages.py\n")
    )
    for *sources, folder in (
        line.split()[1:] for line in before.splitlines() if line.startswith("COPY ")
    ):
        for source in sources:
            target = tmp_path / folder / (Path(source).name if (ROOT / source).is_file() else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copy if (ROOT / source).is_file() else shutil.copytree)(ROOT / source, target)
    assert (tmp_path / "uv.lock").exists()
    command = [sys.executable, "-I", "-c", "import runpy; runpy.run_path('docker/packages.py')"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_image_gets_what_it_lacks_by_hash_and_keeps_its_torch(base, capsys):
    packages.install()
    fetching, _, (*_, lacking), constraints, installing, chosen, checked = base
    assert {"--no-deps", "--require-hashes", "--target"} <= set(fetching)
    assert lacking == "einops==0.8.2"
    assert constraints.splitlines() == ["einops==0.8.2", "torch==2.9.0a0+50eac811a6.nv25.09"]
    assert {"--no-deps", "--require-hashes"} <= set(installing)
    assert (
        chosen == "einops==0.8.2 \\\n    --hash=sha256:0\ntyper==0.29.2 \\\n    --hash=sha256:2\n"
    )
    assert checked == list(packages.STAGES)
    assert "typer 0.1 does not fit what is added; replaced" in capsys.readouterr().out


def test_image_takes_nothing_that_is_not_locked(base, monkeypatch):
    monkeypatch.setattr(packages, "locked", "einops==0.8.2 \\\n    --hash=sha256:0\n")
    with pytest.raises(UserError, match=r"uv\.lock lacks typer, which this base needs"):
        packages.install()
    assert not any("--requirements" in words for words in base)


def test_a_failing_tool_is_an_error_with_what_it_printed():
    with pytest.raises(UserError, match=r"(?s)failed:.*no network"):
        packages.run(sys.executable, "-c", "import sys; sys.exit('no network')")


# What docker and podman are asked for.


@pytest.fixture
def checkout(tmp_path):
    """A committed checkout with a filled submodule, and a docker and a podman that print the words they are asked to act on."""
    tree = tmp_path / 'a checkout, with: odd "words"'
    shutil.copytree(ROOT / "docker", tree / "docker")
    (tree / "megatron-lm").mkdir()
    (tree / "megatron-lm/pretrain_gpt.py").touch()
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=first")
    for name in ("docker", "podman"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(
            f"""#!/bin/sh
case $1 in
  info) if [ -n "$DEAF" ]; then echo "Cannot connect to the daemon" >&2; exit 1; fi; echo "$SECURITY"; exit ;;
  image) [ -z "$NO_IMAGE" ]; exit ;;
esac
echo {name}; for word; do echo "$word"; done; exit ${{STATUS:-0}}
"""
        )
        fake.chmod(0o755)
    return tree


def git(tree, *words):
    return subprocess.run(
        ["git", *words], cwd=tree, check=True, capture_output=True, text=True
    ).stdout


def call(checkout, script, *words, **environment):
    environment = {
        "PATH": f"{checkout.parent}/bin:/usr/bin:/bin",
        "HOME": str(checkout.parent),
        **environment,
    }
    return subprocess.run(
        [checkout / "docker" / script, *words],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def words_of(said):
    assert said.returncode == 0, said.stderr
    return said.stdout.split("\n")[:-1]


def test_build_passes_the_base_and_the_commit(checkout):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    arguments = [
        "docker",
        "build",
        "--build-arg",
        f"COMMIT={commit}",
        "--build-arg",
        "UPSTREAM_COMMIT=",
    ]
    rest = ["--file", "docker/Dockerfile", "--tag", "megatron-harness", "--label", "a b", "."]
    assert words_of(call(checkout, "build.sh", "--label", "a b")) == arguments + rest
    (checkout / "docker/run.sh").write_text("changed")
    arguments[3] += " dirty"
    assert words_of(call(checkout, "build.sh", "--label", "a b", BASE="debian:13")) == [
        *arguments,
        "--build-arg",
        "BASE=debian:13",
        *rest,
    ]


def test_build_names_upstreams_commit_where_it_is_a_checkout(checkout):
    git(checkout / "megatron-lm", "init", "--quiet")
    git(
        checkout / "megatron-lm",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "commit",
        "--allow-empty",
        "--quiet",
        "--message=up",
    )
    upstream = git(checkout / "megatron-lm", "rev-parse", "HEAD").strip()
    assert f"UPSTREAM_COMMIT={upstream}" in words_of(call(checkout, "build.sh"))


def test_build_says_that_no_commit_is_known(checkout):
    shutil.rmtree(checkout / ".git")
    said = call(checkout, "build.sh")
    assert "COMMIT=" in words_of(said)
    assert "git does not know this checkout's commit" in said.stderr


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_run_mounts_what_runs_read_and_write_as_the_caller(checkout, tool):
    words = words_of(call(checkout, "run.sh", "make", "101", "ARGS=--seed 1", DOCKER=tool))
    assert words[:2] == [tool, "run"]
    assert words[-5:] == ["megatron-harness", "docker/forward.sh", "make", "101", "ARGS=--seed 1"]
    for needed in ("--rm", "--init", "--interactive", "--ipc=host", "--network=host"):
        assert needed in words
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    for folder in ("outdir", "data", "weights"):
        quoted = str(checkout / folder).replace('"', '""')
        assert f'type=bind,"source={quoted}",target={INSIDE}/{folder}' in words
        assert (checkout / folder).is_dir()
    assert ("--gpus" in words) == (tool == "docker" and Path("/dev/nvidiactl").exists())
    assert ("--userns=keep-id" in words) == (tool == "podman" and os.getuid() != 0)
    assert "--tty" not in words, "a pipe is no terminal"


def test_run_lets_rdma_lock_memory(checkout):
    words = words_of(call(checkout, "run.sh"))
    assert [words[n + 1] for n, word in enumerate(words) if word == "--ulimit"] == [
        "memlock=-1",
        "stack=67108864",
    ]
    assert words[-3:] == ["megatron-harness", "docker/forward.sh", "bash"]


def test_run_of_a_rootless_docker_is_root_inside_which_is_the_caller(checkout):
    words = words_of(call(checkout, "run.sh", SECURITY="[name=seccomp name=rootless]"))
    assert words[words.index("--user") + 1] == "0:0"


def test_run_with_sudo_leaves_files_to_who_called_it(checkout):
    if os.getuid():
        pytest.skip("only root may be told by sudo who called")
    words = words_of(call(checkout, "run.sh", SUDO_UID="1234", SUDO_GID="1235"))
    assert words[words.index("--user") + 1] == "1234:1235"


def test_run_mounts_another_folder_for_runs(checkout):
    words = words_of(call(checkout, "run.sh", OUTDIR=str(checkout.parent / "big")))
    assert f'type=bind,"source={checkout.parent}/big",target={INSIDE}/outdir' in words
    assert (checkout.parent / "big").is_dir()


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
@pytest.mark.parametrize("environment", [{"STATUS": "3"}, {"STATUS": "3", "DOCKER": "podman"}])
def test_status_is_the_tools(checkout, script, environment):
    assert call(checkout, script, "false", **environment).returncode == 3


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_without_docker(checkout, script):
    said = call(checkout, script, DOCKER="no-such-docker")
    assert said.returncode == 2
    assert said.stderr.startswith(
        "error: no no-such-docker here\ninstall Docker (https://docs.docker.com/engine/install), or podman"
    )


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_podman_where_only_that_is(checkout, script):
    tools = checkout.parent / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "git", "mkdir", "id", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "podman").symlink_to(checkout.parent / "bin/podman")
    assert words_of(call(checkout, script, PATH=str(tools)))[0] == "podman"


@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_docker_without_its_service(checkout, script):
    said = call(checkout, script, DEAF="1")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith(
        "error: docker is installed, but does not answer: Cannot connect to the daemon\nstart its service"
    )


def test_words_before_the_tool(checkout):
    assert words_of(call(checkout, "run.sh", DOCKER="env A=b docker"))[0] == "docker"


def test_run_without_an_image_says_how_to_build_it(checkout):
    said = call(checkout, "run.sh", NO_IMAGE="1")
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == "error: no image megatron-harness here\nbuild it: make docker-build\n"
    assert not (checkout / "weights").exists(), "refused: nothing is left behind"


# Signals, where the container has no terminal.


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_what_the_command_started(tmp_path, sent):
    """As make does, the shell waits for its child, which alone writes the file."""
    child = (
        "import pathlib, signal, sys, time; file = pathlib.Path(sys.argv[1])\n"
        "def end(number, _): file.write_text(str(number)); sys.exit(7)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end); file.with_name('up').touch(); time.sleep(60)"
    )
    command = 'trap : INT TERM; python3 -c "$1" "$2"; exit $?'
    with subprocess.Popen(
        [ROOT / "docker/forward.sh", "bash", "-c", command, "bash", child, tmp_path / "got"]
    ) as forward:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "up").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            forward.send_signal(sent)
            assert forward.wait(timeout=60) == 7
        finally:
            forward.kill()
    assert (tmp_path / "got").read_text() == str(int(sent))


def test_forward_passes_input_words_and_status():
    command = [ROOT / "docker/forward.sh", "sh", "-c", 'cat; echo "$1"; exit 5', "sh", "a b"]
    said = subprocess.run(command, input="typed\n", capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (5, "typed\na b\n")


# The real thing.


@pytest.mark.full
def test_image_is_built_and_trains_with_and_without_mounts(tmp_path):
    if os.geteuid() or not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("needs root, buildah and debootstrap")
    said = subprocess.run(
        [ROOT / "docker/prove.sh", tmp_path / "new" / "folder"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.endswith("== proven\n")
    assert re.search(r"make 101<tab>: 101-\S+$", said.stdout, re.MULTILINE)
    assert len(re.findall(r"^\d+ experiments", said.stdout, re.MULTILINE)) == 2
    commit = git(ROOT, "rev-parse", "HEAD").strip()
    assert re.search(rf"^{commit}( dirty)?$", said.stdout, re.MULTILINE)
