"""Textbook formulas against their papers' numbers and against what runs measured."""

import pytest

from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.predict.formulas import (
    OF_EXPERIMENT,
    activations_per_sbh,
    attention_exchange_mib,
    idle_share,
)


def find(id_: str, **changes: object) -> Experiment:
    return with_changes(load_catalog().find(id_), **changes)


@pytest.mark.parametrize(
    ("id_", "changes", "units"),
    [
        ("281", {"tp": 1}, 34),
        ("281", {}, 10 + 24 / 8),
        ("282", {}, 34 / 8),
        ("283", {}, 2),
        ("283", {"sequence_parallel": True}, 2 / 8),
        ("304", {}, 34),
    ],
)
def test_activations_of_a_layer(id_: str, changes: dict, units: float) -> None:
    assert activations_per_sbh(find(id_, **changes)) == units


def test_a_narrower_mlp_keeps_less_of_its_own_width_alone() -> None:
    """Its first matrix's output and GELU's; inputs and masks are as wide as the hidden state."""
    e = find("281", tp=1)
    half = with_changes(
        e, model=e.model.model_copy(update={"ffn_hidden_size": 2 * e.model.hidden_size})
    )
    assert activations_per_sbh(half) == 34 - 2 * 4


def test_only_gpt2_layers_are_the_papers() -> None:
    assert activations_per_sbh(find("500")) is None
    assert activations_per_sbh(find("611")) is None, "a gated MLP, and fewer keys than queries"


def test_bubbles() -> None:
    assert idle_share(find("401")) == 7 / 8
    assert idle_share(find("438")) == pytest.approx(7 / 31)
    assert idle_share(find("420")) == 0


def test_bytes_exchanged() -> None:
    piece = 8 * 4096 * 1536 * 2 / 2**20
    assert (
        attention_exchange_mib(find("308"))
        == attention_exchange_mib(find("318"))
        == pytest.approx(2 * 7 / 8 * piece)
    )
    assert attention_exchange_mib(find("328")) == pytest.approx(4 * 7 / 64 * piece)
    assert attention_exchange_mib(find("300")) is None


@pytest.mark.parametrize(("name", "id_", "value"), [
    ("parameters_b", "611", 8.03), ("active_b", "641", 12.9), ("parameters_per_rank_b", "408", 8.3 / 8 * 1.1), ("step_pflop", "111", 0.15),
])  # fmt: skip
def test_units_are_those_of_the_name(name: str, id_: str, value: float) -> None:
    """Sizes as published, the first of eight stages with the embeddings; 111 in its published 393 ms at 389 TFLOP/s."""
    assert OF_EXPERIMENT[name](find(id_)) == pytest.approx(value, rel=0.1)
