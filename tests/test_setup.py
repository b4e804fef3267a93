"""scripts/setup.sh end to end, with the real uv and a package index on this machine that has small wheels."""

import base64
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.machine import setup, stages
from harness.machine.provenance import package_version

ROOT = Path(__file__).resolve().parent.parent
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
pytestmark = pytest.mark.skipif(UV is None, reason="no uv: scripts/setup.sh test")
PINS = """[project]
name = "small"
version = "1"
requires-python = ">=3.12,<3.14"

[dependency-groups]
light = ["alpha==1.0"]
core = [
    { include-group = "light" },
    "torch==2.11.0",
]
heavy = [
    { include-group = "core" },
    "beta==1.0",
]
gpu = [
    { include-group = "heavy" },
    "transformer-engine-torch==2.19.0",
]
gpu-build = [
    { include-group = "heavy" },
    "nvidia-cuda-nvcc==13.0.88",
    "pip==26.3",
]
bootstrap = ["uv==0.13.9"]

[tool.other]
key = 1
"""
# A module that fails to import once, while the file named by BROKEN is there.
BREAKABLE = """
import os
broken = os.environ.get("BROKEN", "")
if os.path.exists(broken):
    os.unlink(broken)
    raise ImportError("half a file")
if broken == "always":
    raise ImportError("half a file")
"""
# Stands for pip where it compiles Transformer Engine's extension for PyTorch.
BUILDING_PIP = """
import os, pathlib, shutil, sys
arguments = sys.argv[1:]
print("pip", *arguments, file=open(os.environ["CALLS"], "a"))
if os.environ.get("COMPILER") == "killed":
    print("c++: fatal error: Killed signal terminated program cc1plus")
    sys.exit(1)
print("  [1/2] c++ one.cpp", "  [2/2] c++ two.cpp", sep="\\n")
shutil.copy(os.environ["ENGINE_WHEEL"], arguments[arguments.index("--wheel-dir") + 1])
"""
# Distribution -> its files, and what it requires.
WHEELS = {
    "alpha-1.0": ({"alpha/__init__.py": BREAKABLE}, ()),
    "alpha-2.0": ({"alpha/__init__.py": ""}, ()),
    "beta-1.0": ({"beta/__init__.py": ""}, ()),
    "sympy-1.0": ({"sympy/__init__.py": ""}, ()),
    "triton-3.0": ({"triton/__init__.py": ""}, ()),
    "torch-2.11.0": (
        {
            "torch/__init__.py": "from . import cuda",
            "torch/cuda.py": "def is_available(): return False",
            "torch/distributed.py": "def is_gloo_available(): return True",
        },
        ("sympy", "triton ; sys_platform == 'linux'"),
    ),
    "nvidia_cuda_nvcc-13.0.88": ({"nvidia/cu13/bin/nvcc": ""}, ()),
    "pip-26.3": ({"pip/__init__.py": "", "pip/__main__.py": BUILDING_PIP}, ()),
    "uv-0.13.9": ({"uv-0.13.9.data/scripts/uv": '#!/bin/bash\nexec "$REAL_UV" "$@"\n'}, ()),
}
ENGINE = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""}


def write_wheel(
    folder: Path, name: str, files: dict[str, str], requires=(), tag="py3-none-any"
) -> Path:
    """A wheel of a distribution ``alpha-1.0`` in ``folder``."""
    distribution, version = name.split("-")
    info = f"{distribution}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(
        f"{path},sha256={digest(text.encode())},{len(text)}\n" for path, text in files.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{distribution}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            entry = zipfile.ZipInfo(member)
            entry.external_attr = 0o100755 << 16
            wheel.writestr(entry, text)
    return path


def digest(content: bytes) -> str:
    """As RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def write_index(folder: Path) -> None:
    """Pages of package files in ``folder`` with their hashes, as an index serves them (PEP 503)."""
    for package in folder.iterdir():
        links = [
            f'<a href="{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">{file.name}</a>'
            for file in sorted(package.iterdir())
        ]
        (package / "index.html").write_text("\n".join(links))


class Index(SimpleHTTPRequestHandler):
    """Serves packages; below /stalled/, wheels never come."""

    def do_GET(self) -> None:
        stalled = self.path.startswith("/stalled/")
        self.path = self.path.removeprefix("/stalled")
        if stalled and self.path.endswith(".whl"):
            time.sleep(60)
        super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An index, and a project locked against it: (folder, address)."""
    folder = tmp_path_factory.mktemp("world")
    for name, content in WHEELS.items():
        write_wheel(folder / "simple" / name.split("-")[0].replace("_", "-"), name, *content)
    files, _ = WHEELS["torch-2.11.0"]
    write_wheel(folder / "cpu" / "torch", "torch-2.11.0+cpu", files, ("sympy",))
    write_sdist(folder / "simple" / "transformer-engine-torch")
    for index in ("simple", "cpu"):
        write_index(folder / index)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "pyproject.toml").write_text(PINS)
    lock(folder, f"http://127.0.0.1:{server.server_port}/simple", folder / "cache")
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def write_sdist(folder: Path) -> None:
    """Transformer Engine's extension as source, which tells its requirements without a build."""
    folder.mkdir(parents=True)
    name = "transformer_engine_torch-2.19.0"
    metadata = "Metadata-Version: 2.2\nName: transformer-engine-torch\nVersion: 2.19.0\nRequires-Dist: beta\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "no_such_backend"\n'
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
        for member, text in {"PKG-INFO": metadata, "pyproject.toml": project}.items():
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


def lock(project: Path, index: str, cache: Path) -> None:
    subprocess.run(
        [UV, "lock", "--quiet", "--python", sys.executable],
        cwd=project,
        env=os.environ | {"UV_DEFAULT_INDEX": index, "UV_CACHE_DIR": str(cache)},
        check=True,
    )


class Repository:
    """A copy of what the set-up is made of, with small pins."""

    def __init__(self, path: Path, world: tuple[Path, str]):
        folder, self.address = world
        self.path, self.fakes, self.uv_cache = path / "repository", path / "fakes", folder / "cache"
        modules = ("__init__", "errors", "system/__init__", "system/streams")
        modules += tuple(f"machine/{name}" for name in ("__init__", "stages", "setup", "upstream"))
        scripts = ("scripts/setup.sh", "scripts/setup-gpu.sh")
        for file in (*scripts, *(f"harness/{module}.py" for module in modules)):
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.path / file)
        for file in ("pyproject.toml", "uv.lock"):
            shutil.copy(folder / file, self.path / file)
        self.fakes.mkdir()
        self.python("python3.12", f'exec {Path(sys.executable).resolve()} "$@"')
        self.python("uv", f'exec {UV} "$@"')
        engine = write_wheel(
            path / "engine",
            "transformer_engine_torch-2.19.0",
            ENGINE,
            ("beta",),
            f"cp3{sys.version_info[1]}-none-any",
        )
        self.environment = {
            "PATH": f"{self.fakes}:/usr/bin:/bin",
            "HOME": str(path),
            "CALLS": str(self.fakes / "calls"),
            "REAL_UV": UV,
            "ENGINE_WHEEL": str(engine),
            "UV_CACHE_DIR": str(folder / "cache"),
            "UV_DEFAULT_INDEX": f"{self.address}/simple",
            "UV_HTTP_RETRIES": "0",
            "DEVICE": "cpu",
            "TORCH_INDEX": f"{self.address}/cpu",
        }

    def python(self, name: str, script: str) -> Path:
        """Put a program on the PATH that notes each start."""
        file = self.fakes / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.fakes}/calls\n{script}\n')
        file.chmod(0o755)
        return file

    def start(
        self, *words: str, script: str = "setup.sh", **environment: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.path / "scripts" / script, *words],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *words: str, script: str = "setup.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, script=script, **environment)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self, containing: str = "") -> list[str]:
        """Starts of Python, of uv and of the pip that builds."""
        file = self.fakes / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if containing in line]

    @property
    def venv(self) -> Path:
        return self.path / ".venv"

    @property
    def site(self) -> Path:
        return next(self.venv.glob("lib/python3*/site-packages"), self.venv / "none")


@pytest.fixture
def repository(tmp_path, world):
    return Repository(tmp_path, world)


def test_first_call_installs_and_a_second_starts_nothing(repository):
    first = repository.run("light", "--", "-c", "print('ran')")
    assert (first.returncode, first.stdout) == (0, "ran\n"), first.stderr
    assert "light: ready" in first.stderr
    before = repository.calls()
    second = repository.run("light", "--", "-c", "print('ran')")
    assert (second.returncode, second.stdout, second.stderr) == (0, "ran\n", "")
    assert repository.calls() == before


def test_the_command_finds_the_environment_first_and_its_status_is_kept(repository):
    said = repository.run(
        "light", "--", "-c", "import os, sys; print(os.environ['PATH']); sys.exit(7)"
    )
    assert said.returncode == 7
    assert said.stdout.startswith(f"{repository.venv}/bin:")


def test_stages_are_added_one_by_one(repository):
    for stages_due in (["heavy"], ["light", "gpu-build"]):
        assert repository.run(*stages_due).returncode == 0
    assert {path.name for path in repository.venv.glob("*.stamp")} == {
        f"stage-{stage}.stamp" for stage in ("heavy", "light", "gpu-build")
    }
    before = repository.calls()
    assert repository.run("heavy", "light", "gpu-build").stderr == ""
    assert repository.calls() == before


def test_no_python(repository):
    repository.python("python3.12", "exit 1")
    repository.python("python3", "echo 'is Python 3.9' >&2; exit 1")
    repository.python("uv", "echo no network >&2; [[ $2 == dir ]]")
    said = repository.run("light", PATH=f"{repository.fakes}:{tools(repository)}")
    assert said.returncode == 2
    assert "no Python 3.12 or 3.13" in said.stderr
    assert f"{repository.fakes}/python3: is Python 3.9" in said.stderr
    assert "uv could not download one: no network" in said.stderr
    assert "pyenv install 3.12" in said.stderr
    assert not repository.venv.exists()


def tools(repository) -> Path:
    """A folder with the few commands that the script itself needs, and no Python."""
    folder = repository.fakes / "tools"
    folder.mkdir()
    names = "bash cksum env find grep mkdir mktemp mv nproc rm sed tail tee uname"
    for name in names.split():
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_python_of_pyenv_and_of_uv(repository):
    (repository.fakes / "python3.12").rename(repository.fakes / "real")
    bare = tools(repository)
    (repository.fakes / "uv").rename(bare / "uv-itself")
    managed = f'if [[ $2 == find ]]; then echo {repository.fakes}/real; else exec {UV} "$@"; fi'
    repository.python("uv", managed).rename(bare / "uv")
    assert repository.run("light", PATH=str(bare)).returncode == 0
    shutil.rmtree(repository.venv)
    (bare / "uv-itself").rename(bare / "uv")
    pyenv = repository.path / "pyenv/versions/3.12.1/bin"
    pyenv.mkdir(parents=True)
    (repository.fakes / "real").rename(pyenv / "python")
    pyenv_root = str(repository.path / "pyenv")
    said = repository.run("light", PATH=str(bare), PYENV_ROOT=pyenv_root)
    assert said.returncode == 0, said.stderr


def test_uv_brings_a_python_where_none_fits(repository):
    """Asked for the first time, uv has none; it downloads one."""
    real = repository.fakes / "real"
    (repository.fakes / "python3.12").rename(real)
    downloaded = repository.fakes / "downloaded"
    repository.python(
        "uv",
        f"""case "$1 $2" in
  "python install") : >{downloaded} ;;
  "python find") [[ -e {downloaded} ]] && echo {real} ;;
  *) exec {UV} "$@" ;;
esac""",
    )
    said = repository.run("light", PATH=f"{repository.fakes}:{tools(repository)}")
    assert said.returncode == 0, said.stderr
    assert "uv downloads one" in said.stderr


def test_wrong_python_named(repository):
    old = repository.python("python3.9", "echo 'is Python 3.9' >&2; exit 1")
    said = repository.run("light", PYTHON=str(old))
    assert said.returncode == 2
    assert f"PYTHON={old}" in said.stderr and "is Python 3.9" in said.stderr


def test_uv_comes_from_pypi_where_the_path_has_none(repository):
    (repository.fakes / "uv").unlink()
    bare = f"{repository.fakes}:{tools(repository)}"
    index = {"PIP_INDEX_URL": f"{repository.address}/simple", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    assert repository.run("light", PATH=bare, **index).returncode == 0
    assert (repository.venv / "uv").exists()
    shutil.rmtree(repository.site)
    assert repository.run("light", PATH=bare, PIP_INDEX_URL="http://127.0.0.1:9").returncode == 0
    assert (repository.venv / "uv").exists()


def test_uv_that_is_too_old_is_passed_over(repository):
    repository.python("uv", "echo 'Required uv version' >&2; exit 2")
    index = {"PIP_INDEX_URL": f"{repository.address}/simple"}
    said = repository.run("light", PATH=f"{repository.fakes}:{tools(repository)}", **index)
    assert said.returncode == 0, said.stderr


def test_uv_that_cannot_be_had_is_one_error(repository):
    (repository.fakes / "uv").unlink()
    bare = f"{repository.fakes}:{tools(repository)}"
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    said = repository.run("light", PATH=bare, **offline)
    assert said.returncode == 2
    assert said.stderr.count("error: ") == 1
    assert "no uv on the PATH" in said.stderr and "VENV=0" in said.stderr


def test_pips_index_serves_uv(repository):
    """Behind a mirror, pip's settings name it."""
    del repository.environment["UV_DEFAULT_INDEX"]
    said = repository.run("light", PIP_INDEX_URL=f"{repository.address}/simple")
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_set_up_is_redone(repository, tmp_path, how):
    stalled = {
        "UV_DEFAULT_INDEX": f"{repository.address}/stalled/simple",
        "UV_CACHE_DIR": str(tmp_path / "empty"),
    }
    process = repository.start("light", **stalled)
    wait_for(lambda: repository.calls("uv pip install"))
    os.killpg(process.pid, how)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "Traceback" not in err
    assert not list(repository.venv.glob("*.stamp"))
    said = repository.run("light", "--", "-c", "1")
    assert said.returncode == 0, said.stderr
    assert (repository.site / "alpha-1.0.dist-info/RECORD").exists()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def test_changed_pin_is_installed(repository):
    repository.run("light")
    project = repository.path / "pyproject.toml"
    project.write_text(PINS.replace("alpha==1.0", "alpha==2.0"))
    lock(repository.path, repository.environment["UV_DEFAULT_INDEX"], repository.uv_cache)
    said = repository.run("light")
    assert said.returncode == 0, said.stderr
    assert (repository.site / "alpha-2.0.dist-info").exists()
    project.write_text(project.read_text().replace("key = 1", "key = 2"))
    calls = repository.calls()
    assert repository.run("light").stderr == ""
    assert repository.calls() == calls, "a setting elsewhere in pyproject.toml is no pin"


def test_a_pin_that_uv_lock_does_not_have_is_refused(repository):
    project = repository.path / "pyproject.toml"
    project.write_text(PINS.replace("alpha==1.0", "alpha==2.0"))
    said = repository.run("light")
    assert said.returncode == 2
    assert "alpha==2.0" in said.stderr and "uv lock" in said.stderr


@pytest.mark.parametrize("deleted", ["bin/python", "alpha-1.0.dist-info", "alpha/__init__.py", "."])
def test_broken_environment_is_mended(repository, deleted):
    repository.run("light")
    path = (repository.venv if deleted.startswith("bin") else repository.site) / deleted
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = repository.run("light", "--", "-c", "1")
    assert said.returncode == 0, said.stderr
    assert path.exists()


def test_a_half_copied_file_is_replaced(repository):
    repository.run("light", "heavy")
    module = repository.site / "alpha/__init__.py"
    module.unlink()  # the cache shares its content
    module.write_text("import o")
    (repository.venv / "stage-light.stamp").unlink()
    assert repository.run("light").returncode == 0
    assert module.read_text() == BREAKABLE
    assert not (repository.venv / "stage-heavy.stamp").exists(), "checked again, too"


def test_what_does_not_import_is_made_anew_once(repository):
    repository.run("light")
    (repository.venv / "stage-light.stamp").unlink()
    broken = repository.path / "broken"
    broken.touch()
    said = repository.run("light", BROKEN=str(broken))
    assert said.returncode == 0, said.stderr
    assert "half a file; making" in said.stderr
    shutil.rmtree(repository.venv)
    repository.path.joinpath("always").touch()
    said = repository.run("light", BROKEN="always")
    assert said.returncode == 2
    assert "half a file" in said.stderr
    assert said.stderr.count("making") == 1


def test_without_a_network_says_why_and_leaves_the_light_stage(repository, tmp_path):
    repository.run("light")
    offline = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9", "UV_CACHE_DIR": str(tmp_path / "empty")}
    said = repository.run("heavy", TORCH_INDEX="", DEVICE="cuda", **offline)
    assert said.returncode == 2
    assert said.stderr.count("error: ") == 1
    assert "cannot be reached" in said.stderr and "setup.log" in said.stderr
    assert repository.run("light").stderr == ""


@pytest.mark.parametrize(
    ("printed", "advice"),
    [
        ("error: Failed to fetch: `http://h/torch`\n  cause: dns error", "cannot be reached"),
        ("error: Failed to install\n  cause: No space left on device (os error 28)", "make room"),
        ("error: alpha was not found in the package registry", "lacks a pinned version"),
        ("error: Hash mismatch for `alpha==1.0`", "another file than uv.lock"),
    ],
)
def test_advice_fits_what_uv_prints(tmp_path, printed, advice):
    uv = setup.Uv("uv", stages.Venv(tmp_path), 0)
    uv.log.write_text(printed)
    assert advice in uv.advice() and str(uv.log) in uv.advice()


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 250 << 20)
    )
    with pytest.raises(UserError, match="has 250 MiB free, this set-up takes 300 MiB"):
        setup.check_disk(stages.Venv(tmp_path), "none")


@pytest.mark.parametrize(
    ("device", "given", "answers", "index"),
    [
        ("cpu", None, True, setup.CPU_INDEX),
        ("cpu", None, False, None),
        ("cuda", None, True, None),
        ("cuda", "https://mine", True, "https://mine"),
    ],
)
def test_where_torch_comes_from(monkeypatch, device, given, answers, index):
    """The CPU's wheels where no GPU is and their index answers; the ordinary ones otherwise."""
    monkeypatch.setattr(setup, "unreachable", lambda index: None if answers else "no route")
    monkeypatch.setenv("TORCH_INDEX", given or "")
    assert setup.torch_index(device) == index


def test_torch_of_pypi_where_the_other_index_has_none(repository):
    said = repository.run("heavy", TORCH_INDEX=f"{repository.address}/none")
    assert said.returncode == 0, said.stderr
    first, second = "did not give torch==2.11.0: taking PyPI's", "PyTorch for CUDA: download up to"
    assert said.stderr.rindex(second) > said.stderr.index(first)
    assert (repository.site / "torch-2.11.0.dist-info").exists()
    assert (repository.site / "triton-3.0.dist-info").exists()


def test_sizes_are_printed_before_anything_is_downloaded(repository, tmp_path):
    stalled = {
        "UV_DEFAULT_INDEX": f"{repository.address}/stalled/simple",
        "UV_CACHE_DIR": str(tmp_path / "empty"),
        "TORCH_INDEX": "",
        "DEVICE": "cuda",
    }
    process = repository.start("heavy", **stalled)
    assert "making" in process.stderr.readline()
    line = process.stderr.readline()
    assert "PyTorch for CUDA: download up to 2,700 MiB, 4,750 MiB in .venv" in line
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)


def test_why_an_index_cannot_be_reached(world):
    _, address = world
    assert setup.unreachable("http://127.0.0.1:9/whl/cpu", timeout_s=2) == "Connection refused"
    assert setup.unreachable(f"{address}/cpu") is None
    assert "404" in setup.unreachable(f"{address}/whl")


def test_progress_is_shown_against_the_total(tmp_path, capsys):
    uv = setup.Uv("uv", stages.Venv(tmp_path), 0, shown_s=0)
    for line in (
        "Downloading torch (506.1MiB)",
        "Downloading nvidia-cublas (1.5GiB)",
        "Downloading einops (512.0KiB)",
        " Downloaded torch",
    ):
        uv._see(line)
    assert uv.progress() == "setup: downloaded 506 of 2,043 MiB, waiting for nvidia-cublas, einops"
    assert len(capsys.readouterr().err.splitlines()) == 1, "in a pipe, a line every ten seconds"


def test_cuda_build_needs_more_disk_than_the_cpu_build():
    assert setup.DISK_MIB["none"] < setup.DISK_MIB["cpu"] < setup.DISK_MIB["cuda"]
    assert setup.SIZES_MIB["cpu"][1] <= 1500 < setup.SIZES_MIB["cuda"][1]
    for build, sizes in setup.SIZES_MIB.items():
        assert max(sizes) < setup.DISK_MIB[build]


@pytest.mark.parametrize("name", ["thesis.tex", "setup.py"])
def test_a_folder_that_is_something_else_is_left_alone(repository, name):
    mine = repository.path / "mine"
    mine.mkdir()
    (mine / name).touch()
    said = repository.run("light", VENV="mine")
    assert said.returncode == 2
    assert "no virtual environment" in said.stderr
    assert [path.name for path in mine.iterdir()] == [name]


def test_two_at_once_install_once(repository):
    both = [repository.start("light", "--", "-c", "print('ran')") for _ in range(2)]
    assert [p.communicate(timeout=30)[0] for p in both] == ["ran\n"] * 2
    assert len(repository.calls("uv pip install")) == 1


def test_another_python_named_remakes_the_environment(repository):
    repository.run("light")
    python = repository.venv / "bin/python"
    python.unlink()
    python.symlink_to(repository.python("other", f'exec {Path(sys.executable).resolve()} "$@"'))
    assert repository.run("light").stderr == "", "without PYTHON= what is there will do"
    named = str(Path(sys.executable).resolve())
    said = repository.run("light", PYTHON=named)
    assert said.returncode == 0 and "making" in said.stderr
    assert str(python.resolve()) == named
    assert repository.run("light", PYTHON=named).stderr == ""


def test_cpu_build_brings_none_of_cuda_and_is_replaced_where_a_gpu_is_used(repository):
    assert repository.run("heavy").returncode == 0
    assert (repository.site / "torch-2.11.0+cpu.dist-info").exists()
    assert (repository.site / "sympy-1.0.dist-info").exists()
    assert repository.run("gpu-build").returncode == 0
    assert not (repository.site / "triton-3.0.dist-info").exists()
    assert repository.run("heavy").stderr == ""
    said = repository.run("heavy", DEVICE="cuda", TORCH_INDEX="")
    assert said.returncode == 0, said.stderr
    assert [p.name for p in repository.site.glob("torch-*.dist-info")] == ["torch-2.11.0.dist-info"]
    assert (repository.site / "triton-3.0.dist-info").exists()
    assert repository.run("heavy").stderr == "", "CUDA's build also serves a machine without a GPU"


def test_venv_0_names_what_is_missing(repository):
    said = repository.run("heavy", VENV="0", PYTHON=sys.executable)
    assert said.returncode == 2
    assert "lacks alpha" in said.stderr and "pip install alpha==1.0" in said.stderr
    assert "beta" not in said.stderr, "runs do without"
    pins = PINS.replace("alpha==1.0", "json==1").replace("torch==2.11.0", "csv==1")
    repository.path.joinpath("pyproject.toml").write_text(pins)
    name_it = "import sys; print(sys.executable)"
    said = repository.run("heavy", "--", "-c", name_it, VENV="0", PYTHON=sys.executable)
    assert (said.returncode, said.stderr) == (0, "")
    assert Path(said.stdout.strip()) == Path(sys.executable)
    assert not repository.venv.exists()


def test_nvidias_container_uses_what_is_there(repository):
    said = repository.run("light", NVIDIA_PYTORCH_VERSION="25.09", PYTHON=sys.executable)
    assert "VENV=0 uses" in said.stderr
    assert not repository.venv.exists()
    assert repository.run("light", NVIDIA_PYTORCH_VERSION="25.09", VENV="own").returncode == 0


def test_venv_0_wrong_python(repository):
    repository.python("python3", "echo 'is Python 3.9' >&2; exit 1")
    said = repository.run("light", VENV="0", PATH=f"{repository.fakes}:{tools(repository)}")
    assert said.returncode == 2
    assert "VENV=0 PYTHON=/path/to/python3.12" in said.stderr


def set_up_gpu(repository, **environment):
    """Run scripts/setup-gpu.sh where a C++ compiler is."""
    compiler = repository.fakes / "c++"
    compiler.write_text("#!/bin/sh\necho 12\n")
    compiler.chmod(0o755)
    environment = {"TORCH_INDEX": "", "DEVICE": "cuda", "MAX_JOBS": "1", **environment}
    return repository.run(script="setup-gpu.sh", **environment)


def test_gpu_builds_transformer_engine_once_and_keeps_the_wheel(repository, tmp_path):
    said = set_up_gpu(repository)
    assert said.returncode == 0, said.stderr
    assert (repository.site / "transformer_engine_torch-2.19.0.dist-info").exists()
    assert list((tmp_path / ".cache/megatron-harness/torch-2.11.0-cu13").glob("*.whl"))
    built = repository.calls("pip wheel")
    assert (
        len(built) == 1
        and "transformer-engine-torch==2.19.0" in built[0]
        and "--no-build-isolation" in built[0]
    )
    shutil.rmtree(
        repository.venv / "lib/python3.12/site-packages/transformer_engine_torch-2.19.0.dist-info"
    )
    assert set_up_gpu(repository).returncode == 0
    assert repository.calls("pip wheel") == built


def test_gpu_takes_a_wheel_that_lies_somewhere_and_needs_no_compiler_then(repository, tmp_path):
    assert repository.run("light").returncode == 0
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(repository.environment["ENGINE_WHEEL"], kept)
    bare = f"{repository.fakes}:{tools(repository)}"
    without = repository.run(script="setup-gpu.sh", PATH=bare, TORCH_INDEX="", DEVICE="cuda")
    assert without.returncode == 2 and "no C++ compiler" in without.stderr
    said = repository.run(
        script="setup-gpu.sh", PATH=bare, TORCH_INDEX="", DEVICE="cuda", WHEELS=str(kept)
    )
    assert said.returncode == 0, said.stderr
    assert not repository.calls("pip wheel")


def test_gpu_with_an_old_driver(repository):
    smi = repository.fakes / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |'\n"
    )
    smi.chmod(0o755)
    said = set_up_gpu(repository)
    assert said.returncode == 2
    assert (
        "supports CUDA 12, torch 2.11.0 from PyPI needs 13" in said.stderr and "580" in said.stderr
    )
    assert not repository.venv.exists()


def test_gpu_build_that_fails_says_why(repository):
    repository.run("gpu-build", TORCH_INDEX="", DEVICE="cuda")
    said = set_up_gpu(repository, COMPILER="killed")
    assert said.returncode == 2
    assert "Killed signal terminated program cc1plus" in said.stderr and "MAX_JOBS=1" in said.stderr
    assert not repository.venv.joinpath("setup-gpu.stamp").exists()


def test_gpu_set_up_without_a_gpu_is_refused_unless_asked_for(repository):
    said = set_up_gpu(repository, DEVICE="")
    assert said.returncode == 2 and not repository.venv.exists()
    for word in ("no NVIDIA driver here", "2.5 GB", "10 minutes", "make setup-gpu DEVICE=cuda"):
        assert word in said.stderr, word
    assert set_up_gpu(repository, DEVICE="cuda").returncode == 0


def test_gpu_dry_run_only_prints(repository):
    said = set_up_gpu(repository, DRY_RUN="1", DEVICE="")
    assert said.returncode == 0, said.stderr
    commands = said.stdout.splitlines()
    assert commands[0] == "scripts/setup.sh heavy" and commands[-1].endswith("scripts/setup.sh gpu")
    assert not repository.venv.exists() and not repository.calls()


def test_gpu_in_a_container_names_what_is_missing(repository):
    said = set_up_gpu(repository, VENV="0", PYTHON=sys.executable)
    assert said.returncode == 2
    assert "lacks" in said.stderr and "transformer-engine-torch" in said.stderr


def test_unknown_stage(repository):
    said = repository.run("haevy")
    assert said.returncode == 2
    assert "did you mean heavy?" in said.stderr


def test_pins_are_exact_and_those_of_uv_lock():
    """make test does not run uv lock: this finds a pin changed without it."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    pinned = {r for group in groups.values() for r in group if isinstance(r, str)}
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", r) for r in pinned)
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {f"{package['name']}=={package['version']}" for package in packages}
    assert pinned - locked == set(), "run: uv lock"
    (project,) = [package for package in packages if package["name"] == "megatron-harness"]
    wanted = {
        group: {f"{d['name']}{d['specifier']}" for d in requirements}
        for group, requirements in project["metadata"]["requires-dev"].items()
    }
    assert wanted == {group: set(stages.requirements(group)) for group in groups}, "run: uv lock"


def test_pins_are_imported_by_names_that_exist():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    pinned = {r for group in groups for r in stages.requirements(group)}
    installed = {r for r in pinned if package_version(stages.distribution(r))}
    assert {r for r in installed if not find_spec(stages.module(r))} == set()


def test_lock_names_public_addresses_and_hashes_alone():
    text = (ROOT / "uv.lock").read_text()
    hosts = set(re.findall(r"https?://[^/\"]+", text))
    assert hosts == {"https://pypi.org", "https://files.pythonhosted.org"}
    files = re.findall(r"^ *(?:sdist = )?{ url = .*", text, re.MULTILINE)
    assert files and all('hash = "sha256:' in file for file in files)


def test_script_and_pyproject_want_the_same_python():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, high = re.search(
        r"\((\d, \d+)\) <= sys.version_info\[:2\] < \((\d, \d+)\)",
        (ROOT / "scripts/setup.sh").read_text(),
    ).groups()
    assert wanted == f">={low.replace(', ', '.')},<{high.replace(', ', '.')}"


def test_requirements_of_an_unknown_stage():
    with pytest.raises(UserError, match="light"):
        stages.requirements("ligth")
