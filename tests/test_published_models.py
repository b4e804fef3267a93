"""Models of models.yaml that no small row trains: their published sizes, and upstream's view of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.convert.architectures import architecture_of
from harness.errors import UserError
from harness.experiment.catalog import load_models
from harness.experiment.constraints import with_changes
from harness.experiment.model import LatentAttention, Lora
from harness.experiment.unlisted import row_of
from harness.predict.flops import count_parameters, parameters_on, step_flops, upstream_flops
from harness.upstreams.megatron_lm.flags import megatron_flags
from tests.build_published import tiny_row

ROOT = Path(__file__).parents[1]
MODELS = load_models()

PUBLISHED = {
    # safetensors parameters as the model's page on Hugging Face counts them; of GPT-OSS as its model card does, unquantised
    "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "gpt-oss-120b": 116_829_156_672,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2": 235_741_434_880,
}
BILLIONS = {
    # Narayanan et al. 2021, table 1; Korthikanti et al. 2022, table 3; upstream's README; Brown et al. 2020; NeMo's names
    "gpt-1.7b-2021": (1.7, 0.05),
    "gpt-3.6b": (3.6, 0.05),
    "gpt-7.5b": (7.5, 0.05),
    "gpt-18b": (18.4, 0.1),
    "gpt-39b": (39.1, 0.05),
    "gpt-76b": (76.1, 0.1),
    "gpt-146b": (145.6, 0.1),
    "gpt-310b": (310.1, 0.1),
    "gpt-530b": (529.6, 0.05),
    "gpt-1t": (1008.0, 0.05),
    "gpt-22b": (22, 0.5),
    "gpt-1.7b": (1.7, 0.05),
    "gpt-16b": (16, 0.5),
    "gpt-32b": (32, 0.51),
    "gpt-119b": (119, 0.6),
    "gpt-177b": (177, 0.5),
    "gpt-462b": (462, 0.5),
    "gpt3-175b": (175, 0.5),
    "gpt3-5b": (5, 0.1),
    # 9.4 billion in embeddings, 331.6 in the rest (arXiv:2406.11704, section 2)
    "nemotron-340b": (341.0, 0.05),
    "nemotron-22b": (22, 0.8),
}
ACTIVE_B = {
    # GPT-OSS leaves its input embedding out (model card: 5.13)
    "gpt-oss-120b": (5.13, MODELS["gpt-oss-120b"].hidden_size * 201_088),
    "qwen3-235b-a22b": (22.19, 0),
    "deepseek-v2": (21.4, 0),
    "deepseek-v3": (37.55, 0),
}
NEW_PARTS = ("llama3.1-405b", "gpt-oss-120b", "qwen3-235b-a22b", "deepseek-v2", "deepseek-v3", "nemotron-340b")  # fmt: skip


def without_prediction(name):
    model = MODELS[name]
    return row_of(model.model_copy(update={"mtp_num_layers": None}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name):
    assert count_parameters(row_of(MODELS[name])).total == PUBLISHED[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_published_billions(name):
    billions, rounding = BILLIONS[name]
    counted = count_parameters(row_of(MODELS[name])).total / 1e9
    assert counted == pytest.approx(billions, abs=rounding)


def test_deepseek_v3_has_671_billion_parameters_and_more_to_predict_a_second_token():
    """DeepSeek-AI 2024 (arXiv:2412.19437): 671B in all; the released module for the second token has 11.6B besides the embedding it shares."""
    main = count_parameters(without_prediction("deepseek-v3")).total
    assert main == 671_026_404_352
    assert count_parameters(row_of(MODELS["deepseek-v3"])).total - main == 11_610_067_968


@pytest.mark.parametrize("name", ACTIVE_B)
def test_active_parameters(name):
    billions, left_out = ACTIVE_B[name]
    active = count_parameters(without_prediction(name)).active - left_out
    assert active / 1e9 == pytest.approx(billions, abs=0.03)


@pytest.mark.cpu
def test_upstream_builds_these_models(tmp_path):
    """Built by upstream on the meta device, with few layers: as many parameters, and FLOPs by its own formula."""
    result = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "build_published.py"), str(result), *NEW_PARTS]
    environment = os.environ | {"HARNESS_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {name: tiny_row(name) for name in NEW_PARTS}
    assert json.loads(result.read_text()) == {
        name: [count_parameters(row).total, upstream_flops(row)] for name, row in rows.items()
    }


def test_upstream_counts_norms_of_latent_attention_and_of_prediction_as_products():
    e = without_prediction("deepseek-v3")
    tokens = e.global_batch_size * e.seq_length
    assert upstream_flops(e) - step_flops(e) == 6 * tokens * 61 * (1536 + 512)
    whole = row_of(MODELS["deepseek-v3"])
    assert upstream_flops(whole) - step_flops(whole) == 6 * tokens * (62 * (1536 + 512) + 3 * 7168)


def test_prediction_costs_a_layer_a_projection_and_the_output_layer():
    without, with_it = without_prediction("deepseek-v3"), row_of(MODELS["deepseek-v3"])
    m, tokens = with_it.model, with_it.global_batch_size * with_it.seq_length
    attention = sum((7168 * 1536, 1536 * 128 * 192, 7168 * 576, 512 * 128 * 256, 128 * 128 * 7168))
    experts = 3 * 7168 * 2048 * (8 + 1)
    squares = with_it.global_batch_size * with_it.seq_length**2
    assert (
        step_flops(with_it) - step_flops(without)
        == 6 * tokens * (attention + experts + 2 * 7168**2 + 7168 * m.vocab_size)
        + 3 * 128 * (192 + 128) * squares
    )


def test_stages_hold_their_own_kinds_of_layers():
    """Three dense layers lie on the first of four stages; the last one has the predicting layer, both embeddings, and no more."""
    e = with_changes(
        row_of(MODELS["deepseek-v3"].model_copy(update={"num_layers": 16})), pp=4, ep=8, dp=8
    )
    one = with_changes(e, pp=1)
    stages = [parameters_on(e, stage) for stage in range(4)]
    assert stages[1] == stages[2] and stages[0].experts * 4 == stages[1].experts
    embedding = 7168 * 129_280
    whole = parameters_on(one, 0)
    assert sum(stage.dense for stage in stages) == whole.dense + embedding
    assert sum(stage.experts for stage in stages) == whole.experts
    assert stages[3].ends == 2 * embedding + 7168


def test_tensor_parallel_ranks_hold_whole_projections_down():
    e = row_of(MODELS["deepseek-v3"])
    two = with_changes(e, tp=2, sequence_parallel=True)
    whole = 62 * 7168 * (1536 + 576)
    assert 2 * parameters_on(two, 0).matrices - parameters_on(e, 0).matrices == whole


def words(e, device="cuda"):
    return " ".join(word for group in megatron_flags(e, device) for word in group)


def test_deepseek_v3_is_spelled_as_upstreams_example():
    """examples/megatron_fsdp/sbatch_mfsdp_deepseek_v3.sh; the weight of the second token's loss is the paper's first."""
    said = words(row_of(MODELS["deepseek-v3"]))
    for part in (
        "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128",
        "--qk-pos-emb-head-dim 64 --v-head-dim 128 --position-embedding-type rope",
        "--rotary-scaling-factor 40.0 --mscale 1.0 --mscale-all-dim 1.0",
        "--qk-layernorm",
        "--enable-experimental",
        "--moe-layer-freq [0]*3+[1]*58 --moe-shared-expert-intermediate-size 2048",
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
        "--moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-topk-scaling-factor 2.5",
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001",
        "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.3",
    ):
        assert part in said
    assert "--group-query-attention" not in said and "--yarn" not in said


def test_nemotron_is_spelled_as_published():
    said = words(row_of(MODELS["nemotron-340b"]))
    assert "--squared-relu" in said and "--rotary-percent 0.5" in said


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_query_groups": 8}, "latent attention has no num_query_groups"),
        ({"position_embedding": "learned_absolute", "yarn": None}, "needs position_embedding rope"),
        ({"qk_norm": "projection"}, "needs qk_norm head or none"),
        ({"first_dense_layers": 61}, r"first_dense_layers \(61\) must be below num_layers \(61\)"),
        ({"num_experts": None}, "need num_experts"),
        ({"add_bias_linear": True}, "shared expert has no biases"),
        ({"moe_router_score_function": "softmax"}, "expert_bias needs moe_router_score_function"),
        ({"moe_router_group_topk": None}, "set both or neither"),
        ({"moe_router_num_groups": 7}, r"experts \(256\) must be divisible by .* \(7\)"),
        ({"moe_router_group_topk": 9, "moe_router_topk": 16}, r"group_topk \(9\) must be at most"),
        ({"moe_router_num_groups": 256}, r"topk \(8\) exceeds the experts in 4 of 256 groups"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5 needs position_embedding rope"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, complaint):
    row = row_of(MODELS["deepseek-v3"])
    with pytest.raises(UserError, match=complaint):
        with_changes(row, model=row.model.model_copy(update=changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cuda_graphs": True}, "MTP is not tested with CUDA graphs"),
        (
            {"lora": Lora(rank=8, alpha=16.0)},
            "not tested with latent attention, multi-token prediction, a shared expert",
        ),
        ({"tp": 3}, r"moe_shared_expert_intermediate_size \(2048\) must be divisible by TP \(3\)"),
    ],
)
def test_what_is_not_tested_is_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        with_changes(row_of(MODELS["deepseek-v3"]), **changes)


def test_upstream_fixes_some_of_yarn():
    row = row_of(MODELS["deepseek-v3"])
    yarn = row.model.yarn.model_copy(update={"beta_fast": 16.0})
    with pytest.raises(UserError, match=r"latent attention has beta_fast 32\.0, not 16"):
        with_changes(row, model=row.model.model_copy(update={"yarn": yarn}))


DEEPSEEK = MODELS["deepseek-v3"].model_copy(
    update={
        "name": "tiny-deepseek",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 255,
        "latent_attention": LatentAttention(
            q_lora_rank=16, kv_lora_rank=8, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=8
        ),
        "first_dense_layers": 1,
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    }
)
# Upstream averages the loss of later tokens within a rank's part of the sequence, so context parallelism weighs tokens otherwise
ONE_TOKEN = DEEPSEEK.model_copy(update={"name": "tiny-deepseek-1", "mtp_num_layers": None})
DENSE = DEEPSEEK.model_copy(
    update={
        "name": "tiny-dense",
        "num_experts": None,
        "first_dense_layers": 0,
        "moe_shared_expert_intermediate_size": None,
    }
)
LAYOUTS = """{
    "tp2 sp ep2": (DEEPSEEK, {"tp": 2, "sequence_parallel": True, "ep": 2}),
    "pp2 vpp2": (DEEPSEEK, {"pp": 2, "vpp": 2}),
    "dp2 ep2 zero": (DEEPSEEK, {"dp": 2, "ep": 2, "sharding": "optim"}),
    "tp2": (DENSE, {"tp": 2}),
    "cp2 p2p": (ONE_TOKEN, {"cp": 2}),
    "cp2 a2a": (ONE_TOKEN, {"cp": 2, "cp_comm_type": "a2a"}),
}"""
PARITY = f"""
import sys
from harness import parity
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_published_models import DEEPSEEK, DENSE, ONE_TOKEN
parity.LAYOUTS = {LAYOUTS}
sys.exit(parity.main())
"""


@pytest.mark.cpu
def test_latent_attention_and_prediction_train_alike_under_every_parallelism():
    """Losses of every layout, and of the harness's own script, equal those of one process with upstream's."""
    command = [sys.executable, "-c", PARITY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    own = "harness's own script" in done.stdout
    assert own == bool(os.environ.get("MEGATRON_LM"))
    assert done.stdout.count(" equal") == 3 + 6 + 3 * own, done.stdout


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3", "nemotron-340b"])
def test_weights_of_these_are_not_converted(name):
    with pytest.raises(UserError, match="none of the supported architectures of Hugging Face"):
        architecture_of(MODELS[name])
