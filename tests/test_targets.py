"""Make's front door: generated targets are fresh, one tab completes a name, words arrive as typed, mistakes are told."""

import inspect
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT, cli, commands
from harness.experiment.catalog import load_catalog
from harness.experiment.command_line import SETTINGS
from harness.make import targets, tutorial
from harness.planning.request import FOR_BATCH

BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
FULL_SIZE = [e.name for e in load_catalog().experiments if not e.half_of]
HALF_SIZE = [e for e in load_catalog().experiments if e.half_of]


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(
        ["make", *words], cwd=ROOT, text=True, capture_output=True, env={**clean, **environment}
    )


def test_targets_mk_is_fresh() -> None:
    assert targets.FILE.read_text() == targets.render(load_catalog()), (
        "stale: run `make targets` and commit the result"
    )


def bash_completes(typed: str) -> list[str]:
    script = rf"""
        source {BASH_COMPLETION}
        {{ _comp_load make || _completion_loader make; }} 2>/dev/null
        COMP_WORDS=(make {typed!r}); COMP_CWORD=1; COMP_LINE="make {typed}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
        $(complete -p make | sed 's/.*-F \([^ ]*\).*/\1/') make {typed!r} make
        printf '%s\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=ROOT, text=True, capture_output=True
    )
    return done.stdout.split()


@pytest.mark.skipif(not BASH_COMPLETION.exists(), reason="bash-completion is not installed")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_one_tab_completes_a_name_in_bash(name: str) -> None:
    assert bash_completes(name[:3]) == [name]


@pytest.mark.skipif(not BASH_COMPLETION.exists(), reason="bash-completion is not installed")
def test_other_targets_complete_in_bash() -> None:
    """Without scripts/completion.bash: of each command about an experiment, an example."""
    assert bash_completes("sh") == ["show-101"]
    assert sorted(bash_completes("half-4")) == sorted(
        f"half-{e.name}" for e in HALF_SIZE if e.chapter == 400
    )
    assert bash_completes("chapter-3") == ["chapter-300"]
    assert "help" in bash_completes("he")
    assert {*FULL_SIZE, "table", "help"} < {*bash_completes("")}
    assert len(bash_completes("")) < 2 * len(FULL_SIZE)


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(
    ("source", "typed", "completed"),
    [
        ("", "101", "101-gpt2xl-dp1-gbs1-bf16"),
        ("source scripts/completion.bash", "101", "101-gpt2xl-dp1-gbs1-bf16"),
        ("source scripts/completion.bash", "282h", "282h-gpt-22B-half-tp4-gbs8-len2048-sp"),
        ("source scripts/completion.bash", "show-10\t", "show-104"),
    ],
)
def test_one_tab_completes_a_name_in_zsh(
    tmp_path: Path, source: str, typed: str, completed: str
) -> None:
    """A real interactive zsh on a pseudo-terminal: type ``make 101``, press tab, read the line."""
    (tmp_path / ".zshrc").write_text(
        f"autoload -Uz compinit; compinit -u -d {tmp_path}/dump; {source}\nPS1='ready> '\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe("zsh", ["zsh", "-i"], {**os.environ, "ZDOTDIR": str(tmp_path), "TERM": "dumb"})
    try:
        read_until(terminal, "ready> ")
        os.write(terminal, f"make {typed}\t".encode())
        assert completed in read_until(terminal, completed)
    finally:
        os.write(terminal, b"\x03\x04exit\n")
        os.close(terminal)
        os.waitpid(pid, 0)


def ours_completes(typed: str, bash_completion: bool = False) -> list[str]:
    """What scripts/completion.bash offers, with and without bash-completion."""
    script = rf"""
        {f"source {BASH_COMPLETION}" if bash_completion else ""}
        source scripts/completion.bash
        COMP_WORDS=(make {typed!r}); COMP_CWORD=1; COMP_LINE="make {typed}"; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
        compopt() {{ echo "compopt $*" >&2; }}
        $(complete -p make | sed 's/.*-F \([^ ]*\).*/\1/') make {typed!r} make
        printf '%s\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=ROOT, text=True, capture_output=True
    )
    # a prefix alone is completed without a space behind it
    alone = done.stdout.endswith("-\n") and len(done.stdout.split()) == 1
    assert done.stderr == "compopt -o nospace\n" * alone
    return done.stdout.split()


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("101", ["101-gpt2xl-dp1-gbs1-bf16"]),
        ("282h", ["282h-gpt-22B-half-tp4-gbs8-len2048-sp"]),
        ("282", ["282-gpt-22B-tp8-gbs4-len2048-sp"]),
        ("half-282", ["half-282h-gpt-22B-half-tp4-gbs8-len2048-sp"]),
        ("129h", ["129h-gpt2xl-dp4-gbs80-zero2"]),
        ("train-", ["train-gpt3-345m"]),
        ("999h", []),
        ("s", ["setup", "setup-gpu", "show-", "speed-", "stop", "sweep"]),
        ("sh", ["show-"]),
        ("show-4", [f"show-{e.id}" for e in load_catalog().in_chapter(400)]),
        ("memory-62", [f"memory-{id_}" for id_ in range(620, 627)]),
        ("speed-12", [f"speed-{id_}" for id_ in ("121", "122", "124", "128", "129", "129h")]),
        ("half-4", [f"half-{e.name}" for e in HALF_SIZE if e.chapter == 400]),
        ("chapter-3", ["chapter-300"]),
        ("he", ["help"]),
    ],
)
def test_our_completion_offers_variants_once_their_prefix_is_typed(
    typed: str, completed: list[str]
) -> None:
    assert sorted(ours_completes(typed)) == sorted(completed)
    if typed[-1] == "h":
        assert all(
            make(name, "DRY_RUN=1").returncode == 0 for name in completed if name[0].isdigit()
        )


@pytest.mark.parametrize("bash_completion", [False, True])
def test_our_completion_offers_experiments_and_commands_first(bash_completion: bool) -> None:
    if bash_completion and not BASH_COMPLETION.exists():
        pytest.skip("bash-completion is not installed")
    offered = ours_completes("", bash_completion)
    assert {*FULL_SIZE} < {*offered} and {"table", "help", "show-", "half-", "data-"} < {*offered}
    assert len(offered) == len({*offered}) < len(FULL_SIZE) + 55
    assert not [name for name in offered if re.match(r"(show|half|data)-.", name)]


def read_until(terminal: int, wanted: str, seconds: float = 30) -> str:
    seen, deadline = "", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:
                break
    return seen


@pytest.mark.parametrize("target", ["101", "101-gpt2xl-dp1-gbs1-bf16"])
def test_the_short_and_the_long_target_run_the_same(target: str) -> None:
    done = make("-n", target, "STEPS=20")
    assert done.returncode == 0
    assert re.fullmatch(
        r"scripts/setup\.sh light -- -m harness (?:run|target) '?101(-gpt2xl-dp1-gbs1-bf16)?'? +--given +'STEPS' *\n",
        done.stdout,
    )


@pytest.fixture(scope="module")
def front_door(tmp_path_factory):
    """``make`` in a copy of the front door, where set-up is replaced by a script that prints what would reach the harness.

    Called with make's arguments, and environment variables; gives that list of words, None where make stopped before. Whatever
    was executed on the way is to leave a file, ``touched``.
    """
    home = tmp_path_factory.mktemp("front door")
    for name in ("Makefile", "experiments/targets.mk"):
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    (home / "scripts").mkdir()
    fake = home / "scripts" / "setup.sh"
    fake.write_text(
        f"#!{sys.executable} -IS\nimport json, os, sys\nprint(json.dumps([sys.argv[sys.argv.index('harness') + 1:], {{**os.environ}}]))"
    )
    fake.chmod(0o755)
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("MAKE") and k not in ("MFLAGS", *(s.key for s in SETTINGS))
    }

    def call(*words: str, **environment: str) -> list[str] | None:
        done = subprocess.run(
            ["make", "-i", *words],
            cwd=home,
            text=True,
            capture_output=True,
            env={**clean, **environment},
        )
        assert not (home / "touched").exists(), (words, environment)
        assert {path.name for path in home.iterdir()} == {"Makefile", "experiments", "scripts"}
        if not done.stdout.startswith("["):
            return None
        words, passed = json.loads(done.stdout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", passed)
            return cli.given(words)

    return call


HOSTILE = [
    "$(shell touch touched)", "${shell touch touched}", "`touch touched`", "$(touch touched)", "'; touch touched; '", '"; touch touched; "',
    "; touch touched", "& touch touched &", "| touch touched", "a\ntouch touched\nb", "'\ntouch touched\n'", "\\", "\\\ntouch touched", "$$(touch touched)",
    "$$$(shell touch touched)", "$@ $< $(MAKE)", "# touched", "a#b", "-n", "--given", "--eval=$(shell touch touched)", "  ", "two  words ", "åäö 数 \u202e",
    "*", "~", "%", "!touched", "${IFS}", "$IFS", "{a,b}", "<touched", ">touched", ":=", "=", "a=b", "\t\x1b[31m", "\udcff",
    "$(eval X:=$(shell touch touched))", "$(call quoted,x)", "endef", "undefine SETTINGS", "$(error touched)", "$(file >touched)",
]  # fmt: skip


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(
    ("target", "command", "name"),
    [
        ("101", ["target", "101"], "run"),
        ("data-prepare", ["data-prepare"], "data-prepare"),
        ("verify-101", ["verify", "101"], "verify"),
    ],
)
def test_values_arrive_as_typed_and_nothing_executes(
    front_door, target: str, command: list[str], name: str, turn: int
) -> None:
    """Every setting, with another of these values in each turn; on the command line, then in the environment."""
    keys = commands.COMMANDS[name].keys
    values = {
        key: HOSTILE[(place * 5 + turn * 11) % len(HOSTILE)] for place, key in enumerate(keys)
    }
    assert {*values.values()} == {*HOSTILE} or len(keys) < len(HOSTILE)
    # make itself drops blanks behind the first =
    arrived = front_door(
        target,
        *(f"{key}={value}" for key, value in values.items()),
        f"VENV={HOSTILE[turn]}",
        f"NCCL_X={HOSTILE[-turn]}",
    )
    assert arrived == [
        *command,
        *(f"{key}={value.lstrip(' ' + chr(9))}" for key, value in values.items() if value.strip()),
    ]
    arrived = front_door(target, **values)
    assert arrived == [*command, *(f"{key}={value}" for key, value in values.items())]


@pytest.mark.parametrize("name", [
    "WORDS", "NAMES", "GIVEN", "PLAIN", "LETTERS", "without_letters", "quoted", "LINE_BREAK", "HELP", "LAST", "UNKNOWN", "PASSED", "EXPORTED", "FILES",
    "SETTINGS", "HARNESS", "TAKES", "CHECKED", "PIPED", "SHELL", ".SHELLFLAGS", ".DEFAULT_GOAL", ".RECIPEPREFIX", "MAKE", "MAKEFLAGS",
    "MAKECMDGOALS", "CURDIR", "VPATH", "with-dash", "STEP",
])  # fmt: skip
def test_what_is_no_setting_is_told_by_name_and_nothing_executes(front_door, name: str) -> None:
    """Also the Makefile's own variables, and make's."""
    for target, value in (
        ("101", "$(shell touch touched)"),
        ("help", "'; touch touched; '"),
        ("list", "; touch touched;"),
    ):
        words = front_door(target, f"{name}={value}")
        assert words is None or [word for word in words if word.startswith(f"{name}=")], (
            target,
            value,
        )


@pytest.mark.parametrize(
    "target",
    [
        "101'; touch touched; '",
        '101"; touch touched; "',
        "101; touch touched",
        "`touch touched`",
        "$$touch",
        "data-'; touch touched; '",
        "a\ntouch touched\n",
        "'\ntouch touched\n'",
        "\\",
        "é",
        "a b",
        "*",
        "-n",
        "&touch touched",
        "#",
    ],
)
def test_a_target_arrives_as_typed_and_nothing_executes(front_door, target: str) -> None:
    assert front_door("--", target) == ["target", target.replace("\n", " ")]
    front_door("--", f"$(shell touch touched){target}")


def test_settings_in_the_environment_count_too() -> None:
    assert "'STEPS'" in make("-n", "101", STEPS="7").stdout


@pytest.mark.parametrize(
    "word, near", [("STEP=3", "STEPS"), ("tp=2", "TP"), ("CHAPTER=100", ""), ("zzz=1", "make help")]
)
def test_no_word_of_the_command_line_is_ignored(word: str, near: str) -> None:
    done = make("101", word, "DRY_RUN=1")
    assert (
        done.returncode == 2
        and f"unknown setting {word.split('=')[0]}" in done.stderr
        and near in done.stderr
    )


def test_variables_of_the_environment_may_stand_on_the_command_line() -> None:
    assert "NCCL_DEBUG" not in make("-n", "101", "NCCL_DEBUG=INFO").stdout


@pytest.mark.parametrize(
    "target, said",
    [
        ("show-999", "no experiment 999; nearest ids"),
        ("memory-999", "no experiment 999; nearest ids"),
        ("speed-999", "no experiment 999; nearest ids"),
        ("faster-999", "no experiment 999; nearest ids"),
        ("gpus-999", "no experiment 999; nearest ids"),
        ("tabel", "did you mean table?"),
        ("chapter-990", "did you mean chapter-900, chapter-100"),
        ("speed", "did you mean speed-101"),
        ("1O1", "no experiment 1O1"),
        ("data-openwebtext", "did you mean data-openwebtext-10k"),
        ("qqqq", "no target qqqq\nmake list"),
    ],
)
def test_a_target_that_is_none_gets_the_nearest(target: str, said: str) -> None:
    done = make(target)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "half-282h",
        "half-282",
        "282h",
        "half-282h-gpt-22B-half-tp4-gbs8-len2048-sp",
        "282h-gpt-22B-half-tp4-gbs8-len2048-sp",
    ],
)
def test_half_the_size_goes_by_each_of_its_names(name: str) -> None:
    done = make(name, "DRY_RUN=1", "DEVICE=cuda")
    assert done.returncode == 0 and "# 282h-gpt-22B-half-tp4-gbs8-len2048-sp:" in done.stdout, (
        done.stderr
    )


@pytest.mark.parametrize(
    "old, now",
    [
        ("install-dependencies", "make setup"),
        ("prepare-ds-openwebtext-10k", "make data-openwebtext-10k"),
        ("show-arguments", "make arguments"),
        ("count-arguments", "make arguments | tail -n 1"),
        ("profile-282-gpt-22B-tp8-gbs4-len2048-sp", "make 282 PROFILE=1"),
        ("profile-283", "make 283 PROFILE=1"),
        ("train-gpt3-345m-1gpu-x-model-parallelism", "make 601"),
        ("130-gpt2xl-dp8-zero2-fit-param", "make 128 ARGS='--num-layers 60'"),
    ],
)
def test_what_the_tutorials_call_otherwise(old: str, now: str) -> None:
    assert tutorial.replacement(old) == now


def test_every_name_of_the_tutorials_is_a_target_or_has_a_replacement() -> None:
    """The targets of that Makefile in all its commits, experiments of this catalogue left out."""
    names = [
        "install-dependencies",
        "prepare-ds-openwebtext-10k",
        "show-arguments",
        "count-arguments",
        "how-to-recompute-activation",
        "profile-282-gpt-22B-tp8-gbs4-len2048-sp",
        "profile-283-gpt-22B-tp8-gbs4-len2048-ra",
        "129-gpt2xl-dp8-zero2-fit-gbs",
        "130-gpt2xl-dp8-zero2-fit-param",
    ]
    assert all(tutorial.replacement(name) for name in names)
    assert not [
        e.name
        for e in load_catalog().experiments
        if tutorial.replacement(e.name) or tutorial.replacement(e.id)
    ]


def test_a_name_of_the_tutorials_runs_what_stands_for_it() -> None:
    done = make("profile-282-gpt-22B-tp8-gbs4-len2048-sp", "DRY_RUN=1", "DEVICE=cuda", "STEPS=30")
    assert (
        done.returncode == 0
        and "here: make 282 PROFILE=1" in done.stderr
        and "--train-iters 30" in done.stdout
        and "HARNESS_PROFILE=8-9" in done.stdout
    )
    recomputes = make("how-to-recompute-activation")
    changed = [line for line in recomputes.stdout.splitlines() if line[:1] in "+-"]
    assert recomputes.returncode == 0 and any("--sequence-parallel" in line for line in changed)
    assert any(line.startswith("+") and "--recompute-granularity full" in line for line in changed)


@pytest.mark.parametrize(
    "name, near",
    [("train-cp2-gpt2-large-2gpu", "make 302"), ("train-sp2-gpt2-large-2gpu", "make 232 SP=1")],
)
def test_a_model_that_is_not_in_the_catalogue_gets_the_nearest_experiment(
    name: str, near: str
) -> None:
    done = make(name)
    assert done.returncode == 2 and near in done.stderr and "gpt2-large" in done.stderr


def test_a_name_of_the_tutorials_that_takes_no_settings_says_so() -> None:
    done = make("how-to-recompute-activation", "STEPS=3")
    assert done.returncode == 2 and "takes no settings" in done.stderr


@pytest.mark.parametrize(
    "target, near", [("tests", "test"), ("data", "data-list"), ("scripts", ""), ("experiments", "")]
)
def test_a_file_of_that_name_makes_no_target(target: str, near: str) -> None:
    done = make(target)
    assert done.returncode == 2 and f"no target {target}" in done.stderr and near in done.stderr


def test_only_docs_is_both_a_target_and_a_folder() -> None:
    """The Makefile says that a file's name is no target, except of this one."""
    rules = set(
        re.findall(
            r"^([a-z0-9][\w.-]*):",
            (ROOT / "Makefile").read_text() + targets.FILE.read_text(),
            re.MULTILINE,
        )
    )
    assert {path.name for path in ROOT.iterdir()} & rules == {"docs"}


@pytest.fixture
def newer_catalog(tmp_path: Path, monkeypatch):
    """A catalogue with 991, which targets.mk does not have."""
    for path in (ROOT / "experiments").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "990-new.yaml").write_text(
        "chapter: 990\ntitle: New\nexperiments:\n"
        "  991: {slug: new, model: gpt2-xl, mbs: 1, gbs: 1, seq: 1024, shows: s}\n"
    )
    catalog = load_catalog(tmp_path)
    monkeypatch.setattr(targets, "load_catalog", lambda: catalog)
    return catalog


@pytest.mark.parametrize("target, ran", [
    ("991", ("run", "991")), ("991-new", ("run", "991")), *((f"{c}-991", (c, "991")) for c in targets.VARIANTS),
    ("speed-991-new", ("speed", "991")), ("chapter-990", ("chapter", "990")), ("half-282h", ("run", "282h")),
    ("train-gpt3-345m", ("train", "604")),
])  # fmt: skip
def test_a_row_newer_than_the_targets_gets_the_command_that_was_asked_for(
    newer_catalog, monkeypatch, target, ran
) -> None:
    called = []
    monkeypatch.setattr(
        commands.Command,
        "function",
        lambda self: lambda *given: called.append((self.name, *given)) or 0,
    )
    assert cli.main(["target", target, "STEPS=3"]) == 0
    assert called == [(*ran, {"STEPS": "3"})]


@pytest.mark.parametrize(
    "target, said",
    [
        ("speed-992", "no experiment 992; nearest ids"),
        ("speed991", "no target speed991; did you mean speed-"),
        ("sped-991", "did you mean speed-"),
        ("half-991", "no experiment 991h"),
        ("show-991-old", "no experiment is called 991-old; 991 is 991-new"),
        ("chapter-998", "no target chapter-998"),
        ("train-gpt2-xl", "no target train-gpt2-xl"),
        ("run-991", "no target run-991"),
        ("show-", "no target show-"),
        ("", "no target"),
        ("clean-991", "no target clean-991"),
    ],
)
def test_what_is_no_target_runs_nothing(newer_catalog, monkeypatch, capsys, target, said) -> None:
    monkeypatch.setattr(commands.Command, "function", lambda self: pytest.fail("it ran"))
    assert cli.main(["target", target]) == 2
    assert said in capsys.readouterr().err


def test_make_alone_is_one_screen() -> None:
    lines = make().stdout.splitlines()
    assert len(lines) <= 57 and "make help" in lines[-1]
    assert any(line.startswith("  make list ") for line in lines) and not any(
        "STEPS=20" in line for line in lines
    )


def test_variables_exported_for_other_programs_ask_for_nothing_by_themselves() -> None:
    """Typed, or where WANDB=, SLURM= or K8S= is given, they are meant."""
    assert "WANDB" not in make("-n", "101", WANDB_PROJECT="other").stdout
    assert "'WANDB_PROJECT'" in make("-n", "101", "WANDB_PROJECT=mine").stdout
    assert "'WANDB_PROJECT'" in make("-n", "101", "WANDB=offline", WANDB_PROJECT="other").stdout
    for batch, keys in FOR_BATCH.items():
        exported = dict.fromkeys(keys, "of-the-cluster")
        alone = make("-n", "101", **exported).stdout
        meant = make("-n", "101", f"{batch}=1", **exported).stdout
        typed = make("-n", "101", *(f"{key}=typed" for key in keys)).stdout
        for key in keys:
            assert f"'{key}'" not in alone and f"'{key}'" in meant and f"'{key}'" in typed


def test_help_lists_every_command_and_setting() -> None:
    done = make("help")
    assert done.returncode == 0
    for command in commands.COMMANDS.values():
        line = f"  make {command.target if command.name != 'run' else '101':15} {command.does}"
        assert not command.does or line in done.stdout, line
        assert not command.does or command.usage in done.stdout
    for setting in SETTINGS:
        assert f"  {setting.key}={setting.example}" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("command", commands.COMMANDS.values(), ids=lambda command: command.name)
def test_a_command_has_the_function_or_the_recipe_that_it_declares(
    command: commands.Command,
) -> None:
    if not command.where:
        assert make("-n", command.name).stdout
        return
    try:
        function = command.function()
    except ImportError as error:
        pytest.skip(f"the set-up stage of {error.name} is not installed")
    needed = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    ]
    assert len(needed) == bool(command.about) + bool(command.keys)


def test_keys_of_a_command_are_read_from_its_usage() -> None:
    usage = 'RUN=a|WEIGHTS=b PROMPT="… …" NAME=<name> [FORMAT=csv|json] [TOP_K=4]'
    command = commands.Command("x", usage=usage, general="OUTDIR DEVICE")
    own = ("RUN", "WEIGHTS", "PROMPT", "NAME", "FORMAT", "TOP_K")
    assert command.keys == (*own, "OUTDIR", "DEVICE") and command.required == ("PROMPT",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parity", "TP=2"), "make parity does not take TP=2\nmake parity takes no settings"),
        (("doctor", "X=1"), "unknown setting X; make help lists all"),
        (
            ("table", "STEPS=3", "ID=101"),
            "make table does not take STEPS=3\nmake table takes CHAPTER",
        ),
        (("data-list", "FORCE=1"), "make data-list does not take FORCE=1"),
        (("data-openwebtext-10k", "TP=2"), "make data-openwebtext-10k does not take TP=2"),
        (("show-408", "RUN=x"), "unknown setting RUN"),
        (("lint", "TP=2"), "make lint does not take TP=2"),
        (("setup", "STEPS=3"), "make setup does not take STEPS=3\nmake setup takes DEVICE"),
        (("clean-all", "TP=2"), "make clean does not take TP=2"),
        (("help", "X=1"), "unknown setting X"),
    ],
)
def test_a_setting_of_another_command_is_refused_before_anything_runs(
    words: tuple[str, ...], said: str
) -> None:
    done = make(*words)
    assert done.returncode == 2 and f"error: {said}" in done.stderr and not done.stdout


def test_exported_settings_reach_only_the_commands_that_take_them() -> None:
    assert "STEPS" not in make("-n", "table", STEPS="7").stdout
    assert "'OUTDIR'" in make("-n", "table", OUTDIR="/runs").stdout
