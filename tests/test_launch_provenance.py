"""Versions and commits that a run's environment.json states."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.machine import provenance

ROOT = Path(__file__).resolve().parent.parent


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(
        ["git", "-C", tree, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_repository_tells_its_commit_and_whether_it_changed(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.source_commit(repository) == (commit, False)
    (repository / "file").write_text("2")
    assert provenance.source_commit(repository) == (commit, True)


def test_a_folder_inside_a_repository_is_not_that_repository(repository):
    (repository / "megatron-lm").mkdir()
    assert provenance.source_commit(repository / "megatron-lm") == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc123\n", ("abc123", False)),
        ("abc123 dirty\n", ("abc123", True)),
        ("", (None, None)),
        (None, (None, None)),
    ],
)
def test_without_git_the_file_commit_tells(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "COMMIT").write_text(text)
    assert provenance.source_commit(tmp_path) == expected


def make_upstream(tree: Path) -> None:
    for part in ("megatron/core", "megatron/training"):
        (tree / part).mkdir(parents=True)
    (tree / "pretrain_gpt.py").touch()
    (tree / "megatron/core/package_info.py").write_text(
        "MAJOR = 0\nMINOR = 19\nPATCH = 0\nPRE_RELEASE = 'rc1'\n"
    )


def test_upstreams_tree_tells_its_version_and_commit(tmp_path, monkeypatch):
    make_upstream(tmp_path)
    (tmp_path / "COMMIT").write_text("5be9626")
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    found = provenance.describe_upstream()
    assert (found.version, found.commit, found.source) == ("0.19.0rc1", "5be9626", "submodule")


def test_a_tree_that_is_half_there_is_refused(tmp_path, monkeypatch):
    make_upstream(tmp_path)
    (tmp_path / "pretrain_gpt.py").unlink()
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    with pytest.raises(UserError, match=r"pretrain_gpt\.py"):
        provenance.describe_environment("cpu")


def test_the_environment_is_described_without_importing_torch():
    code = (
        "import sys; from harness.machine.provenance import describe_environment as d; e = d('cpu'); "
        "print(e['python'], e['gpu'], e['memory_gib'] > 0, 'torch' in e, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        "{}.{}.{}".format(*sys.version_info[:3]),
        "None",
        "True",
        "True",
        "False",
    ]
