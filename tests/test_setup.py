"""scripts/setup.sh end to end, with venv and pip replaced at the border by fakes that take milliseconds."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.machine import setup, stages

ROOT = Path(__file__).resolve().parent.parent
PINS = """[project]
name = "small"

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
]

[tool.other]
key = 1
"""

# Stands for the standard library's venv: an environment whose interpreter is the script below.
FAKE_VENV = """
import os, pathlib, sys
class EnvBuilder:
    def __init__(self, **options): pass
    def create(self, path):
        (path / "lib/python3.12/site-packages").mkdir(parents=True)
        (path / "bin").mkdir()
        home = pathlib.Path(sys._base_executable).parent
        version = "%d.%d.%d" % sys.version_info[:3]
        (path / "pyvenv.cfg").write_text(f"home = {home}\\nversion = {version}\\n")
        fake = path / "bin/python"
        fake.write_text(os.environ["FAKE_PYTHON"])
        fake.chmod(0o755)
"""

FAKE_PYTHON = f"""#!/bin/bash
site=${{0%/*}}/../lib/python3.12/site-packages
case "$*" in
  "-I -m pip "*) exec {sys.executable} "$FAKES/pip.py" "$site" "${{@:4}}" ;;
  "-I -c import pip") [[ -d $site ]] ;;
  "-I -c "*) exec {sys.executable} -I -S -c 'import sys; sys.path[:0] = [sys.argv[1]]; exec(sys.argv[2])' \\
    "$site" "$3" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""

FAKE_PIP = """
import os, pathlib, re, sys, time
site, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
with open(os.environ["FAKES"] + "/pip.log", "a") as log:
    print(*arguments, file=log)
mood = os.environ.get("PIP_MOOD", "")
if mood in ("network", "disk", "index"):
    print({"network": "WARNING: Retrying after 'NewConnectionError'\\nERROR: No matching distribution",
           "disk": "ERROR: [Errno 28] No space left on device",
           "index": "ERROR: No matching distribution found for alpha==1.0"}[mood])
    sys.exit(1)
if "wheel" == os.path.basename(arguments[0]):
    if mood == "compiler":
        print("c++: fatal error: Killed signal terminated program cc1plus")
        sys.exit(1)
    print("  [1/2] c++ one.cpp", "  [2/2] c++ two.cpp", sep="\\n")
    folder = pathlib.Path(arguments[arguments.index("--wheel-dir") + 1])
    (folder / "transformer_engine_torch-2.19.0-cp312-cp312-linux_x86_64.whl").touch()
    arguments = []
for word in arguments:
    if not (pinned := re.fullmatch(r"([a-z-]+)==([0-9.]+)", word)):
        continue
    name, version = pinned.groups()
    if name == "torch" and os.environ.get("TORCH_INDEX") and "--index-url" in arguments:
        version += "+cpu"
    folder = name.replace("-", "_")
    for old in site.glob(folder + "-*.dist-info"):
        if old.name.startswith(f"{folder}-{version.split('+')[0]}"):
            break
    else:
        print("Collecting", word, flush=True)
        info = site / f"{folder}-{version}.dist-info"
        info.mkdir()
        (site / name).mkdir(exist_ok=True)
        if mood == "hang":
            (info / "METADATA").touch()
            print("Installing collected packages: a, b", flush=True)
            time.sleep(60)
        code = "raise ImportError('half a file')" if mood == "broken" else ""
        (site / name / "__init__.py").write_text(code)
        (info / "RECORD").write_text(f"{name}/__init__.py,,0\\n{info.name}/RECORD,,\\n")
        if name == "nvidia-cuda-nvcc":
            (site / "nvidia/cu13").mkdir(parents=True)
        if name == "transformer-engine-torch":
            (site / "transformer_engine").mkdir(exist_ok=True)
            (site / "transformer_engine/pytorch.py").touch()
        if name == "torch":
            (site / "megatron/training").mkdir(parents=True, exist_ok=True)
            (site / "megatron/training/training.py").touch()
            (site / "torch/cuda.py").write_text("def is_available(): return False")
            (site / "torch/distributed.py").write_text("def is_gloo_available(): return True")
            (site / "torch/__init__.py").write_text("from . import cuda")
"""


class Repository:
    """A copy of what the set-up is made of, with small pins and faked tools."""

    def __init__(self, path: Path):
        self.path, self.fakes = path / "repository", path / "fakes"
        modules = (
            "__init__",
            "errors",
            "streams",
            *(f"machine/{name}" for name in ("__init__", "stages", "setup", "upstream")),
        )
        for file in (
            "scripts/setup.sh",
            "scripts/setup-gpu.sh",
            *(f"harness/{module}.py" for module in modules),
        ):
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.path / file)
        (self.path / "scripts/constraints.txt").touch()
        self.pins(PINS)
        self.fakes.mkdir()
        (self.fakes / "venv.py").write_text(FAKE_VENV)
        (self.fakes / "pip.py").write_text(FAKE_PIP)
        self.python("python3.12", f'exec {Path(sys.executable).resolve()} "$@"')
        self.environment = {
            "PATH": f"{self.fakes}:/usr/bin:/bin",
            "HOME": str(path),
            "PYTHONPATH": str(self.fakes),
            "FAKES": str(self.fakes),
            "FAKE_PYTHON": FAKE_PYTHON,
            "DEVICE": "cpu",
            "TORCH_INDEX": "https://index.invalid",
        }

    def pins(self, text: str) -> None:
        (self.path / "pyproject.toml").write_text(text)

    def python(self, name: str, script: str) -> Path:
        """Put an interpreter on the PATH that notes each start."""
        file = self.fakes / name
        file.write_text(f'#!/bin/bash\necho "$0" >>{self.fakes}/starts.log\n{script}\n')
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

    def log(self, name: str) -> list[str]:
        """Lines of ``pip`` (its calls) or ``starts`` (of interpreters)."""
        file = self.fakes / f"{name}.log"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def venv(self) -> Path:
        return self.path / ".venv"

    @property
    def site(self) -> Path:
        return self.venv / "lib/python3.12/site-packages"


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def test_first_call_installs_and_a_second_starts_nothing(repository):
    first = repository.run("light", "--", "-c", "print('ran')")
    assert (first.returncode, first.stdout) == (0, "ran\n"), first.stderr
    assert "light: ready" in first.stderr
    before = repository.log("pip"), repository.log("starts")
    second = repository.run("light", "--", "-c", "print('ran')")
    assert (second.returncode, second.stdout, second.stderr) == (0, "ran\n", "")
    assert (repository.log("pip"), repository.log("starts")) == before


def test_the_command_finds_the_environment_first_and_its_status_is_kept(repository):
    said = repository.run(
        "light", "--", "-c", "import os, sys; print(os.environ['PATH']); sys.exit(7)"
    )
    assert said.returncode == 7
    assert said.stdout.startswith(f"{repository.venv}/bin:")


def test_no_python(repository):
    repository.python("python3.12", "exit 1")
    repository.python("python3", "echo 'is Python 3.9' >&2; exit 1")
    said = repository.run("light", PATH=f"{repository.fakes}:{tools(repository)}")
    assert said.returncode == 2
    assert "no Python 3.12 or 3.13" in said.stderr
    assert f"{repository.fakes}/python3: is Python 3.9" in said.stderr
    assert "uv python install 3.12" in said.stderr
    assert not repository.venv.exists()


def tools(repository) -> Path:
    """A folder with the few commands the script itself needs, and no Python."""
    folder = repository.fakes / "tools"
    folder.mkdir()
    for name in ("bash", "env", "sed", "uname", "nproc", "mkdir", "tee", "grep"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_python_of_pyenv_and_of_uv(repository):
    (repository.fakes / "python3.12").rename(repository.fakes / "real")
    bare = tools(repository)
    said = repository.run("light", PATH=str(bare))
    assert said.returncode == 2
    repository.python("uv", f"echo {repository.fakes}/real")
    (repository.fakes / "uv").rename(bare / "uv")
    assert repository.run("light", PATH=str(bare)).returncode == 0
    shutil.rmtree(repository.venv)
    (bare / "uv").unlink()
    pyenv = repository.path / "pyenv/versions/3.12.1/bin"
    pyenv.mkdir(parents=True)
    (repository.fakes / "real").rename(pyenv / "python")
    assert (
        repository.run(
            "light", PATH=str(bare), PYENV_ROOT=str(repository.path / "pyenv")
        ).returncode
        == 0
    )


def test_wrong_python_named(repository):
    old = repository.python("python3.9", "echo 'is Python 3.9' >&2; exit 1")
    said = repository.run("light", PYTHON=str(old))
    assert said.returncode == 2
    assert f"PYTHON={old}" in said.stderr and "is Python 3.9" in said.stderr


def test_python_without_venv_is_passed_over(repository):
    bare = repository.fakes / "bare"
    bare.mkdir()
    (bare / "ensurepip.py").write_text("raise ImportError")
    real = Path(sys.executable).resolve()
    crippled = repository.python("python3.12", f'PYTHONPATH={bare} exec {real} "$@"')
    said = repository.run("light", PYTHON=str(crippled))
    assert said.returncode == 2
    assert re.search(r"comes without venv .*apt install python3\.1\d-venv", said.stderr)
    repository.python("python3", f'exec {real} "$@"')
    assert repository.run("light").returncode == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_set_up_is_redone(repository, how):
    process = repository.start("light", PIP_MOOD="hang")
    wait_for(lambda: (repository.site / "alpha-1.0.dist-info/METADATA").exists())
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
    repository.pins(PINS.replace("alpha==1.0", "alpha==2.0"))
    said = repository.run("light")
    assert said.returncode == 0, said.stderr
    assert "alpha==2.0" in repository.log("pip")[-1]
    repository.pins(PINS.replace("alpha==1.0", "alpha==2.0").replace("key = 1", "key = 2"))
    calls = len(repository.log("pip"))
    assert repository.run("light").stderr == ""
    assert len(repository.log("pip")) == calls, "a setting elsewhere in pyproject.toml is no pin"


@pytest.mark.parametrize(
    "deleted",
    [
        "bin/python",
        "lib/python3.12/site-packages/alpha-1.0.dist-info",
        "lib/python3.12/site-packages/alpha/__init__.py",
        "lib",
    ],
)
def test_broken_environment_is_mended(repository, deleted):
    repository.run("light")
    path = repository.venv / deleted
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = repository.run("light", "--", "-c", "1")
    assert said.returncode == 0, said.stderr
    assert path.exists()


def test_what_does_not_import_is_made_anew_once(repository):
    repository.run("light")
    (repository.site / "alpha/__init__.py").write_text("raise ImportError('half a file')")
    (repository.venv / "setup-light.stamp").unlink()
    said = repository.run("light")
    assert said.returncode == 0, said.stderr
    assert "half a file; making" in said.stderr
    shutil.rmtree(repository.venv)
    said = repository.run("light", PIP_MOOD="broken")
    assert said.returncode == 2
    assert "half a file" in said.stderr
    assert said.stderr.count("making") == 1


@pytest.mark.parametrize(
    ("mood", "advice"),
    [("network", "cannot be reached"), ("disk", "make room"), ("index", "lacks a pinned version")],
)
def test_failing_pip_says_why_and_leaves_the_light_stage(repository, mood, advice):
    repository.run("light")
    said = repository.run("heavy", PIP_MOOD=mood)
    assert said.returncode == 2
    assert advice in said.stderr and "setup-heavy.log" in said.stderr
    assert repository.run("light").stderr == ""


def test_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 250 << 20)
    )
    assert (
        setup.main(["install", "light", "--venv", str(tmp_path / "venv"), "--device", "cpu"]) == 2
    )
    assert "has 250 MiB free, this set-up takes 300 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "answers", "given", "indices"),
    [
        ("cpu", True, True, [setup.CPU_INDEX, None]),
        ("cpu", True, False, [setup.CPU_INDEX, None]),
        ("cpu", False, True, [None]),
        ("cuda", True, True, [None]),
    ],
)
def test_where_torch_comes_from(tmp_path, monkeypatch, device, answers, given, indices):
    """The CPU's wheels where no GPU is and their index answers; the ordinary ones otherwise, or if it has none."""
    calls = []

    def install(pip, *arguments):
        calls.append(
            arguments[arguments.index("--index-url") + 1] if "--index-url" in arguments else None
        )
        return given or calls[-1] is None

    monkeypatch.setattr(setup.Pip, "install", install)
    monkeypatch.setattr(setup, "unreachable", lambda index: None if answers else "no route")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 40))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    setup.install(stages.Venv(tmp_path), "heavy", device, lock=0)
    assert calls == indices


@pytest.mark.parametrize(
    ("answers", "given", "said"),
    [
        (True, True, ["with PyTorch for the CPU, about 260 MiB to download, 950 MiB in"]),
        (
            False,
            True,
            [
                "cannot be reached (no route): taking PyPI's",
                "with PyTorch for CUDA, about 2,700 MiB to download, 4,750 MiB in",
            ],
        ),
        (
            True,
            False,
            [
                "for the CPU, about 260 MiB",
                "did not give torch==2.11.0: taking PyPI's",
                "for CUDA, about 2,700 MiB",
            ],
        ),
    ],
)
def test_sizes_are_said_before_anything_is_downloaded(
    tmp_path, monkeypatch, capsys, answers, given, said
):
    def install(pip, *arguments):
        heard.append(capsys.readouterr().err)
        return given or "--index-url" not in arguments

    heard = []
    monkeypatch.setattr(setup.Pip, "install", install)
    monkeypatch.setattr(setup, "unreachable", lambda index: None if answers else "no route")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 40))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    setup.install(stages.Venv(tmp_path), "heavy", "cpu", lock=0)
    before = "".join(heard)
    assert [before.index(words) for words in said] == sorted(before.index(words) for words in said)
    assert said[0] in heard[0], "before pip's first call"


def test_why_an_index_cannot_be_reached(tmp_path):
    assert setup.unreachable("http://127.0.0.1:9/whl/cpu", timeout_s=2) == "Connection refused"
    (tmp_path / "torch").mkdir()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)
    ) as index:
        threading.Thread(target=index.serve_forever, daemon=True).start()
        assert setup.unreachable(f"http://127.0.0.1:{index.server_port}") is None
        assert "404" in setup.unreachable(f"http://127.0.0.1:{index.server_port}/whl")
        index.shutdown()


def test_progress_is_shown_against_the_total(tmp_path):
    pip = setup.Pip(stages.Venv(tmp_path), "heavy", 0, 2700)
    assert pip._downloaded(530.4) == "530 of about 2,700 MiB"
    assert pip._downloaded(2701) == "2,701 MiB", "no share above one"
    pip.total_mib = None
    assert pip._downloaded(12) == "12 MiB"


def test_every_stage_has_a_size():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert {*setup.DOWNLOADS_MIB} == {*groups} - {"core", "heavy", "gpu", "gpu-build"}
    assert setup.SIZES_MIB["cpu"][1] <= 1500 < setup.SIZES_MIB["cuda"][1]
    assert all(
        download < setup.DISK_MIB[build] and installed < setup.DISK_MIB[build]
        for build, (download, installed) in setup.SIZES_MIB.items()
    )


def test_cuda_build_wants_more_disk_than_the_cpu_build():
    assert setup.DISK_MIB["none"] < setup.DISK_MIB["cpu"] < setup.DISK_MIB["cuda"]


def test_a_folder_that_is_something_else_is_left_alone(repository):
    mine = repository.path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    said = repository.run("light", VENV="mine")
    assert said.returncode == 2
    assert "no virtual environment" in said.stderr
    assert (mine / "thesis.tex").exists()


def test_two_at_once_install_once(repository):
    both = [repository.start("light", "--", "-c", "print('ran')") for _ in range(2)]
    assert [p.communicate(timeout=30)[0] for p in both] == ["ran\n"] * 2
    assert len(repository.log("pip")) == 1


def test_another_python_named_remakes_the_environment(repository):
    repository.run("light")
    config = repository.venv / "pyvenv.cfg"
    config.write_text("home = /elsewhere\nversion = 3.13.0\n")
    assert repository.run("light").stderr == "", "without PYTHON= what is there will do"
    said = repository.run("light", PYTHON=str(repository.fakes / "python3.12"))
    assert said.returncode == 0 and "making" in said.stderr
    assert "/elsewhere" not in config.read_text()
    assert (
        "making" not in repository.run("light", PYTHON=str(repository.fakes / "python3.12")).stderr
    )


def test_cpu_build_is_replaced_where_a_gpu_is_used(repository):
    assert repository.run("heavy").returncode == 0
    assert (repository.site / "torch-2.11.0+cpu.dist-info").exists()
    assert repository.run("heavy").stderr == ""
    said = repository.run("heavy", DEVICE="cuda", TORCH_INDEX="")
    assert said.returncode == 0, said.stderr
    assert [p.name for p in repository.site.glob("torch-*.dist-info")] == ["torch-2.11.0.dist-info"]
    assert repository.run("heavy").stderr == "", "CUDA's build also serves a machine without a GPU"


def test_venv_0_names_what_is_missing(repository):
    said = repository.run("heavy", VENV="0", PYTHON=sys.executable)
    assert said.returncode == 2
    assert "lacks alpha" in said.stderr and "pip install alpha==1.0" in said.stderr
    assert "beta" not in said.stderr, "runs do without"
    repository.pins(PINS.replace("alpha==1.0", "json==1").replace("torch==2.11.0", "csv==1"))
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
    environment = {"TORCH_INDEX": "", "DEVICE": "cuda", **environment}
    return repository.run(script="setup-gpu.sh", **environment)


def test_gpu_builds_transformer_engine_once_and_keeps_the_wheel(repository, tmp_path):
    said = set_up_gpu(repository)
    assert said.returncode == 0, said.stderr
    assert (repository.site / "transformer_engine_torch-2.19.0.dist-info").exists()
    assert list((tmp_path / ".cache/megatron-harness/torch-2.11.0-cu13").glob("*.whl"))
    built = [call for call in repository.log("pip") if call.startswith("wheel")]
    assert (
        len(built) == 1
        and "transformer-engine-torch==2.19.0" in built[0]
        and "--no-build-isolation" in built[0]
    )
    shutil.rmtree(
        repository.venv / "lib/python3.12/site-packages/transformer_engine_torch-2.19.0.dist-info"
    )
    assert set_up_gpu(repository).returncode == 0
    assert [call for call in repository.log("pip") if call.startswith("wheel")] == built


def test_gpu_takes_a_wheel_that_lies_somewhere_and_needs_no_compiler_then(repository, tmp_path):
    assert repository.run("light").returncode == 0
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "transformer_engine_torch-2.19.0-cp312-cp312-linux_x86_64.whl").touch()
    bare = f"{repository.fakes}:{tools(repository)}"
    without = repository.run(script="setup-gpu.sh", PATH=bare, TORCH_INDEX="", DEVICE="cuda")
    assert without.returncode == 2 and "no C++ compiler" in without.stderr
    said = repository.run(
        script="setup-gpu.sh", PATH=bare, TORCH_INDEX="", DEVICE="cuda", WHEELS=str(kept)
    )
    assert said.returncode == 0, said.stderr
    assert not [call for call in repository.log("pip") if call.startswith("wheel")]


def test_gpu_with_an_old_driver(repository):
    smi = repository.fakes / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4 |'\n"
    )
    smi.chmod(0o755)
    said = set_up_gpu(repository)
    assert said.returncode == 2
    assert "speaks CUDA 12, torch 2.11.0 from PyPI wants 13" in said.stderr and "580" in said.stderr
    assert not repository.venv.exists()


def test_gpu_build_that_fails_says_why(repository):
    repository.run("gpu-build", TORCH_INDEX="", DEVICE="cuda")
    said = set_up_gpu(repository, PIP_MOOD="compiler")
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
    assert not repository.venv.exists() and not repository.log("pip")


def test_gpu_in_a_container_names_what_is_missing(repository):
    said = set_up_gpu(repository, VENV="0", PYTHON=sys.executable)
    assert said.returncode == 2
    assert "lacks" in said.stderr and "transformer-engine-torch" in said.stderr


def test_unknown_stage(repository):
    said = repository.run("haevy")
    assert said.returncode == 2
    assert "did you mean heavy?" in said.stderr


def test_pins_are_exact_and_in_one_place():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    pinned = {r for group in groups.values() for r in group if isinstance(r, str)}
    assert all(re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==[0-9.]+", r) for r in pinned)
    names = [stages.distribution(r) for r in pinned]
    constraints = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pulled_in = [stages.distribution(line) for line in constraints if not line.startswith("#")]
    assert len({*names, *pulled_in}) == len(names) + len(pulled_in)


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
