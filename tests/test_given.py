"""What was given on the command line holds, be it what the catalogue says anyway; sizes are checked against the model that trains."""

import re

import pytest

from harness import cli
from harness.errors import UserError
from harness.evidence import memory
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.command_line import FIELDS
from harness.experiment.constraints import with_changes
from harness.planning import checkpoint_fits, resolved, starting_weights
from harness.planning.commands import print_script
from harness.planning.miniature import miniature
from harness.planning.plan import plan
from harness.planning.starting_weights import StartingWeights
from harness.run.checkpoints import Checkpoint, Contents
from harness.search.layouts import Search

CATALOG = load_catalog()


def small(id_: str, **settings: str):
    return plan(CATALOG.find(id_), {"DEVICE": "cpu", "DATA": "mock", **settings}, "cpu").experiment


@pytest.mark.parametrize(("id_", "key", "field", "scaled"), [
    ("101", "STEPS", "steps", 20), ("101", "SEQ", "seq_length", 32), ("304", "SEQ", "seq_length", 128),
    ("604", "STEPS", "steps", 240), ("604", "EVAL_EVERY", "eval_interval", 12),
])  # fmt: skip
def test_a_setting_that_says_what_the_row_says_is_kept_in_the_miniature(id_, key, field, scaled):
    value = str(getattr(CATALOG.find(id_), field))
    asked = small(id_, **{key: value})
    assert str(getattr(asked, field)) == value and getattr(small(id_), field) == scaled
    assert f"_{key.lower()}{value}_" in asked.label != small(id_).label
    assert asked.overrides == {key: value} and small(id_).overrides == {}


EQUAL = {"STEPS": "steps", "TP": "tp", "PP": "pp", "CP": "cp", "DP": "dp", "VPP": "vpp", "MBS": "micro_batch_size",
         "GBS": "global_batch_size", "SEQ": "seq_length", "EVAL_EVERY": "eval_interval", "EVAL_STEPS": "eval_steps",
         "RECOMPUTE": "recompute", "SHARDING": "sharding", "OPTIMIZER": "optimizer", "SPLIT": "split"}  # fmt: skip


@pytest.mark.parametrize("id_", ["101", "224", "304", "408", "438", "604"])
def test_every_setting_given_as_the_row_has_it_reaches_the_miniature(id_):
    row = CATALOG.find(id_)
    given = {key: str(getattr(row, field)) for key, field in EQUAL.items()} | {
        "DROPOUT": str(row.model.dropout)
    }
    e = small(id_, **given)
    assert {key: str(getattr(e, FIELDS[key])) for key in EQUAL} == {
        key: given[key] for key in EQUAL
    }
    assert e.model.dropout == row.model.dropout
    assert overrides.apply(row, given) is row, (
        "at full size nothing is changed, and the label is the row's"
    )


def test_a_setting_that_makes_no_other_miniature_leaves_no_trace_in_its_label():
    assert (
        small("101", MBS="1", TP="1", DROPOUT="0.1", EVAL_EVERY="50").label
        == "101-gpt2xl-dp1-gbs1-bf16_cpu"
    )
    assert (
        small("101", SEQ="1024", STEPS="100", MBS="1").label
        == "101-gpt2xl-dp1-gbs1-bf16_steps100_seq1024_cpu"
    )


def test_intervals_of_a_long_run_are_its_own_where_its_steps_are_given():
    row, asked = CATALOG.find("604"), small("604", STEPS="400")
    assert (asked.eval_interval, asked.save_every) == (row.eval_interval, row.save_every)


def test_a_learning_rate_that_is_given_is_not_scaled_for_conversations(monkeypatch):
    row = CATALOG.find("801")
    monkeypatch.setattr("harness.data.data_sets.is_chat", lambda data: True)
    monkeypatch.setattr("harness.planning.miniature._vocabulary", lambda e: 256)
    assert miniature(row).lr > row.lr
    asked = miniature(row, given={"LR": str(row.lr)})
    assert asked.lr == row.lr and f"_lr{row.lr}" in asked.label


def test_mock_data_that_were_asked_for_are_no_stand_in(monkeypatch, capsys):
    conversations = CATALOG.find("801")
    planned = plan(conversations, {"DATA": "mock"}, "cpu")
    print_script(planned, {"DATA": "mock"})
    assert "With mock data" not in capsys.readouterr().err
    print_script(planned, {})
    assert "With mock data" in capsys.readouterr().err


@pytest.fixture
def four_heads(monkeypatch):
    """WEIGHTS=four: a model with 4 heads and 64 learned positions; 101's has 25."""
    model = small("101").model.model_copy(
        update={"name": "four", "hidden_size": 64, "num_attention_heads": 4}
    )
    monkeypatch.setattr(
        starting_weights,
        "find",
        lambda named, outdir: StartingWeights(named, "/four", model, 64, None),
    )
    return model


def test_sizes_are_checked_against_the_model_of_the_weights(four_heads):
    settings = {"DEVICE": "cpu", "DATA": "mock", "WEIGHTS": "four"}
    e = plan(CATALOG.find("101"), settings | {"TP": "2"}, "cpu").experiment
    assert (e.tp, e.model.num_attention_heads, e.overrides) == (
        2,
        4,
        {"TP": "2", "WEIGHTS": "four"},
    )
    for words, said in (
        ({"TP": "5"}, "num_attention_heads (4) must be divisible by TP (5)"),
        ({"PP": "4"}, "layers (2) must be divisible by PP x VPP (4 x 1 = 4)"),
        ({"SEQ": "1024"}, "SEQ=1024: positions were learned up to 64"),
        (
            {"CP": "8", "CP_COMM_TYPE": "a2a"},
            "num_attention_heads (4) must be divisible by TP x CP (1 x 8 = 8)",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            plan(CATALOG.find("101"), settings | words, "cpu")


def test_experts_of_the_row_forbid_nothing_to_weights_without_any(four_heads, tmp_path):
    """501's experts want sequence parallelism beside TP, and get no adapters."""
    settings = {"EP": "1", "DP": "1", "GBS": "1", "MBS": "1", "TP": "2"}
    with pytest.raises(UserError, match="need sequence parallelism"):
        overrides.apply(CATALOG.find("501"), settings)
    e = resolved.with_settings(
        CATALOG.find("501"), settings | {"WEIGHTS": "four", "LORA_RANK": "4"}, tmp_path
    )
    assert (e.model.num_experts, e.lora.rank, e.tp) == (None, 4, 2)


def test_predictions_are_of_the_model_of_the_weights(four_heads, tmp_path, capsys):
    settings = {"WEIGHTS": "four"}
    memory.print_memory("101", settings)
    assert "gpt2xl" not in (said := capsys.readouterr().out.partition(": ")[2]) and said.startswith(
        "four, one GPU"
    )
    e = resolved.of_catalogue("101", settings | {"GBS": "4"})
    search = Search(e, 4, None, None)
    table = search.table()
    found = [search.laid_out(table, row) for row in range(len(table))]
    assert {layout.model.name for layout in found} == {"four"}
    assert any(layout.tp == 4 for layout in found)


def test_a_checkpoint_with_other_learned_positions_is_refused_before_anything_runs(tmp_path):
    e = small("101")
    shapes = {
        "embedding.word_embeddings.weight": (1024, 100),
        "embedding.position_embeddings.weight": (32, 100),
    }
    found = Checkpoint(tmp_path / "iter_0000005", 5, 700, None, Contents({}, shapes, True))
    checkpoint_fits.check_fits(found, e)
    with pytest.raises(UserError, match=r"has 32 learned positions, .* has 128\nSEQ=32 loads it$"):
        checkpoint_fits.check_fits(found, with_changes(e, seq_length=128))
    with pytest.raises(
        UserError,
        match=rf"has 32 learned positions, .* has 16\nSEQ=32 loads it, WEIGHTS={tmp_path} trains",
    ):
        checkpoint_fits.check_fits(found, with_changes(e, seq_length=16))
    checkpoint_fits.check_fits(found, with_changes(e, seq_length=16, positions=32))


def test_every_way_to_a_run_keeps_what_was_given(monkeypatch, capsys, tmp_path):
    """``make train-…`` and ``make chapter-…`` plan as ``make 101`` does; ``verify`` takes it before the record's."""
    row = CATALOG.find("604")
    words = [f"STEPS={row.steps}", f"SEQ={row.seq_length}", "DEVICE=cpu", f"OUTDIR={tmp_path}"]
    assert cli.main(["train", "604", *words, "DRY_RUN=1"]) == 0
    said = capsys.readouterr().out
    assert f"--train-iters {row.steps}" in said and f"--seq-length {row.seq_length}" in said
    planned = {}
    monkeypatch.setattr(
        "harness.launching.chapter.run_chapter",
        lambda experiments, plan_for, **_: (
            planned.update({e.id: plan_for(e).experiment for e in experiments if e.world_size == 1})
            or 0
        ),
    )
    monkeypatch.setattr("harness.machine.packages.install", lambda *stages: None)
    assert cli.main(["chapter", "100", "STEPS=100", "SEQ=1024", "DATA=mock", *words[2:]]) == 0
    assert planned and {(e.steps, e.seq_length) for e in planned.values()} == {(100, 1024)}
