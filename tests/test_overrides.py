"""Overrides on the command line: applied, validated, and visible in the label."""

import pytest

from harness.errors import UserError
from harness.experiment import command_line, identity, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.command_line import EXPERIMENT_SETTINGS, SETTINGS
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment

CATALOG = load_catalog()


def apply(id_: str, *words: str):
    return overrides.apply(CATALOG.find(id_), command_line.parse(words))


def test_a_setting_is_declared_once() -> None:
    """Its field exists, its example is read, and one setting of a field says what it changes."""
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)
    for setting in EXPERIMENT_SETTINGS:
        assert setting.field in Experiment.model_fields, setting.key
        if setting.read:
            assert setting.read(setting.key, setting.example) is not None, setting.key
    told = [setting.field for setting in EXPERIMENT_SETTINGS if setting.changes]
    assert len(set(told)) == len(told)
    assert {setting.field for setting in EXPERIMENT_SETTINGS} - set(told) == {"model", "extra_args"}


def test_sizes_change_and_show_in_the_label() -> None:
    e = apply("438", "VPP=9", "STEPS=20", "MBS=2")
    assert (e.vpp, e.steps, e.micro_batch_size, e.num_microbatches) == (9, 20, 2, 16)
    assert e.label == "438-gpt2-8.3B-pp8-vpp3-m8_steps20_vpp9_mbs2"


def test_gpus_fix_the_ranks_and_data_parallelism_follows() -> None:
    assert apply("128", "GPUS=4").dp == 4
    assert apply("501", "GPUS=4", "TP=2", "SP=1").dp == 2
    assert apply("101", "TP=5").world_size == 5


def test_what_changes_nothing_leaves_no_trace() -> None:
    assert apply("101", "TP=1", "STEPS=100") is CATALOG.find("101")
    assert apply("101", "STEPS=") is CATALOG.find("101")


def test_dependent_settings_follow() -> None:
    assert not apply("282", "TP=1").sequence_parallel
    assert apply("438", "PP=1").vpp == 1
    assert (
        CATALOG.find("622").recompute_modules
        and not apply("622", "RECOMPUTE=full").recompute_modules
    )


def test_dropout_is_the_models_and_switches_are_on_or_off() -> None:
    e = apply("101", "DROPOUT=0", "CUDA_GRAPHS=1", "CROSS_ENTROPY_FUSION=0")
    assert (e.model.dropout, e.cuda_graphs, e.cross_entropy_fusion) == (0, True, False)
    assert e.label == "101-gpt2xl-dp1-gbs1-bf16_dropout0_cuda_graphs1" and e.layout == "CUDA graphs"
    assert apply("101", "DROPOUT=0.1", "CUDA_GRAPHS=0") is CATALOG.find("101")


def test_fp8_is_a_precision_and_a_recipe():
    e = apply("111", "FP8=tensorwise")
    assert (e.precision, e.fp8_recipe, e.label) == (
        "fp8",
        "tensorwise",
        "111-gpt2xl-dp1-fit-80GB_fp8tensorwise",
    )
    plain, listed = apply("612", "FP8=0"), CATALOG.find("611")
    assert (plain.precision, plain.fp8_recipe, plain.layout) == ("bf16", None, listed.layout)
    assert apply("612", "FP8=delayed") is CATALOG.find("612") and apply(
        "111", "FP8=0"
    ) is CATALOG.find("111")
    with pytest.raises(
        UserError, match="FP8=e4m3; valid: delayed, tensorwise, blockwise, mxfp8, 0"
    ):
        apply("111", "FP8=e4m3")
    with pytest.raises(
        UserError,
        match=r"in blocks of 16: hidden_size \(1000\), queries, keys and values / TP \(3000\), queries",
    ):
        with_changes(
            CATALOG.find("111"),
            precision="fp8",
            fp8_recipe="delayed",
            model=CATALOG.find("111").model.model_copy(
                update={"hidden_size": 1000, "kv_channels": None}
            ),
        )
    with pytest.raises(UserError, match="in blocks of 128"):
        apply("111", "FP8=blockwise", "SEQ=1000", "MBS=1", "GBS=1")


def test_fp4_is_a_precision_and_a_recipe_in_place_of_fp8():
    e = apply("611", "FP4=nvfp4")
    assert (e.precision, e.fp4_recipe, e.recipe) == ("fp4", "nvfp4", "nvfp4")
    assert e.label == "611-llama3-8b-dp4-bf16_fp4nvfp4" and e.layout.endswith("fp4 nvfp4")
    assert not identity.same(e, CATALOG.find("611"))
    (difference,) = (
        one for one in identity.differences(CATALOG.find("611"), e) if one.setting == "FP4"
    )
    assert difference.curve and str(difference) == "FP4 not set -> nvfp4"
    of_fp8 = apply("613", "FP4=nvfp4", "FP8=0")
    assert (of_fp8.precision, of_fp8.fp8_recipe) == ("fp4", None) and identity.same(
        of_fp8.model_copy(update={"id": "611"}), e
    )
    assert apply("613", "FP4=0") is CATALOG.find("613")
    assert apply("611", "FP4=0", "FP8=tensorwise").precision == "fp8"
    with pytest.raises(UserError, match="FP4=nvfp4 and FP8=delayed: upstream takes one of them"):
        apply("611", "FP4=nvfp4", "FP8=delayed")
    with pytest.raises(UserError, match=r"FP4=mxfp4; did you mean nvfp4\?"):
        apply("611", "FP4=mxfp4")


def test_delayed_gradients_are_a_switch_of_a_label():
    e = apply("502", "EP_OVERLAP=1", "DELAY_WGRAD=1")
    assert e.delay_wgrad and e.label.endswith("_ep_overlap1_delay_wgrad1")
    same = apply("502", "ARGS=--overlap-moe-expert-parallel-comm --delay-wgrad-compute")
    assert identity.same(e, same)
    changed = identity.differences(apply("502", "EP_OVERLAP=1"), e)
    assert [(one.setting, one.curve, one.work) for one in changed] == [("DELAY_WGRAD", False, True)]


def test_arguments_are_split_as_a_shell_splits() -> None:
    assert apply("101", "ARGS=--lr 1e-4 --x 'a b'").extra_args == ("--lr", "1e-4", "--x", "a b")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["101", "TP=3"],
            r"num_attention_heads \(25\) must be divisible by TP \(3\); try TP in \{1, 5, 25\}",
        ),
        (
            ["438", "VPP=5"],
            r"layers \(72\) must be divisible by PP x VPP \(8 x 5 = 40\); try VPP in \{1, 3, 9\}",
        ),
        (["128", "GPUS=3"], r"GBS \(128\) must be divisible by MBS x DP \(16 x 3 = 48\)"),
        (
            ["408", "GPUS=6"],
            r"GPUS \(6\) must be divisible by TP x PP x CP \(1 x 8 x 1 = 8\); try GPUS=8",
        ),
        (
            ["302", "GPUS=3"],
            r"GPUS \(3\) must be divisible by TP x PP x CP \(1 x 1 x 2 = 2\); try GPUS=4, or",
        ),
        (["128", "GPUS=4", "DP=2"], r"GPUS=4 makes DP=4, but DP=2 is given"),
        (["101", "STEPS=many"], r"STEPS=many: expected a whole number, 1 or more"),
        (["101", "STEPS=0"], r"STEPS=0: expected a whole number"),
        (["101", "STEPS=²"], r"expected a whole number"),
        (["101", "STEP=20"], r"unknown setting STEP; did you mean STEPS"),
        (["101", "20"], r"'20' is not of the form KEY=VALUE"),
        (["101", "SP=yes"], r"SP=yes: expected 0 or 1"),
        (["101", "DROPOUT=1"], r"DROPOUT=1: expected a number from 0 to below 1"),
        (["101", "DROPOUT=none"], r"DROPOUT=none: expected a number from 0"),
        (
            ["101", "CUDA_GRAPHS=local"],
            r"CUDA_GRAPHS=local: expected 0, 1 or modules; valid: attn, mlp, moe_router, moe_preprocess",
        ),
        (["101", "RECOMPUTE=all"], r"RECOMPUTE=all; .*full"),
        (["101", "CARD=h100"], r"CARD=h100: unknown GPU; .*h100-80gb"),
        (["101", "ARGS='--lr"], r"No closing quotation"),
    ],
)
def test_a_mistake_is_refused_with_its_values(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        apply(*words)
