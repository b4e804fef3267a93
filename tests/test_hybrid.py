"""ENTRY=hybrid: a row's GPT as upstream's HybridModel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.hybrid import layer_pattern
from harness.parity import DENSE, MOE, flags, tiny
from harness.planning.miniature import miniature
from harness.predict.step_time import kinds
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import megatron_flags
from tests.miniature_runs import losses, run

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
GATED = {"add_bias_linear": False, "activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope"}  # fmt: skip


@pytest.mark.parametrize(
    ("id_", "changes", "pattern"),
    [
        ("101", {}, "*-" * 48),
        ("502", {}, "*E" * 16),
        ("408", {"vpp": 1}, "|".join(["*-" * 9] * 8)),
        ("408", {"vpp": 3}, "|".join(["*-" * 3] * 24)),
        ("408", {"vpp": 1, "first_stage_layers": 2}, "|".join(["*-" * 2, *["*-" * 10] * 7])),
    ],
)
def test_a_pattern_has_attention_and_mlp_of_each_layer_of_each_stage(id_, changes, pattern):
    assert layer_pattern(with_changes(CATALOG.find(id_), **changes)) == pattern


def test_latent_attention_and_dense_layers_before_experts():
    deepseek = miniature(CATALOG.find("941"))
    assert layer_pattern(deepseek).replace("|", "").startswith("+-+E+E")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_upstream_is_told_the_pattern_instead_of_layers_and_stages(device):
    row = with_changes(CATALOG.find("408"), entry="hybrid")
    words = [word for group in megatron_flags(row, device) for word in group]
    at = words.index("--hybrid-layer-pattern")
    assert words[at + 1] == layer_pattern(row)
    assert words[at + 2 : at + 5] == ["--spec", "harness.specs.hybrid", "stack_spec"]
    assert not {"--num-layers", "--num-virtual-stages-per-pipeline-rank"} & {*words}
    assert kinds(row) - kinds(CATALOG.find("408")) == {"a HybridModel"}


@pytest.mark.parametrize(
    ("id_", "changes", "what"),
    [
        ("620", {}, "window_size"),
        ("632", {}, "qk_norm projection"),
        ("703", {}, "SHARDING=fsdp_optim"),
        ("101", {"cuda_graphs": True}, "CUDA_GRAPHS=1"),
        ("802", {}, "LORA_RANK"),
        ("941", {"ep_overlap": False, "pp_layout": None}, "MTP"),
    ],
)
def test_what_a_hybrid_model_has_not_is_refused(id_, changes, what):
    with pytest.raises(UserError, match=f"ENTRY=hybrid does not have.*{what}.*set ENTRY=gpt"):
        with_changes(CATALOG.find(id_), entry="hybrid", **changes)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        pytest.param(DENSE, {}, id="dense", marks=pytest.mark.full),
        pytest.param(DENSE, GATED | {"qk_norm": "head", "num_query_groups": 2}, id="grouped and normed"),
        pytest.param(MOE, {"first_dense_layers": 1}, id="experts"),
    ],
)  # fmt: skip
def test_from_the_same_weights_losses_and_gradients_are_the_gpts(model, changes):
    experiment = with_changes(tiny(model.model_copy(update=changes), {}), entry="hybrid")
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # fmt: skip
    environ = os.environ | single
    settings = {one.name: one.value for one in variables(experiment, "cpu")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hybrid_equals_gpt.py"), *flags(experiment)],
        cwd=ROOT, env=environ | settings | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    line = next((one for one in done.stderr.splitlines() if one.startswith("SAID ")), None)
    assert line, done.stderr[-3000:]
    said = json.loads(line.removeprefix("SAID "))
    assert said["missing"] == said["unexpected"] == []
    assert said["parameters"][0] == said["parameters"][1]
    assert said["losses"][0] == pytest.approx(said["losses"][1], rel=1e-6)
    assert said["gradients_apart"] < 1e-5


@pytest.mark.cpu
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("101",), id="dense", marks=pytest.mark.full),
        pytest.param(("408", "VPP=1"), id="pipeline", marks=pytest.mark.full),
        pytest.param(("502", "GPUS=2", "EP=2"), id="experts", marks=pytest.mark.full),
    ],
)
def test_either_model_goes_on_from_the_others_checkpoint(tmp_path, words):
    from harness.convert import torch_dist

    saving = (*words, "SAVE=1", "EVAL_STEPS=0")
    first = {entry: tmp_path / entry for entry in ("gpt", "hybrid")}
    run(first["gpt"], *saving, "STEPS=4")
    shutil.copytree(first["gpt"], first["hybrid"])
    whole = {
        entry: run(outdir, *saving, "RESUME=1", "FORCE=1", "STEPS=6", f"ENTRY={entry}")
        for entry, outdir in first.items()
    }
    assert losses(whole["hybrid"]) == pytest.approx(losses(whole["gpt"]), rel=1e-5)
    saved = {
        entry: torch_dist.TorchDistCheckpoint(torch_dist.latest(path / "checkpoints"))
        for entry, path in whole.items()
    }
    tensors = {
        entry: {key: shape for key, shape in one.shapes.items() if "_extra_state" not in key}
        for entry, one in saved.items()
    }
    assert tensors["hybrid"] == tensors["gpt"] and any("exp_avg" in key for key in tensors["gpt"])
    back = run(first["hybrid"], *saving, "RESUME=1", "FORCE=1", "STEPS=8", "ENTRY=gpt")
    on = run(first["gpt"], *saving, "RESUME=1", "STEPS=8")
    assert losses(back) == pytest.approx(losses(on), rel=1e-5)
