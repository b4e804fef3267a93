"""make plan, and predictions as JSON."""

import json
import shutil

import pytest

from harness.cli import main
from harness.evidence import plans
from harness.evidence.predictions import KEYS, extrapolated
from harness.experiment.catalog import EXPERIMENTS, load_catalog
from harness.experiment.overrides import experiment_of
from harness.experiment.unlisted import experiment_from
from harness.predict import calibrations
from harness.predict.memory import predict
from harness.predict.step_time import StepTime
from harness.search.layouts import Search, best

H100 = calibrations.load()["h100-tutorial"]
SMALL = ["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "GBS=32", "SEQ=4096"]


def said(capsys, *words, status=0):
    assert main(list(words)) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def test_a_plan_names_layouts_their_cost_and_the_target(capsys):
    printed = said(capsys, "plan", *SMALL, "TOKENS=1e12")
    assert printed.startswith(
        "llama3-8b: 8.0 billion parameters on 8 x NVIDIA H100 80GB HBM3, 1 node; 32 sequences of 4,096 tokens per step"
    )
    command = next(line for line in printed.splitlines() if "to run the first: make 611" in line)
    run = experiment_of(command.partition("make ")[2], load_catalog())
    first = json.loads(said(capsys, "plan", *SMALL, "FORMAT=json"))[0]
    assert (run.global_batch_size, run.seq_length, run.world_size) == (32, 4096, 8)
    assert H100.predict(run).total == pytest.approx(first["step_ms"], abs=0.01)
    days = 1e12 / (32 * 4096) * first["step_ms"] / 1e3 / 86_400
    assert f"1e+12 tokens: {days:,.1f} days, {days * 24 * 8:,.0f} GPU-hours" in printed


def test_json_has_the_documented_keys(capsys):
    more = {"tokens_per_day", "gpu_hours", "make"}
    for words, own in (
        (["plan", *SMALL, "TOKENS=1e9", "FORMAT=json"], more),
        (["memory", "101", "CARD=h100-80gb", "FORMAT=json"], set()),
        (["speed", "101", "CARD=h100-80gb", "FORMAT=json"], set()),
        (["faster", "101", "CARD=h100-80gb", "FORMAT=json"], set()),
        (["gpus", "101", "CARD=h100-80gb", "FORMAT=json"], set()),
    ):
        found = json.loads(said(capsys, *words))
        assert found
        assert ("further" in found[0]) == bool(own)
        for one in found:
            assert one.keys() - own - {"further"} == KEYS.keys() and one["card"] == "h100-80gb"
            if one["step_ms"]:
                assert sum(one["pieces"].values()) == pytest.approx(one["step_ms"], abs=0.1)
    alone = json.loads(said(capsys, "memory", "101", "CARD=h100-80gb", "FORMAT=json"))[0]
    assert alone["used_gib"] == round(predict(load_catalog().find("101")).in_all, 2)
    assert (alone["step_ms"], alone["experiment"], alone["fits"]) == (None, "101", "fits")


def test_sizes_that_are_typed_do_not_vary(capsys):
    found = json.loads(said(capsys, "plan", *SMALL, "TP=4", "MBS=2", "CP=1", "FORMAT=json"))
    assert found and all("TP=4" in one["experiment"] for one in found)
    assert all("MBS=2" in one["experiment"] and "CP=" not in one["experiment"] for one in found)
    across = json.loads(
        said(
            capsys, "plan", "MODEL=llama3-8b", "GPUS=16", "CARD=h100-80gb", "GBS=32", "FORMAT=json"
        )
    )
    assert not any("TP=16" in one["experiment"] for one in across), "not across nodes unless asked"


def test_a_row_to_paste_makes_the_experiment(tmp_path):
    e = experiment_from("llama3-70b", {"CARD": "h100-80gb", "GBS": "64"})
    planned = next(
        best(Search(e, 64, H100.card, H100, {"tp": 8, "micro_batch_size": 1}))
    ).experiment
    folder = tmp_path / "experiments"
    shutil.copytree(EXPERIMENTS, folder)
    with (folder / "600-models.yaml").open("a") as file:
        file.write(f"  {plans.row(planned).replace('999', '699')}\n")
    pasted = load_catalog(folder).find("699")
    for name in ("model", "nodes", "dp", "global_batch_size", "seq_length", *plans.LAID_OUT):
        assert getattr(pasted, name) == getattr(planned, name), name


def test_what_bounds_a_step_are_its_largest_pieces():
    step = StepTime(
        **dict.fromkeys(StepTime.__dataclass_fields__, 0.0)
        | {"products": 50.0, "exchange": 20.0, "gradients": 15.0, "bubble": 10.0, "launches": 5.0}
    )
    assert list(plans.bounds(step)) == [
        ("products", 0.5),
        ("communication", pytest.approx(0.35)),
        ("bubble", 0.1),
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["MODEL=lama3-8b", "GPUS=8", "CARD=h100-80gb"], "MODEL=lama3-8b; did you mean llama3-8b"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100"], "CARD: unknown GPU; did you mean h100-80gb"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h300"], "did you mean h100-pcie-80gb, h100-80gb"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "OFFLOAD=2"], "a number from 0 to 1"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "CP_COMM_TYPE=a2a+p2p", "CP=8", "CP_A2A=3"], "try CP_A2A in {2, 4}"),
        (["MODEL=llama3-8b", "GPUS=99999", "CARD=h100-80gb"], "GPUS=99999: at most 16,384"),
        (["MODEL=llama3-8b", "GPUS=7", "CARD=h100-80gb"], "GPUS=7: no layout of llama3-8b with batches of 512 divides them\nnearest that do: GPUS=6 or GPUS=8"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "TP=3"], "GPUS (8) must be divisible by TP x PP x CP (3"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "FORMAT=xml"], "FORMAT=xml; valid: terminal, json"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "TOKENS=0"], "TOKENS=0"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=a100-80gb", "FP8=delayed"], "A100"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_the_way_out(capsys, words, complaint):
    assert complaint in said(capsys, "plan", *words, status=2)


@pytest.mark.parametrize(
    ("words", "name", "apart"),
    [
        (["MODEL=llama3-8b", "CARD=a10-24gb", "GBS=32", "SEQ=4096"], "NVIDIA A10", 1),
        (["MODEL=llama3.1-405b", "CARD=h100-80gb"], "NVIDIA H100 80GB HBM3", 8),
    ],
)
def test_what_fits_no_layout_is_told_the_smallest_that_works(capsys, words, name, apart):
    refused = said(capsys, "plan", *words, "GPUS=1", status=2)
    assert f" does not fit 1 x {name} in any layout\nsmallest that works" in refused
    gpus = int(refused.partition("GPUS=")[2].split()[0])
    assert gpus > 1 and gpus % apart == 0
    assert (
        json.loads(said(capsys, "plan", *words, f"GPUS={gpus}", "FORMAT=json"))[0]["fits"] == "fits"
    )
    said(capsys, "plan", *words, f"GPUS={gpus - apart}", status=2)


def test_more_gpus_than_any_public_row_are_marked():
    few, many = (
        experiment_from("llama3-8b", {"GPUS": str(n), "GBS": "8192"}) for n in (4096, 8192)
    )
    assert extrapolated(few) == [] and extrapolated(many) == ["extrapolated: more than 6,144 GPUs"]
