"""Secrets of ARGS= reach the run and nothing that is written or shown; control characters reach no terminal."""

import io
import json
import os
import pty
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from harness import ROOT, cli
from harness.errors import UserError
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.launching import slurm
from harness.planning.plan import plan
from harness.planning.script import shell_word
from harness.system import screen
from harness.system.masking import hide, mask, reveal

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown", "hidden"),
    [
        ("--wandb-api-key abc123 --lr 1e-4", "--wandb-api-key $1 --lr 1e-4", ["abc123"]),
        ("--hf-token=hf_abcdefghijkl", "--hf-token=$1", ["hf_abcdefghijkl"]),
        ("--a hf_abcdefghijkl --b hf_abcdefghijkl", "--a $1 --b $1", ["hf_abcdefghijkl"]),
        ("--data-path https://me:pa55w@host/x", "--data-path https://me:$1@host/x", ["pa55w"]),
        (
            "--url https://ghp_abcdefghijklmnopqrst@host/",
            "--url https://$1@host/",
            ["ghp_abcdefghijklmnopqrst"],
        ),
        ("--password 'a b' --api_key \"c'd\"", "--password $1 --api_key $2", ["a b", "c'd"]),
        (f"--x {KEY} --load /runs/{KEY}/x", f"--x $1 --load /runs/{KEY}/x", [KEY]),
        (f"WANDB_API_KEY={KEY}", "WANDB_API_KEY=$1", [KEY]),
        (
            "--secret s3 --token abcd --credentials c",
            "--secret $1 --token $2 --credentials $3",
            ["s3", "abcd", "c"],
        ),
        ("--fim-pad-token Q --tokenizer-type X --calculate-per-token-loss --tokens 5", None, []),
        ("--lr 1e-4 --split 949,50,1 --data-path a@b", None, []),
    ],
)
def test_a_secret_goes_into_the_environment_and_a_name_stands_for_it(
    monkeypatch, text, shown, hidden
) -> None:
    environment: dict[str, str] = {}
    now = hide(text, environment)
    named = text if shown is None else shown.replace("$", "$HARNESS_SECRET_")
    assert now == named and list(environment.values()) == hidden
    assert hide(now, dict(environment)) == now, (
        "what is hidden stays so: a job hides again what it was given"
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reveal(["--x", "$HARNESS_SECRET_1"]) == ["--x", hidden[0]] if hidden else True


def test_an_outer_secret_keeps_its_name() -> None:
    environment = {"HARNESS_SECRET_1": "outer"}
    assert (
        hide("--password $HARNESS_SECRET_1 --api-key inner", environment)
        == "--password $HARNESS_SECRET_1 --api-key $HARNESS_SECRET_2"
    )
    assert environment == {"HARNESS_SECRET_1": "outer", "HARNESS_SECRET_2": "inner"}


def test_a_script_without_its_secret_says_which(monkeypatch) -> None:
    monkeypatch.delenv("HARNESS_SECRET_7", raising=False)
    with pytest.raises(
        UserError,
        match=r"\$HARNESS_SECRET_7 is a secret, which no file contains\nexport HARNESS_SECRET_7=",
    ):
        reveal(["--key=$HARNESS_SECRET_7"])


@pytest.fixture
def secret(monkeypatch):
    for name in [
        name for name in os.environ if name.startswith("HARNESS_SECRET_") or name == "ARGS"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HARNESS_SECRET_1", "")  # so that it is put back
    return "hf_averysecretword"


def test_what_plans_scripts_jobs_and_records_are_made_of_has_no_secret(
    secret, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("ARGS", "left here by make")
    words = cli.given(
        ["219", f"ARGS=--memory-snapshot-path {secret}", "STEPS=3", f"OUTDIR={tmp_path}"]
    )
    assert os.environ["HARNESS_SECRET_1"] == secret and "ARGS" not in os.environ
    settings = command_line.parse(words[1:])
    planned = plan(load_catalog().find("219"), {**settings, "SLURM": "1"}, "cuda")
    texts = [
        planned.script(),
        slurm.render_sbatch(planned, settings),
        planned.experiment.model_dump_json(),
        planned.experiment.label,
    ]
    assert not any(secret in text for text in texts)
    assert (
        "--memory-snapshot-path '$HARNESS_SECRET_1'" in texts[0]
        and "ARGS=--memory-snapshot-path $HARNESS_SECRET_1" in texts[1]
    )


def test_make_shows_no_secret(secret) -> None:
    """As a user types it; also where the words are wrong."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "HARNESS_SECRET_"))}
    for words, status in (
        (["show-101", f"ARGS=--memory-snapshot-path {secret}"], 0),
        (["show-101", f"ARGS=--hf-token '{secret}"], 2),
        (["101", f"ARGS=--wandb-api-key {secret}", "DEVICE=tpu"], 2),
    ):
        done = subprocess.run(["make", *words], cwd=ROOT, text=True, capture_output=True, env=clean)
        assert done.returncode == status and secret not in done.stdout + done.stderr, (
            done.stdout + done.stderr
        )


def test_output_shows_secrets_by_name(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("HARNESS_SECRET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HARNESS_SECRET_1", "s3cr")
    monkeypatch.setenv("HARNESS_SECRET_2", "abc")  # too short to look for
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mask(f"a s3cr, {KEY}. s3cret abc") == "a $HARNESS_SECRET_1, $WANDB_API_KEY. s3cret abc"


def test_a_rank_has_its_secret_and_prints_and_keeps_only_the_name(tmp_path, secret) -> None:
    pytest.importorskip("torch", reason="the set-up stage `heavy` is not installed")
    from harness.entry.masked import masked

    script = (
        "import sys\nfrom harness.entry import masked\nmasked._keep_arguments_masked = lambda: print('kept masked')\n"
        "masked.install()\nprint(sys.argv[1:], len(sys.argv[2]))\nprint(sys.argv[2], file=sys.stderr)\nraise ValueError(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--x", "$HARNESS_SECRET_1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "HARNESS_SECRET_1": secret},
    )
    assert done.stdout.splitlines() == [
        "kept masked",
        f"['--x', '$HARNESS_SECRET_1'] {len(secret)}",
    ]
    assert secret not in done.stderr and done.stderr.startswith("$HARNESS_SECRET_1")
    os.environ["HARNESS_SECRET_1"] = secret
    args = Namespace(name=secret, path=["a", f"x:{secret}@y"], lr=1e-4)
    assert (
        masked(args)
        == Namespace(name="$HARNESS_SECRET_1", path=["a", "x:$HARNESS_SECRET_1@y"], lr=1e-4)
        and args.name == secret
    )


CONTROLS = "a\x1b[31mb\x07c\rd\x9be\u202ef\x7fg\udcffh"
SPELLED = r"a\x1b[31mb\x07c\rd\x9be\u202ef\x7fg\udcffh"


def test_control_characters_are_spelled_out() -> None:
    assert screen.harmless(CONTROLS + "\n\tåä 数") == SPELLED + "\n\tåä 数"
    out = io.StringIO()
    print(screen.paint("x", screen.RED, on=True), CONTROLS, file=screen.SafeStream(out))
    assert out.getvalue() == rf"\x1b[31mx\x1b[0m {SPELLED}" + "\n"


def test_a_terminal_gets_our_colours_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    print(
        screen.paint("x", screen.RED, on=True),
        "\x1b]0;title\x07\x1b[2J",
        file=screen.SafeStream(out),
    )
    assert out.getvalue() == "\x1b[31mx\x1b[0m \\x1b]0;title\\x07\\x1b[2J\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_folders_reach_no_terminal_raw(tmp_path: Path, terminal: bool) -> None:
    """Runs of such names in the table, a warning about one, a setting in an error."""
    for number, text in enumerate(("{}", "no json")):
        run = tmp_path / f"101\x1b]0;gotcha\x07{number}"
        run.mkdir()
        (run / "experiment.json").write_text(text)
        (run / "result.json").write_text(text)
    for words in (
        ["table", f"OUTDIR={tmp_path}"],
        ["run", "101", "DATA=\x1b[2Jx"],
        ["checkpoints", f"OUTDIR={tmp_path}\x1b[2J"],
    ):
        command = [sys.executable, "-m", "harness", *words]
        if terminal:
            master, slave = pty.openpty()
            process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave)
            os.close(slave)
            output = b""
            while chunk := _read(master):
                output += chunk
            process.wait()
            os.close(master)
        else:
            output = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ).stdout
        assert b"\x1b]" not in output and b"\x1b[2J" not in output and b"\x07" not in output, output
        assert rb"\x1b" in output, output


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # the other end is closed
        return b""


def test_a_script_has_no_control_character_and_the_same_words() -> None:
    for word in (CONTROLS, "it's\x1b\\", "plain words", "a\nb", "$HOME"):
        quoted = shell_word(word)
        assert screen.harmless(quoted) == quoted
        done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True)
        assert done.stdout == word.encode(errors="surrogateescape")


def test_json_on_standard_output_stays_json(tmp_path) -> None:
    out = io.StringIO()
    print(json.dumps({"label": CONTROLS}), file=screen.SafeStream(out))
    assert json.loads(out.getvalue()) == {"label": CONTROLS}


@pytest.mark.full
def test_no_file_of_a_run_holds_its_secret(tmp_path) -> None:
    """Script, experiment, log, TensorBoard's events, checkpoint: upstream notes its arguments in most of them."""
    pytest.importorskip("torch", reason="the set-up stage `heavy` is not installed")
    secret, clean = (
        "hf_averysecretword",
        {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "HARNESS_SECRET_"))},
    )
    words = [
        "101",
        f"ARGS=--memory-snapshot-path {secret}",
        "DEVICE=cpu",
        "STEPS=2",
        "SAVE=1",
        f"OUTDIR={tmp_path}",
    ]
    done = subprocess.run(["make", *words], cwd=ROOT, text=True, capture_output=True, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"logs.txt", "command.sh", ".metadata"} <= {path.name for path in files}
    assert (
        not [path for path in files if secret.encode() in path.read_bytes()]
        and secret not in done.stdout + done.stderr
    )
    (log,) = tmp_path.glob("*/logs.txt")
    assert "memory_snapshot_path ............................ $HARNESS_SECRET_1" in log.read_text()
