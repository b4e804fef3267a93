"""Upstream's arguments in ARGS= that a setting or a field of the model says, too: checks, labels and predictions know them."""

import re
import shlex

import pytest

from harness import cli
from harness.errors import UserError
from harness.experiment import command_line, extra_arguments, overrides
from harness.experiment.catalog import load_catalog
from harness.planning.plan import plan
from harness.predict.flops import step_flops
from harness.predict.memory import predict
from harness.search.layouts import Search
from harness.upstreams.megatron_lm.flags import megatron_flags

CATALOG = load_catalog()

SETTINGS = {
    "--train-iters 7": ("101", "STEPS=7"), "--tensor-model-parallel-size 5": ("101", "TP=5"),
    "--pipeline-model-parallel-size 4": ("101", "PP=4"), "--num-virtual-stages-per-pipeline-rank 9": ("438", "VPP=9"),
    "--context-parallel-size 2": ("101", "CP=2"), "--cp-comm-type all_gather": ("302", "CP_COMM_TYPE=all_gather"),
    "--expert-model-parallel-size 4": ("501", "EP=4"), "--expert-tensor-parallel-size 2": ("512", "ETP=2"),
    "--micro-batch-size 3": ("111", "MBS=3"), "--global-batch-size 16": ("101", "GBS=16"), "--seq-length 64": ("101", "SEQ=64"),
    "--eval-interval 7": ("101", "EVAL_EVERY=7"), "--eval-iters 3": ("101", "EVAL_STEPS=3"), "--split 90,9,1": ("101", "SPLIT=90,9,1"),
    "--sequence-parallel": ("232", "SP=1"), "--recompute-activations": ("101", "RECOMPUTE=selective"),
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": ("101", "RECOMPUTE=full"),
    "--recompute-granularity selective": ("101", "RECOMPUTE=selective"), "--optimizer muon": ("101", "OPTIMIZER=muon"),
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native": ("101", "CROSS_ENTROPY_FUSION=1"),
    "--attention-dropout 0.2 --hidden-dropout 0.2": ("101", "DROPOUT=0.2"),
}  # fmt: skip
MODEL = {
    "--num-layers 96": ("101", "num_layers", 96), "--hidden-size 3200": ("101", "hidden_size", 3200),
    "--num-attention-heads 20": ("101", "num_attention_heads", 20), "--ffn-hidden-size 512": ("101", "ffn_hidden_size", 512),
    "--kv-channels 32": ("101", "kv_channels", 32), "--vocab-size 999": ("101", "vocab_size", 999),
    "--group-query-attention --num-query-groups 5": ("101", "num_query_groups", 5), "--rotary-base 77": ("611", "rotary_base", 77),
    "--disable-bias-linear": ("101", "add_bias_linear", False), "--swiglu": ("101", "activation", "swiglu"),
    "--normalization RMSNorm": ("101", "normalization", "RMSNorm"), "--norm-epsilon 1e-3": ("101", "norm_epsilon", 1e-3),
    "--position-embedding-type rope": ("101", "position_embedding", "rope"), "--softmax-type learnable": ("101", "attention_sinks", True),
    "--untie-embeddings-and-output-weights": ("101", "untie_embeddings", True), "--qk-layernorm": ("101", "qk_norm", "head"),
    "--attention-output-gate": ("101", "attention_output_gate", True), "--num-experts 16": ("501", "num_experts", 16),
    "--moe-router-topk 1": ("501", "moe_router_topk", 1), "--moe-ffn-hidden-size 256": ("501", "moe_ffn_hidden_size", 256),
    "--moe-router-pre-softmax": ("501", "moe_router_pre_softmax", True),
    "--use-rope-scaling --rope-scaling-factor 32": ("611", "rope_scaling_factor", 32.0), "--use-rope-scaling": ("611", "rope_scaling_factor", 8.0),
}  # fmt: skip
PREDICTS = ("memory", "speed", "faster", "gpus")


def apply(id_, *words):
    return overrides.apply(CATALOG.find(id_), command_line.parse(words))


def flags(e):
    return [word for group in megatron_flags(e, "cuda") for word in group]


def pairs(text):
    return {
        (a.option, value)
        for a in extra_arguments.arguments(shlex.split(text))
        for value in (a.values or (None,))
    }


@pytest.mark.parametrize("text", SETTINGS)
def test_what_a_setting_says_is_that_setting(text):
    """The same experiment, label and all; and upstream is still told what was typed."""
    id_, setting = SETTINGS[text]
    e = apply(id_, f"ARGS={text}")
    assert e == apply(id_, setting) != CATALOG.find(id_) and e.overrides == dict(
        [setting.split("=")]
    )
    assert pairs(text) - {("--recompute-activations", None)} <= pairs(shlex.join(flags(e)))
    assert apply(id_, f"ARGS={text} --seed 3").extra_args == ("--seed", "3")


@pytest.mark.parametrize("text", MODEL)
def test_what_a_model_says_is_its_model(text):
    id_, field, value = MODEL[text]
    e = apply(id_, f"ARGS={text}")
    assert getattr(e.model, field) == value != getattr(CATALOG.find(id_).model, field)
    assert not e.extra_args and e.overrides == {"ARGS": text}
    said = dict(pairs(shlex.join(flags(e))))
    assert all(
        option in said
        and (
            v is None or float(said[option]) == float(v)
            if v and v[0].isdigit()
            else said[option] == v
        )
        for option, v in pairs(text)
    ), said


@pytest.mark.parametrize("command", ["show", "memory"])
def test_modules_are_recomputed_selectively_or_not_at_all(command, capsys):
    assert (
        cli.main([command, "101", "RECOMPUTE=full", "ARGS=--recompute-modules mlp", "DATA=mock"])
        == 2
    )
    assert (
        "RECOMPUTE=full recomputes no single modules, but ARGS names mlp" in capsys.readouterr().err
    )
    assert (
        cli.main(
            [command, "101", "RECOMPUTE=selective", "ARGS=--recompute-modules mlp", "DATA=mock"]
        )
        == 0
    )


def test_what_no_setting_says_stays_for_upstream_alone():
    e = apply(
        "101",
        "ARGS=--lr 1e-4 --num-layers=96 --recompute-granularity full --recompute-method block --x 'a b'",
        "MBS=1",
    )
    assert e.extra_args == (
        "--lr",
        "1e-4",
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "block",
        "--x",
        "a b",
    )
    assert (e.model.num_layers, e.recompute) == (96, "none")
    assert apply("101", "ARGS=--num-experts 8 --moe-router-topk 2").extra_args, (
        "more is needed to make experts of a dense row"
    )


def test_the_fields_without_a_setting():
    assert apply("101", "ARGS=--max-position-embeddings 4096").positions == 4096
    assert apply("101", "ARGS=--attention-backend unfused").attention_backend == "unfused"
    e = apply("101", "ARGS=--recompute-granularity selective --recompute-modules core_attn mlp")
    assert (e.recompute, e.recompute_modules) == ("selective", ("core_attn", "mlp"))


@pytest.mark.parametrize(("words", "complaint"), [
    (["TP=2", "ARGS=--tensor-model-parallel-size 5"], "TP=2, and ARGS says TP=5; leave one out"),
    (["ARGS=--lr 1 --lr 2"], "--lr is given twice"),
    (["ARGS=--tensor-model-parallel-size 3"], "num_attention_heads (25) must be divisible by TP (3)"),
    (["ARGS=--num-layers 50", "PP=4"], "layers (50) must be divisible by PP x VPP (4 x 1 = 4)"),
    (["ARGS=--num-layers 0"], "ARGS: num_layers = 0"),
    (["ARGS=--num-layers many"], "ARGS: --num-layers many: expected a whole number"),
    (["ARGS=--hidden-size 1601"], "hidden_size (1601) must be divisible by num_attention_heads (25)"),
    (["ARGS=--softmax-type learnable", "CP=2"], "windows and sinks need context parallelism by CP_COMM_TYPE=a2a"),
    *(([f"ARGS={option} x"], f"the harness sets {option} itself; use ") for option in extra_arguments._OWNED),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_values(words, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        apply("101", *words)


def test_sizes_are_checked_with_both():
    assert apply("101", "ARGS=--num-layers 50", "PP=5").model.num_layers == 50, (
        "48 layers have no five stages"
    )


@pytest.mark.parametrize(
    "text",
    [
        "--num-layers 96",
        "--ffn-hidden-size 12800",
        "--seq-length 2048",
        "--swiglu",
        "--vocab-size 300000",
    ],
)
def test_formulas_are_of_the_model_that_runs(text):
    e, row = apply("101", f"ARGS={text}"), CATALOG.find("101")
    assert predict(e).total > predict(row).total and step_flops(e) > step_flops(row)


@pytest.mark.parametrize("command", PREDICTS)
def test_every_prediction_understands_a_deeper_model(command, capsys):
    assert cli.main([command, "111", "ARGS=--num-layers 96", "CARD=h200-141gb"]) == 0
    deeper = capsys.readouterr().out
    assert cli.main([command, "111", "CARD=h200-141gb"]) == 0
    assert deeper != capsys.readouterr().out
    commands = re.findall(r"make \S*111 .*|make \S*111_.*", deeper)
    for typed in commands:
        assert "ARGS='--num-layers 96'" in typed and "--num-layers 96" in shlex.split(typed)[-1], (
            typed
        )
    assert commands or command in ("memory", "speed")


@pytest.mark.parametrize("command", PREDICTS)
@pytest.mark.parametrize(("text", "named", "way_out"), [
    ("--manual-gc", "--manual-gc", "leave it out, or measure: make 111 STEPS=20"), ("--lr 1e-4 --fp16", "--fp16", "leave it out"),
    ("--recompute-granularity full --recompute-method block --recompute-num-layers 3",
     "--recompute-granularity, --recompute-method, --recompute-num-layers", "RECOMPUTE= replaces --recompute-granularity"),
    ("--use-distributed-optimizer", "--use-distributed-optimizer", "SHARDING=optim replaces"), ("--hidden-dropout 0", "--hidden-dropout", "DROPOUT="),
])  # fmt: skip
def test_every_prediction_refuses_what_it_does_not_know(command, text, named, way_out, capsys):
    assert cli.main([command, "111", f"ARGS={text}", "CARD=h200-141gb"]) == 2
    said = capsys.readouterr()
    assert f"no formula covers {named} in ARGS" in said.err and way_out in said.err and not said.out


@pytest.mark.parametrize("command", PREDICTS)
def test_what_changes_no_step_changes_no_prediction(command, capsys):
    printed = []
    for words in ([], ["ARGS=--lr 1e-4 --seed 3"]):
        assert cli.main([command, "111", "CARD=h200-141gb", *words]) == 0
        printed.append(re.sub(r"_args[^:_ ]*| ARGS='.*?'| +", "", capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_neutral_arguments_are_upstreams():
    from harness.upstreams.megatron_lm.known_arguments import table

    names = {name for row in table() for name in row["names"]}
    known = {*extra_arguments._SETTINGS, *extra_arguments._SWITCHES, *extra_arguments._CHOICES, *extra_arguments._MODEL_NUMBERS, *extra_arguments._MODEL_FRACTIONS,
             *extra_arguments._MODEL_SWITCHES, *extra_arguments._MODEL_CHOICES, *extra_arguments._OWNED, *extra_arguments._HINTS, *extra_arguments.NEUTRAL}  # fmt: skip
    assert known <= names and not extra_arguments.NEUTRAL & (known - extra_arguments.NEUTRAL)


def test_a_layout_that_is_proposed_keeps_the_model_of_args():
    e = apply("111", "ARGS=--num-layers 96 --seed 3")
    search = Search(e, 2, None, None, {"sharding": "no_shard"})
    table = search.table()
    found = [search.laid_out(table, row) for row in range(len(table))]
    assert found and {(layout.model.num_layers, layout.extra_args) for layout in found} == {
        (96, ("--seed", "3"))
    }


def miniature(*words):
    return plan(CATALOG.find("101"), command_line.parse(["DATA=mock", *words]), "cpu").experiment


def test_the_miniature_scales_all_but_what_was_asked_for():
    small = miniature()
    for text, changed in (
        ("--num-layers 48", {"num_layers": 48}),
        ("--hidden-size 200 --swiglu", {"hidden_size": 200, "activation": "swiglu"}),
        ("--num-attention-heads 20", {"num_attention_heads": 20, "hidden_size": 80}),
    ):
        asked = miniature(f"ARGS={text}")
        assert asked.model == small.model.model_copy(update=changed) and re.fullmatch(
            small.label.replace("_cpu", "_args[^_]*_cpu"), asked.label
        )
    assert (
        miniature("ARGS=--seq-length 64 --train-iters 3").label
        == miniature("SEQ=64", "STEPS=3").label
        != small.label
    )


def test_weights_bring_their_model_and_args_may_not_say_another(monkeypatch, tmp_path):
    from harness.planning import resolved, starting_weights
    from harness.planning.starting_weights import StartingWeights

    model = miniature().model.model_copy(
        update={"name": "four", "hidden_size": 64, "num_attention_heads": 4}
    )
    monkeypatch.setattr(
        starting_weights, "find", lambda n, outdir: StartingWeights(n, "/four", model, 64, None)
    )
    made = resolved.with_settings(
        CATALOG.find("101"),
        {"WEIGHTS": "four", "ARGS": "--num-attention-heads 4 --seed 3"},
        tmp_path,
    )
    assert made.model.num_attention_heads == 4 and made.extra_args == ("--seed", "3")
    for text, said in (
        ("--num-layers 96", "their model has num_layers 2, not 96"),
        ("--max-position-embeddings 128", "they have 64 learned positions, not 128"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            resolved.with_settings(CATALOG.find("101"), {"WEIGHTS": "four", "ARGS": text}, tmp_path)


@pytest.mark.parametrize(("id_", "text", "ours"), [
    ("101", "--ckpt-format torch", "torch_dist"), ("101", "--ckpt-format fsdp_dtensor", "torch_dist"), ("101", "--dist-ckpt-format zarr", "torch_dist"),
    ("705", "--ckpt-format torch_dist", "fsdp_dtensor"),
])  # fmt: skip
def test_a_format_that_fails_after_all_steps_is_refused_before_them(
    id_, text, ours, monkeypatch, tmp_path
):
    settings = {"DATA": "mock", "SAVE": "1", "OUTDIR": str(tmp_path), "ARGS": text}
    with pytest.raises(
        UserError, match=f"ARGS has {text}, but checkpoints with sharding .* are {ours}"
    ):
        plan(CATALOG.find(id_), settings, "cuda")
    assert plan(CATALOG.find(id_), settings | {"SAVE": "0"}, "cuda") and not any(tmp_path.iterdir())
    assert plan(CATALOG.find(id_), settings | {"ARGS": f"--ckpt-format {ours}"}, "cuda")


def test_async_save_is_the_harness_s_to_ask_for():
    with pytest.raises(
        UserError,
        match=r"the harness sets --async-save itself; use SAVE=1, which saves asynchronously",
    ):
        apply("101", "ARGS=--async-save --ckpt-format torch")
