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


@pytest.mark.parametrize(
    ("model", "words", "fields"),
    [
        ("llama3-70b", ["TP_OVERLAP=1"], {"tp_overlap": True}),
        ("llama3-70b", ["OPTIM_INSTANCES=2"], {"optimizer_instances": 2, "tp_overlap": False}),
        ("llama3-70b", ["RECOMPUTE_MODULES=core_attn,mlp"], {"recompute_modules": ("core_attn", "mlp")}),
        ("llama3-70b", ["PP=8", "LAST_STAGE_LAYERS=3", "GBS=512"], {"last_stage_layers": 3}),
        ("qwen3-30b-a3b", ["EP_OVERLAP=1", "MOE_DISPATCHER=flex"], {"ep_overlap": True, "moe_dispatcher": "flex"}),
    ],
)  # fmt: skip
def test_settings_that_one_gpu_cannot_have_are_planned_with(capsys, model, words, fields):
    found = json.loads(
        said(capsys, "plan", f"MODEL={model}", "GPUS=64", "CARD=h100-80gb", *words, "FORMAT=json")
    )
    catalog = load_catalog()
    makes = [one["make"] for one in found if one["make"]]
    assert makes
    for command in makes:
        run = experiment_of(command, catalog)
        assert {name: getattr(run, name) for name in fields} == fields, command


def test_the_target_of_a_plan_runs_what_was_planned():
    row = experiment_from("llama3-70b", {"GBS": "512"})
    planned = next(best(Search(row, 64, H100.card, H100))).experiment
    assert load_catalog().find("901").tp_overlap and not planned.tp_overlap
    run = experiment_of(plans.command_of(planned), load_catalog())
    assert not run.tp_overlap
    assert H100.predict(run).total == pytest.approx(H100.predict(planned).total)
    assert predict(run).total == predict(planned).total


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
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "TP=1", "TP_OVERLAP=1"], "set SP=1 (TP > 1)"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "EP_OVERLAP=1"], "llama3-8b has none"),
        (["MODEL=llama3-8b", "GPUS=8", "CARD=h100-80gb", "RECOMPUTE_MODULES=foo"], "valid: core_attn"),
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


@pytest.mark.full
def test_gpus_says_what_more_settings_would_bring(capsys):
    printed = said(capsys, "gpus", "222", "CARD=h200-141gb")
    assert "not searched; each by itself in the layout of 2" in printed
    assert "GRADIENTS=bf16" in printed.partition("not searched")[2]
