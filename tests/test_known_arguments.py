"""ARGS= against upstream's parser: a table that needs no torch, as fresh as the Megatron-LM that it is of."""

import inspect
import json
import subprocess
import sys

import pytest

from harness import ROOT, cli
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.machine import upstream
from harness.upstreams.megatron_lm import known_arguments
from harness.upstreams.megatron_lm.flags import megatron_flags
from harness.upstreams.megatron_lm.known_arguments import PINNED, check, described, identity, table

WRONG = {
    "--nonsense 4": "upstream has no argument --nonsense; ",
    "--num-layer 4": "upstream has no argument --num-layer; did you mean --num-layers",  # argparse would take abbreviations
    "--clip-grda=1": "upstream has no argument --clip-grda; did you mean --clip-grad",
    "--lr 1e-4x": "--lr: invalid float value: '1e-4x'",
    "--num-layers 4.5": "--num-layers: invalid int value: '4.5'",
    "--lr": "--lr: expected one argument",
    "--lr --min-lr 0": "--lr: expected one argument",
    "--optimizer adamw": "--optimizer: invalid choice: 'adamw' (choose from 'adam', 'sgd', 'muon'",
    "--attention-backend quick": "--attention-backend: invalid choice: 'quick' (choose from 'flash', 'fused', 'unfused'",
    "--recompute-modules --swiglu": "--recompute-modules: expected at least one argument",
    "--swiglu 3": "'3' belongs to no argument",
    "--swiglu=3": "--swiglu: ignored explicit argument '3'",
    "1e-4": "'1e-4' belongs to no argument",
    "--lr '1e-4": "No closing quotation",
    "--use-flash-attn": "upstream accepts --use-flash-attn and does nothing with it; --attention-backend flash",
    "--lr 1e-4 --enable-full-sharding-in-hsdp": "upstream accepts --enable-full-sharding-in-hsdp and does nothing with it; leave",
    "-h": "'-h' belongs to no argument",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_upstream_would_refuse_is_refused_before_anything_starts(text):
    with pytest.raises(UserError) as refused:
        check(text)
    assert WRONG[text] in str(refused.value)


@pytest.mark.parametrize("text", [
    "--lr 1e-4", "--lr=1e-4", "--lr -1", "--swiglu --num-layers 3", "--window-size 3,0", "--moe-layer-freq ([0]*3+[1]*3)",
    "--recompute-modules core_attn mlp", "--no-rl-partial-rollouts", "--override-opt_param-scheduler", "",
    "--lora-rank 4", "--cp-comm-type p2p a2a", "--hierarchical-context-parallel-sizes 2 4", "--attention-backend flash", "--exit-signal SIGUSR1",
])  # fmt: skip
def test_what_upstream_takes_is_taken(text):
    check(text)


def test_nothing_that_the_harness_emits_is_dropped():
    dropped = {name for row in table() if row["dropped"] for name in row["names"]}
    words = {word for e in load_catalog().experiments for device in ("cpu", "cuda")
             for group in megatron_flags(with_changes(e, data="mock"), device) for word in group}  # fmt: skip
    assert dropped and len(words) > 100 and not dropped & words


@pytest.mark.parametrize(
    "command", ["run", "show", "memory", "speed", "faster", "gpus", "verify", "train"]
)
def test_every_command_of_an_experiment_checks(command, capsys):
    assert cli.main([command, "101", "ARGS=--nonsense 4"]) == 2
    assert "upstream has no argument --nonsense" in capsys.readouterr().err


def test_a_chapter_checks(capsys):
    assert cli.main(["chapter", "100", "ARGS=--nonsense 4"]) == 2
    assert "upstream has no argument --nonsense" in capsys.readouterr().err


def test_neither_torch_nor_upstream_is_imported():
    script = (
        "import sys; from harness.upstreams.megatron_lm import known_arguments; known_arguments.check('--lr 1e-4'); "
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_another_upstream_is_asked_once_and_without_torch_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(known_arguments, "identity", lambda: "another")
    monkeypatch.setattr(known_arguments.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(known_arguments, "find_spec", lambda name: None)
    assert table() is None
    check("--nonsense 4")
    asked = []

    def ask(command, **options):
        asked.append(command)
        row = {"names": ["--its-own"], "nargs": 0, "type": "str", "choices": None, "dropped": False}
        (tmp_path / "megatron-arguments-another.json").write_text(json.dumps({"arguments": [row]}))

    monkeypatch.setattr(known_arguments, "find_spec", lambda name: name == "torch")
    monkeypatch.setattr(known_arguments.subprocess, "run", ask)
    for _ in range(2):
        check("--its-own")
        with pytest.raises(UserError, match="upstream has no argument --lr; valid: --its-own"):
            check("--lr 1")
    assert len(asked) == 1 and asked[0][:3] == [
        sys.executable,
        "-m",
        "harness.upstreams.megatron_lm.known_arguments",
    ]


def test_the_arguments_of_packages_that_add_some_are_left_to_upstream(monkeypatch):
    monkeypatch.setattr(known_arguments, "find_spec", lambda name: name == "modelopt")
    monkeypatch.setattr(known_arguments, "identity", lambda: None)
    check("--modelopt-enabled")


@pytest.mark.cpu
def test_the_table_is_that_of_the_pinned_release():
    """Where this fails after upstream moved: python -m harness.upstreams.megatron_lm.known_arguments."""
    pinned = json.loads(PINNED.read_text(encoding="utf-8"))
    assert (identity(), described()) == (pinned["identity"], pinned["arguments"])


@pytest.mark.cpu
def test_every_file_that_makes_the_parser_counts_in_its_identity(monkeypatch):
    from harness.upstreams.megatron_lm.arguments import import_upstream, upstream_parser

    import_upstream()
    from megatron.training import argument_utils, arguments

    classes, make = [], argument_utils.ArgumentGroupFactory.__init__
    monkeypatch.setattr(
        argument_utils.ArgumentGroupFactory,
        "__init__",
        lambda self, kind, *rest, **more: (classes.append(kind), make(self, kind, *rest, **more))[
            1
        ],
    )
    types = [
        action.type for action in upstream_parser()._actions if inspect.isfunction(action.type)
    ]
    files = {
        inspect.getfile(part) for kind in classes for part in kind.__mro__ if part is not object
    }
    files |= {inspect.getfile(kind) for kind in types} | {arguments.__file__}
    megatron = (
        (upstream.locate() / "megatron")
        if upstream.locate()
        else ROOT.joinpath(arguments.__file__).parents[1]
    )
    assert len(files) > 5 and files <= {str(path) for path in known_arguments.sources(megatron)}
