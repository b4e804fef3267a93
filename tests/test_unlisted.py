"""An experiment from a model's name and typed settings, without a row."""

import pytest

from harness.errors import UserError
from harness.experiment.catalog import load_models
from harness.experiment.unlisted import experiment_from, nodes_of, row_of


def test_settings_are_read_as_typed():
    e = experiment_from(
        "llama3-8b",
        {
            "TP": "8",
            "PP": "4",
            "VPP": "2",
            "GPUS": "128",
            "GBS": "64",
            "SEQ": "4096",
            "FP8": "delayed",
        },
    )
    assert (e.tp, e.pp, e.vpp, e.cp, e.dp, e.nodes) == (8, 4, 2, 1, 4, 16)
    assert e.sequence_parallel and e.fp8_recipe == "delayed" and e.sharding == "optim"
    assert (e.global_batch_size, e.seq_length, e.num_microbatches) == (64, 4096, 16)
    assert e.model == load_models()["llama3-8b"]
    plain = {"TP": "4", "SP": "0", "SHARDING": "no_shard", "NODES": "1"}
    e = experiment_from("gpt2-8.3b", plain)
    assert not e.sequence_parallel and e.sharding == "no_shard" and e.world_size == 4


def test_layers_cut_the_model_and_are_in_its_name():
    e = experiment_from("llama3-8b", {"LAYERS": "12", "PP": "4"})
    assert e.model.num_layers == 12 and e.id == e.model.name == "llama3-8b-12-layers"
    assert e.model.hidden_size == 4096
    assert experiment_from("llama3-8b", {"LAYERS": "32"}).id == "llama3-8b"


@pytest.mark.parametrize(
    ("gpus", "nodes"), [(1, 1), (8, 1), (12, 2), (16, 2), (18, 3), (13, 13), (16_384, 2048)]
)
def test_nodes_are_the_fewest_with_equal_numbers_of_gpus(gpus, nodes):
    assert nodes_of(gpus) == nodes


@pytest.mark.parametrize(("gpus", "batch"), [(8, 512), (4096, 512), (8192, 1024), (16_384, 2048)])
def test_the_usual_batch_grows_with_the_gpus(gpus, batch):
    assert experiment_from("llama3-8b", {"GPUS": str(gpus), "TP": "8"}).global_batch_size == batch


def test_the_usual_sequence_is_that_of_the_positions():
    assert row_of(load_models()["gpt-22b"]).seq_length == 2048
    e = row_of(load_models()["mixtral-8x7b"])
    assert e.seq_length * e.global_batch_size == 2**22


@pytest.mark.parametrize(
    ("model", "settings", "complaint"),
    [
        ("llama3-8", {}, "MODEL=llama3-8; did you mean llama3-8b"),
        ("llama3-8b", {"GPUS": "16385"}, "GPUS=16385: at most 16,384"),
        ("llama3-8b", {"CARD": "h100"}, "CARD=h100: unknown GPU; did you mean h100-80gb"),
        ("llama3-8b", {"GPUS": "12", "TP": "8"}, r"llama3-8b: GPUS \(12\) must be divisible by TP x PP x CP"),
        ("llama3-8b", {"LAYERS": "none"}, "LAYERS=none: expected a whole number"),
        ("llama3-8b", {"LAYERS": "13", "PP": "2"}, r"layers \(13\) must be divisible by PP x VPP"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_the_way_out(model, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        experiment_from(model, settings)
