"""The models of chapters 600 and 700: their published sizes, upstream's view of them, and training with what they are made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness import parity
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.model import Model
from harness.machine.requirements import check_machine
from harness.parity import tiny
from harness.planning.miniature import describe, miniature
from harness.predict.flops import (
    count_parameters,
    padded_vocab_size,
    state_gib,
    state_of_parameter,
    upstream_flops,
)
from harness.run.directory import RUN_DIR_VARIABLE, RunDir
from harness.upstreams.megatron_lm.environment import GROUPED_GEMM, variables
from harness.upstreams.megatron_lm.flags import megatron_flags

CATALOG = load_catalog()
ROWS = CATALOG.in_chapter(600) + CATALOG.in_chapter(700)
ROOT = Path(__file__).parents[1]

PUBLISHED = {
    # safetensors parameters as the model's page on Hugging Face counts them; of GPT-OSS as its model card does, unquantised;
    # of Nemotron-H as the tensors of its released files add up
    "611": 8_030_261_248,
    "620": 20_914_757_184,
    "631": 6_919_161_856,
    "641": 46_702_792_704,
    "651": 30_532_122_624,
    "681": 8_100_852_736,
}
ACTIVE_B = {"620": 3.61, "631": 1.28, "641": 12.9, "651": 3.35}
"""Billions a token passes through, as published; GPT-OSS leaves its input embedding out."""


@pytest.mark.parametrize("id_", PUBLISHED)
def test_published_parameters(id_):
    assert count_parameters(CATALOG.find(id_)).total == PUBLISHED[id_]


@pytest.mark.parametrize("id_", ACTIVE_B)
def test_active_parameters(id_):
    e = CATALOG.find(id_)
    words = e.model.hidden_size * e.model.vocab_size if id_ == "620" else 0
    assert (count_parameters(e).active - words) / 1e9 == pytest.approx(ACTIVE_B[id_], rel=0.002)


def test_what_upstream_calls_857m_is_the_345m():
    small, called_857m = CATALOG.find("601"), CATALOG.find("602")
    assert (
        count_parameters(called_857m).total - count_parameters(small).total == 1024 * 1024
    )  # its longer position embedding
    assert count_parameters(CATALOG.find("603")).total == pytest.approx(760e6, rel=0.005)


def test_gated_attention_is_compared_at_equal_parameters():
    baseline, gated = (count_parameters(CATALOG.find(id_)).total for id_ in ("661", "662"))
    assert gated != baseline and abs(gated / baseline - 1) < 0.001


def test_rows_to_compare_differ_in_one_thing():
    def settings(id_, *without):
        return {
            k: v
            for k, v in CATALOG.find(id_)
            if k not in {"id", "slug", "chapter", "shows", *without}
        }

    bf16 = settings("611", "precision", "fp8_recipe")
    assert all(settings(id_, "precision", "fp8_recipe") == bf16 for id_ in ("612", "613", "614"))
    for id_, changed in {
        "621": ["optimizer_state"],
        "622": ["recompute", "recompute_modules"],
        "623": ["recompute"],
        "624": ["cross_entropy_fusion"],
    }.items():
        assert settings(id_, *changed) == settings("620", *changed) and settings(id_) != settings(
            "620"
        )
    assert all(settings(f"70{n}", "sharding") == settings("701", "sharding") for n in range(2, 7))
    assert settings("702", "published_data") == settings("124", "published_data")
    assert settings("711", "sharding") == settings("611", "sharding")
    assert settings("671", "optimizer") == settings("661", "optimizer")


def test_state_follows_from_sharding_and_precision():
    e = CATALOG.find("702")
    states = {
        "no_shard": 18,
        "optim": 9,
        "fsdp_optim": 7,
        "fsdp_optim_grads": 5.5,
        "fsdp_optim_grads_params": 4,
        "torch_fsdp2": 4,
    }
    for sharding, expected in states.items():
        assert state_of_parameter(with_changes(e, sharding=sharding), 4).total == expected
    assert state_of_parameter(CATALOG.find("621"), 1).total == 12
    assert state_of_parameter(CATALOG.find("641"), 1).total == 10
    assert state_of_parameter(CATALOG.find("671"), 1).total == 14


@pytest.mark.parametrize(
    ("recipe", "optimizer"), [("delayed", 6), ("tensorwise", 8), ("blockwise", 8), ("mxfp8", 8)]
)
def test_fp8_weights_scaled_now_keep_whole_fp32_ones(recipe, optimizer):
    row = with_changes(
        CATALOG.find("611"), precision="fp8", fp8_recipe=recipe, optimizer_state="bf16"
    )
    assert state_of_parameter(row, 4).total == 6 + optimizer / 4


def test_nvfp4_weights_keep_of_fp32_ones_what_bf16_lacks():
    """use_precision_aware_optimizer_no_fp8_or_ds_fp8 in optimizer_config.py asks for fp8's recipe only."""
    row = with_changes(
        CATALOG.find("611"), precision="fp4", fp4_recipe="nvfp4", optimizer_state="bf16"
    )
    assert state_of_parameter(row, 4).total == 6 + 6 / 4


@pytest.mark.parametrize(
    "id_",
    ["620", "621", "625", "631", "632", "641", "642", "651", "681", "682", "611", "711", "713"],
)
def test_state_leaves_room_on_the_gpus_meant(id_):
    """139.8 GiB of an H200 less 3 GiB for CUDA and NCCL; a quarter of it for activations."""
    assert state_gib(CATALOG.find(id_)) < (139.8 - 3) * (0.85 if id_ == "641" else 0.75)


def test_mixtral_fits_four_gpus_only_with_bf16_gradients():
    e = CATALOG.find("641")
    assert state_gib(with_changes(e, gradients="fp32")) > 0.95 * 139.8


@pytest.mark.parametrize(
    ("id_", "changes", "complaint"),
    [
        ("611", {"precision": "fp8"}, "fp8, and nothing else, needs a recipe"),
        ("612", {"precision": "bf16"}, "fp8, and nothing else, needs a recipe"),
        ("612", {"card": "a100-80gb"}, "NVIDIA A100 80GB SXM4 has none|NVIDIA A100.* has none"),
        ("614", {"seq_length": 8200}, r"blocks of 128: .* MBS x SEQ / CP \(8200\)"),
        ("621", {"sharding": "no_shard"}, "OPTIMIZER_STATE=bf16 is for Adam with SHARDING=optim"),
        ("111", {"offload": 0.5}, "OFFLOAD=0.5 is for Adam with SHARDING=optim"),
        ("621", {"offload": 1.0}, "the host keeps moments in fp32; leave out OPTIMIZER_STATE=bf16"),
        ("613", {"offload": 1.0, "fp8_params": True, "sharding": "optim"}, "needs FP8=delayed"),
        (
            "622",
            {"precision": "fp8", "fp8_recipe": "delayed"},
            "fp8 delayed cannot recompute layernorm, moe_act",
        ),
        (
            "622",
            {"recompute": "full"},
            "recompute_modules layernorm, moe_act needs RECOMPUTE=selective",
        ),
        (
            "620",
            {"ep": 2, "etp": 2, "tp": 2, "dp": 2, "sequence_parallel": True},
            "upstream splits only experts without biases; set ETP=1",
        ),
        (
            "620",
            {"cp": 2, "dp": 2},
            "windows and sinks need context parallelism by CP_COMM_TYPE=a2a",
        ),
        ("631", {"tp": 3}, "num_attention_heads \\(16\\) must be divisible by TP \\(3\\)"),
        (
            "300",
            {"cuda_graphs": True},
            "a CUDA graph of a layer cannot be recomputed; set RECOMPUTE=none",
        ),
        (
            "111",
            {"cuda_graphs": True, "recompute": "selective"},
            "dropout of recomputed attention; set DROPOUT=0",
        ),
        ("811", {"cuda_graphs": True}, "CUDA graphs are not tested with adapters"),
        ("101", {"cuda_graphs": ("moe_router",)}, "gpt2-xl has no experts; leave moe_router out"),
        ("631", {"cuda_graphs": ("moe_preprocess",)}, "moe_preprocess needs moe_router beside it"),
        ("631", {"cuda_graphs": ("attn", "mlp")}, "experts cannot be captured; leave mlp out"),
        (
            "631",
            {"cuda_graphs": True, "recompute": "selective", "recompute_modules": ("moe",)},
            "recomputed experts cover the graph of the router",
        ),
        (
            "631",
            {"cuda_graphs": ("moe_router", "moe_preprocess"), "moe_capacity": 1.0},
            "with MOE_CAPACITY counts go to the CPU there; leave moe_preprocess out",
        ),
        ("703", {"cuda_graphs": True}, "hooks by which fsdp_optim gathers weights"),
        ("705", {"optimizer": "muon"}, "upstream's muon works with SHARDING=no_shard or optim"),
        (
            "706",
            {"pp": 2, "dp": 2},
            "torch FSDP2 works with neither pipeline nor expert parallelism",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(id_, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        with_changes(CATALOG.find(id_), **changes)


def test_a_gpu_without_fp8_and_a_missing_optimizer_are_told_before_the_run(monkeypatch):
    gpu = type("Gpu", (), {"name": "NVIDIA A100-SXM4-80GB"})
    monkeypatch.setattr("harness.machine.requirements.list_gpus", lambda: (gpu,))
    check_machine(CATALOG.find("611"), "cuda")
    check_machine(CATALOG.find("613"), "cpu")
    with pytest.raises(
        UserError, match="613 computes in fp8, which NVIDIA A100-SXM4-80GB does not"
    ):
        check_machine(CATALOG.find("613"), "cuda")
    grouped = with_changes(CATALOG.find("632"), grouped_gemm="cublas")
    check_machine(grouped, "cpu")
    with pytest.raises(UserError, match="632: GROUPED_GEMM=cublas does not run on NVIDIA A100"):
        check_machine(grouped, "cuda")
    monkeypatch.setattr("harness.machine.requirements.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="671: upstream's muon needs the package emerging-optimizers"
    ):
        check_machine(CATALOG.find("671"), "cpu")


@pytest.mark.parametrize("kernel", ["streams", *GROUPED_GEMM])
def test_products_of_experts_are_chosen_by_a_variable(kernel):
    row = with_changes(CATALOG.find("632"), recompute="none", recompute_modules=())
    grouped = with_changes(row, grouped_gemm=kernel)
    of_them = {
        one.name: one.value
        for one in variables(grouped, "cuda")
        if one.name in {name for names in GROUPED_GEMM.values() for name in names}
    }
    assert of_them == dict.fromkeys(GROUPED_GEMM.get(kernel, ()), "1")
    assert miniature(grouped).grouped_gemm == "streams"


@pytest.mark.parametrize(
    ("id_", "changes", "flag", "on_a_cpu"),
    [
        ("502", {"router_fusion": True}, "--moe-router-fusion", False),
        ("632", {"grouped_gemm": "fused", "recompute": "none", "recompute_modules": ()}, "--moe-single-grouped-weight", False),
        ("625", {"grouped_gemm": "fused", "recompute": "none", "recompute_modules": ()}, "--moe-single-grouped-bias", False),
        ("502", {"moe_capacity": 1.5}, "--moe-expert-capacity-factor 1.5", True),
        ("502", {"moe_dispatcher": "flex", "moe_backend": "hybridep"}, "--moe-flex-dispatcher-backend hybridep", False),
        ("941", {"shared_expert_overlap": True, "ep_overlap": False}, "--moe-shared-expert-overlap", False),
        ("101", {"deterministic": True}, "--deterministic-mode", True),
        ("611", {"precision": "fp4", "fp4_recipe": "nvfp4"}, "--bf16 --fp4-format e2m1 --fp4-recipe nvfp4", False),
        ("502", {"ep_overlap": True, "delay_wgrad": True}, "--overlap-moe-expert-parallel-comm --delay-wgrad-compute", False),
        ("611", {"model": CATALOG.find("611").model.model_copy(update={"mtp_num_layers": 1})}, "--mtp-num-layers 1", True),
    ],
)  # fmt: skip
def test_settings_of_kernels_are_flags_of_upstream(id_, changes, flag, on_a_cpu):
    row = CATALOG.find(id_)
    changed = with_changes(row, **changes)

    def words(e, device):
        return " ".join(word for group in megatron_flags(e, device) for word in group) + " "

    assert f"{flag} " in words(changed, "cuda") and f"{flag} " not in words(row, "cuda")
    assert (f"{flag} " in words(miniature(changed), "cpu")) == on_a_cpu


def test_a_gpu_before_blackwell_does_not_compute_in_nvfp4(monkeypatch):
    fp4 = with_changes(CATALOG.find("611"), precision="fp4", fp4_recipe="nvfp4")
    names = {"NVIDIA B200": None, "NVIDIA GeForce RTX 5090": None, "A GPU of tomorrow": None, "NVIDIA H100 80GB HBM3": "FP8=tensorwise in its place",
             "NVIDIA A100-SXM4-80GB": "FP4=0"}  # fmt: skip
    check_machine(fp4, "cpu")
    for name, instead in names.items():
        gpu = type("Gpu", (), {"name": name})
        monkeypatch.setattr("harness.machine.requirements.list_gpus", lambda gpu=gpu: (gpu,))
        if instead is None:
            check_machine(fp4, "cuda")
            continue
        with pytest.raises(
            UserError, match=rf"611: FP4=nvfp4: {name} has no .* or higher; set {instead}"
        ):
            check_machine(fp4, "cuda")


@pytest.mark.parametrize(
    ("changes", "found", "complaint"),
    [
        ({"precision": "fp4", "fp4_recipe": "nvfp4"}, "2.6.1", "FP4=nvfp4 needs Transformer Engine 2.7 or later, not 2.6.1"),
        ({"precision": "fp4", "fp4_recipe": "nvfp4"}, "2.7.0.dev0", None),
        ({"delay_wgrad": True}, "2.2", "DELAY_WGRAD=1 needs Transformer Engine 2.3"),
        ({"delay_wgrad": True, "sharding": "no_shard"}, "2.6", "without GRAD_FUSION=1 needs Transformer Engine 2.7"),
        ({"delay_wgrad": True, "sharding": "no_shard", "gradient_fusion": True}, "2.6", None),
        ({"delay_wgrad": True}, "2.7", "with SHARDING=optim and OVERLAP=1 needs Transformer Engine 2.8"),
        ({"delay_wgrad": True}, "2.19.0", None),
        ({"delay_wgrad": True, "cuda_graphs": ("moe_router",)}, "2.11", "with CUDA_GRAPHS and OVERLAP=1 needs Transformer Engine 2.12"),
        ({"delay_wgrad": True, "cuda_graphs": ("moe_router",), "overlap": False}, "2.9", "with CUDA_GRAPHS needs Transformer Engine 2.10"),
        ({}, "1.0", None),
        ({"delay_wgrad": True}, None, None),
    ],
)  # fmt: skip
def test_upstream_asks_for_versions_of_transformer_engine(changes, found, complaint, monkeypatch):
    monkeypatch.setattr("harness.machine.requirements.package_version", lambda name: found)
    monkeypatch.setattr("harness.machine.requirements.list_gpus", lambda: ())
    experts = {"ep_overlap": True} if "delay_wgrad" in changes else {}
    e = with_changes(CATALOG.find("502"), **experts, **changes)
    check_machine(e, "cpu")
    if complaint is None:
        check_machine(e, "cuda")
        return
    with pytest.raises(UserError, match=f"502: .*{complaint}"):
        check_machine(e, "cuda")


def test_tokens_are_sent_by_a_package_that_is_installed(monkeypatch):
    monkeypatch.setattr("harness.machine.requirements.find_spec", lambda name: None)
    sent = with_changes(CATALOG.find("502"), moe_dispatcher="flex")
    check_machine(sent, "cpu")
    with pytest.raises(UserError, match="502: MOE_DISPATCHER=flex needs the package deep_ep"):
        check_machine(sent, "cuda")


def test_a_miniature_says_what_a_cpu_has_not():
    full = with_changes(CATALOG.find("625"), precision="fp8", fp8_recipe="tensorwise")
    said = describe(full, miniature(full))
    fp4 = with_changes(CATALOG.find("625"), precision="fp4", fp4_recipe="nvfp4")
    assert "precision fp4 -> bf16" in describe(fp4, miniature(fp4))
    assert (
        "precision fp8 -> bf16" in said
        and "optimizer state bf16 -> fp32" in said
        and "window 128 -> 4" in said
    )


@pytest.mark.parametrize("id_", ["611", "620", "631", "641", "651", "662"])
def test_a_miniature_is_made_of_the_same(id_):
    full, small = CATALOG.find(id_).model, miniature(CATALOG.find(id_)).model
    kept = (
        "normalization",
        "activation",
        "position_embedding",
        "qk_norm",
        "attention_sinks",
        "attention_output_gate",
        "untie_embeddings",
        "add_bias_linear",
        "moe_router_pre_softmax",
        "num_query_groups",
    )
    assert all(getattr(small, name) == getattr(full, name) for name in kept)
    assert bool(small.window_size) == bool(full.window_size) and bool(small.yarn) == bool(full.yarn)
    assert (small.query_size == small.hidden_size) == (full.query_size == full.hidden_size)


@pytest.mark.parametrize(("id_", "experts", "positions"), [
    ("620", (8, 2, 16), 128), ("631", (16, 2, 16), None), ("641", (8, 2, 16), None), ("651", (32, 2, 16), None),
])  # fmt: skip
def test_a_miniature_has_a_fourth_of_the_experts_but_enough_for_its_ranks(id_, experts, positions):
    small = miniature(CATALOG.find(id_)).model
    assert (small.num_experts, small.moe_router_topk, small.moe_ffn_hidden_size) == experts
    assert (small.yarn and small.yarn.original_max_position_embeddings) == positions


def test_a_miniature_that_learns_to_talk_has_room_and_a_rate_for_its_width(monkeypatch):
    chat = type("Blend", (), {"sets": (type("Set", (), {"vocab_size": 50257, "chat": True}),)})
    monkeypatch.setattr("harness.data.data_sets.blend", lambda data: chat)
    full = with_changes(CATALOG.find("801"), data="chat")
    small = miniature(full)
    assert (small.seq_length, small.steps, small.model.hidden_size) == (128, full.steps, 64)
    assert small.lr == pytest.approx(full.lr * full.model.hidden_size / 64)
    for kept in ({"overrides": {"LR": "1e-5"}}, {"lora": CATALOG.find("802").lora}, {"lr": None}):
        same = with_changes(full, **kept)
        assert miniature(same).lr == same.lr


def words(e, device="cuda"):
    return " ".join(word for group in megatron_flags(e, device) for word in group)


def test_gpt_oss_is_spelt_as_published():
    said = words(CATALOG.find("620"))
    for part in (
        "--window-size 127,0 --window-attn-skip-freq 2",
        "--softmax-type learnable",
        "--kv-channels 64",
        "--quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0",
        "--rotary-base 150000",
        "--position-embedding-type yarn",
        "--yarn-original-max-position-embeddings 4096 --rotary-scaling-factor 32.0",
        "--no-yarn-correction-range-round-to-int",
        "--num-experts 32 --moe-router-topk 4",
    ):
        assert part in said
    assert "--disable-bias-linear" not in said and "--moe-router-force-load-balancing" not in said


def test_a_smaller_tokenizer_leaves_the_model_as_it_is(monkeypatch):
    """GPT-2's tokens train Llama's 128,256 words: upstream would otherwise build the model from the tokenizer."""
    first = type(
        "Set",
        (),
        {
            "tokenizer_type": "NullTokenizer",
            "tokenizer_model": None,
            "vocab_size": 50257,
            "chat": False,
        },
    )
    blend = type("Blend", (), {"sets": (first,), "data_path": ("1", "x"), "cache": "c"})
    monkeypatch.setattr("harness.data.data_sets.blend", lambda data: blend)
    e = with_changes(CATALOG.find("615"), data="text")
    assert f"--make-vocab-size-divisible-by {padded_vocab_size(128256, 2) // 2}" in words(e)
    assert "--make-vocab-size-divisible-by" not in words(
        with_changes(CATALOG.find("101"), data="text")
    )
    assert miniature(e).model.vocab_size == 50257


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """What upstream's parser, builder and formula make of every row (tests/build_models.py)."""
    result = tmp_path_factory.mktemp("models") / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "build_models.py"), str(result)]
    environment = os.environ | {"HARNESS_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.cpu
def test_upstream_accepts_every_script(upstream):
    assert upstream["complaints"] == dict.fromkeys(e.id for e in ROWS)


@pytest.mark.cpu
def test_upstream_accepts_cuda_graphs_where_the_catalogue_does(upstream):
    found = upstream["graphs"]
    assert {
        "101",
        "244",
        "304",
        "408",
        "438",
        "501",
        "502",
        "613",
        "620",
    } < found.keys() and "300" not in found
    assert found == dict.fromkeys(found)


@pytest.mark.cpu
def test_upstream_builds_models_of_that_size(upstream):
    """Every model at full size, on the meta device; and the FLOPs of its step, by upstream's formula."""
    found = upstream["models"]
    assert set(found) == {e.model.name for e in ROWS}
    for e in {e.model.name: e for e in ROWS}.values():
        alone = with_changes(
            e,
            dp=1,
            tp=1,
            ep=1,
            sequence_parallel=False,
            sharding="no_shard",
            optimizer_state="fp32",
            gradients="fp32",
            global_batch_size=e.micro_batch_size,
        )
        assert found[e.model.name] == [count_parameters(alone).total, upstream_flops(alone)], (
            e.model.name
        )


@pytest.mark.cpu
def test_windows_and_sinks_equal_their_definition(upstream):
    assert upstream["attention"] < 1e-5


OSS = Model(
    name="tiny-oss",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=255,
    untie_embeddings=True,
    normalization="RMSNorm",
    activation="clamped_quick_geglu",
    position_embedding="yarn",
    window_size=6,
    attention_sinks=True,
    yarn={"rotary_scaling_factor": 32.0, "original_max_position_embeddings": 16},
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_aux_loss_coeff=0.0,
)
NORMS = Model(
    name="tiny-norms",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=255,
    untie_embeddings=True,
    add_bias_linear=False,
    normalization="RMSNorm",
    activation="swiglu",
    position_embedding="rope",
    qk_norm="projection",
)
PARITY = """
import sys
from harness import parity
sys.path.insert(0, {tests!r})
from test_models import NORMS, OSS
parity.LAYOUTS = {{
    "cp2 a2a": (OSS, {{"cp": 2, "cp_comm_type": "a2a"}}),
    "tp2 sp ep2": (OSS, {{"tp": 2, "sequence_parallel": True, "ep": 2}}),
    "tp2": (NORMS, {{"tp": 2}}),
}}
sys.exit(parity.main(only=list(parity.LAYOUTS)))
"""


@pytest.mark.cpu
def test_windows_sinks_and_norms_train_alike_under_every_parallelism():
    command = [sys.executable, "-c", PARITY.format(tests=str(ROOT / "tests"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(" equal") == 3 + 2, (
        done.stdout
    )  # and what they are compared with, one process a model


def losses(sharding, folder):
    """The losses of two ranks from fresh weights, under plain data parallelism or FSDP."""
    model = parity.DENSE.model_copy(update={"untie_embeddings": True, "num_layers": 2})
    experiment = tiny(model, {"dp": 2, "sharding": sharding, "steps": 6})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "harness.entry",
    ]
    environment = {variable.name: variable.value for variable in variables(experiment, "cpu")} | {
        RUN_DIR_VARIABLE: str(folder)
    }
    done = subprocess.run(
        [*command, *parity.flags(experiment)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [step.loss for step in RunDir(folder).read_metrics()]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return losses("no_shard", tmp_path_factory.mktemp("replicas"))


@pytest.mark.cpu
@pytest.mark.parametrize("sharding", ["fsdp_optim_grads_params", "torch_fsdp2"])
def test_sharded_data_parallelism_trains_as_replicas_do(replicas, tmp_path, sharding):
    assert len(replicas) == 6 and replicas[-1] < replicas[0]
    assert losses(sharding, tmp_path) == pytest.approx(replicas, rel=2e-6)


def test_experts_without_a_number_that_a_token_is_routed_to_are_refused():
    sizes = {"name": "tiny", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    Model(**sizes, num_experts=8, moe_router_topk=2)
    with pytest.raises(ValidationError, match=r"num_experts \(8\) needs moe_router_topk"):
        Model(**sizes, num_experts=8)
