"""What settings that the search leaves alone would bring in a layout that it found."""

import pytest

from harness.cli import main
from harness.experiment.hardware import find_card
from harness.experiment.overrides import admitted
from harness.experiment.unlisted import experiment_from
from harness.predict.calibrations import machine_of
from harness.predict.capacity import verdict
from harness.predict.memory import predict
from harness.search.further import LEAST_GIB, further
from harness.search.layouts import WORTH, Search, best

CARD = find_card("h100-80gb")
MACHINE = machine_of(CARD)


def found(model: str, ranks: int, fixed=None, **settings: str):
    """The best layout, and what further settings bring in it."""
    search = Search(experiment_from(model, settings), ranks, CARD, MACHINE, fixed or {})
    layout = next(best(search))
    return search, layout, further(layout, search)


@pytest.mark.parametrize(("model", "ranks"), [("llama3-8b", 16), ("qwen3-30b-a3b", 16)])
def test_each_brings_time_or_memory_and_fits(model: str, ranks: int) -> None:
    search, layout, options = found(model, ranks, GBS="64")
    assert options
    for one in options:
        made = admitted(search.row, layout.experiment.overrides | one.option)
        assert made == one.experiment and predict(made).total == one.memory.total
        assert MACHINE.predict(made) == one.step and verdict(one.memory, CARD) == "fits"
        faster = one.step.total <= WORTH * layout.step.total
        assert faster or one.memory.total <= layout.memory.total - LEAST_GIB
    assert [one.step.total for one in options] == sorted(one.step.total for one in options)
    for one in options:
        assert one.other_arithmetic == bool(
            one.option.keys() & {"FP8", "FP4", "GRADIENTS", "OPTIMIZER_STATE"}
        )


def test_what_is_typed_does_not_vary() -> None:
    _, _, free = found("llama3-8b", 16, GBS="64")
    _, _, typed = found("llama3-8b", 16, {"recompute": "full"}, GBS="64", GRADIENTS="bf16")
    keys = {key for one in free for key in one.option}
    assert {"GRADIENTS", "FP8", "TP_OVERLAP", "OFFLOAD"} & keys == {"GRADIENTS", "FP8", "OFFLOAD"}
    assert not {"GRADIENTS", "RECOMPUTE"} & {key for one in typed for key in one.option}


def test_no_two_lead_to_the_same_experiment() -> None:
    _, _, options = found("llama3-8b", 16, GBS="64", OPTIMIZER_STATE="bf16")
    made = [one.experiment.model_copy(update={"overrides": {}}) for one in options]
    assert len({one.model_dump_json() for one in made}) == len(made)
    assert "GRADIENTS=bf16" in [one.settings for one in options]


def test_copies_of_the_optimizer_are_tried_by_number() -> None:
    """HSDP: each step of a ring over 4,096 ranks waits for a message."""
    fixed = {"tp": 1, "pp": 1, "cp": 1, "sharding": "optim"}
    _, _, options = found("gpt2-xl", 4096, fixed, GBS="4096", SEQ="1024")
    copies = [one.option["OPTIM_INSTANCES"] for one in options if "OPTIM_INSTANCES" in one.option]
    assert len(copies) == 1 and 4096 % int(copies[0]) == 0


def test_faster_prints_them(capsys) -> None:
    assert main(["faster", "222", "CARD=h200-141gb"]) == 0
    said = capsys.readouterr().out
    assert "not searched; each by itself in the first, by formula (*: other arithmetic)" in said
    assert "FP8=tensorwise*; no measured row has" in said


def test_a_layout_that_reserves_more_than_the_card_has_does_not_fit() -> None:
    """Fully sharded experts are gathered in pieces of different sizes, which leave holes: no share
    of the tensors bounds them."""
    settings = {"GPUS": "64", "GBS": "512", "EP": "8", "MBS": "2", "RECOMPUTE": "full"}
    e = experiment_from("gpt-oss-120b", settings | {"SHARDING": "fsdp_optim_grads_params"})
    memory = predict(e)
    assert memory.total < 60 and memory.in_all > 80
    assert verdict(memory, CARD) == "does not fit"


@pytest.mark.parametrize(
    ("key", "kernels", "recipes"),
    [
        ("a100-80gb", set(), {"FP4=nvfp4"}),
        ("h100-80gb", {"GROUPED_GEMM=cublas", "GROUPED_GEMM=fused"}, {"FP8=mxfp8", "FP4=nvfp4"}),
        ("b200-180gb", {"GROUPED_GEMM=cublas", "GROUPED_GEMM=fused"}, set()),
    ],
)
def test_what_the_card_has_not_is_not_offered(key, kernels, recipes) -> None:
    card = find_card(key)
    row = experiment_from("qwen3-30b-a3b", {"GBS": "64"})
    search = Search(row, 16, card, machine_of(card))
    offered = {one.settings for one in further(next(best(search)), search)}
    grouped = {one for one in offered if one.startswith("GROUPED_GEMM")}
    assert grouped <= kernels and (grouped or key != "h100-80gb")
    assert not offered & recipes
    assert ("FP4=nvfp4" in offered) == (key == "b200-180gb")
