"""The script that `show` prints: complete, valid bash, and upstream's arguments as published."""

import shutil
import subprocess
from pathlib import Path

import pytest

from harness import ROOT
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.machine import gpus
from harness.planning.checked import GRAPHS_DROP, RANDOM_WEIGHTS
from harness.planning.miniature import describe, miniature
from harness.planning.plan import choose_device, plan
from harness.planning.resolved import PLAIN_TEXT
from harness.planning.script import Extras, Place, render
from harness.run.checkpoints import Loading, Saving
from harness.upstreams.megatron_lm.flags import megatron_flags
from harness.upstreams.megatron_lm.tracking import Tracking

CATALOG = load_catalog()
IDS = [e.id for e in CATALOG.experiments]


def words(id_: str, device: str = "cuda") -> str:
    return " ".join(word for group in megatron_flags(CATALOG.find(id_), device) for word in group)


SCRIPTS = {id_: f" {words(id_)} " for id_ in IDS}


@pytest.mark.parametrize("id_", IDS)
def test_every_script_is_valid_bash(id_: str) -> None:
    e = CATALOG.find(id_)
    for script in (
        render(e, "cuda", Place(rendezvous="a:1")),
        render(miniature(e), "cpu", headline=describe(e, miniature(e))),
    ):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert (
            f"--nproc-per-node {e.ranks_per_node if '=cuda' in script else miniature(e).world_size} "
            in script
        )


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    script = render(CATALOG.find("438"), "cuda", Place(gpu_ids=(0, 1)))
    done = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_script_runs_torchrun_with_quoted_words(tmp_path) -> None:
    e = with_changes(CATALOG.find("101"), extra_args=("--note", "a b'c"))
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    script = render(e, "cpu").replace("export PATH=", f"export PATH={tmp_path}:")
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=True)
    printed = done.stdout.splitlines()
    assert printed[:9] == [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "1",
        "--log-dir",
        "/dev/null",
        "-m",
        "harness.entry",
    ]
    assert printed[-2:] == ["--note", "a b'c"]


def test_published_flags() -> None:
    assert "--num-virtual-stages-per-pipeline-rank 3" in words("438")
    assert "--num-layers-per-virtual-pipeline-stage" not in words("438")
    assert "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather" in words(
        "115"
    )
    assert (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        in words("283")
    )
    assert "--cp-comm-type a2a" in words("328") and "--attention-backend flash" in words("328")
    assert "--sequence-parallel" in words("282") and "--sequence-parallel" not in words("281")
    assert "--moe-grouped-gemm --moe-permute-fusion --moe-router-force-load-balancing" in words(
        "500"
    )
    assert words("101").count("--train-iters") == 1


BRINGS = {
    "--sequence-parallel": lambda e: e.sequence_parallel,
    "--num-virtual-stages-per-pipeline-rank": lambda e: e.vpp > 1 and not e.pp_layout,
    "--cp-comm-type": lambda e: e.cp > 1,
    "--use-distributed-optimizer": lambda e: e.sharding not in ("no_shard", "torch_fsdp2"),
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim": lambda e: e.sharding == "fsdp_optim",
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads": lambda e: e.sharding == "fsdp_optim_grads",
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params": lambda e: e.sharding == "fsdp_optim_grads_params",
    "--use-torch-fsdp2": lambda e: e.sharding == "torch_fsdp2",
    "--recompute-granularity full": lambda e: e.recompute == "full",
    "--recompute-granularity selective": lambda e: e.recompute == "selective",
    "--recompute-modules": lambda e: e.recompute_modules,
    "--fp8-format hybrid --fp8-recipe delayed": lambda e: e.fp8_recipe == "delayed",
    "--fp8-format hybrid --fp8-recipe tensorwise": lambda e: e.fp8_recipe == "tensorwise",
    "--fp8-format e4m3 --fp8-recipe blockwise": lambda e: e.fp8_recipe == "blockwise",
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native": lambda e: e.cross_entropy_fusion,
    "--optimizer muon": lambda e: e.optimizer == "muon",
    "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16": lambda e: e.optimizer_state == "bf16",
    "--grad-reduce-in-bf16 --main-grads-dtype bf16": lambda e: e.gradients == "bf16",
    "--lr 6e-05 --min-lr 6e-06": lambda e: e.lr is None,
    "--lr-decay-iters 430000": lambda e: e.lr is None,
    "--lr-warmup-fraction .001": lambda e: e.lr is None,
    "--lr-warmup-fraction .05": lambda e: e.lr is not None and e.lr_warmup_steps is None,
    "--disable-bias-linear": lambda e: not e.model.add_bias_linear,
    "--group-query-attention --num-query-groups": lambda e: e.model.num_query_groups,
    "--kv-channels": lambda e: e.model.kv_channels,
    "--normalization RMSNorm --norm-epsilon": lambda e: e.model.normalization == "RMSNorm",
    "--swiglu": lambda e: e.model.activation == "swiglu",
    "--quick-geglu": lambda e: e.model.activation == "clamped_quick_geglu",
    "--position-embedding-type rope": lambda e: (
        e.model.position_embedding == "rope" or e.model.latent_attention is not None
    ),
    "--yarn-beta-fast 32.0 --yarn-beta-slow 1.0": lambda e: (
        e.model.yarn and not e.model.latent_attention
    ),
    "--qk-layernorm": lambda e: e.model.qk_norm != "none",
    "--spec harness.specs.projection_norm layer_spec": lambda e: e.model.qk_norm == "projection",
    "--untie-embeddings-and-output-weights": lambda e: e.model.untie_embeddings or e.sharding == "torch_fsdp2",
    "--attention-output-gate": lambda e: e.model.attention_output_gate,
    "--softmax-type learnable": lambda e: e.model.attention_sinks,
    "--window-size 127,0 --window-attn-skip-freq 2": lambda e: e.model.window_size == 128,
    "--num-experts": lambda e: e.model.num_experts,
    "--no-bias-dropout-fusion": lambda e: e.model.num_experts and e.model.add_bias_linear,
    "--moe-router-pre-softmax": lambda e: e.model.moe_router_pre_softmax,
    "--moe-router-force-load-balancing": lambda e: e.model.num_experts and e.model.moe_aux_loss_coeff is None,
    "--moe-aux-loss-coeff": lambda e: e.model.moe_aux_loss_coeff is not None,
    "--moe-router-dtype fp32": lambda e: e.model.moe_aux_loss_coeff is not None,
    "--moe-z-loss-coeff": lambda e: e.model.moe_z_loss_coeff is not None,
    "--lora-rank 16 --lora-alpha 32.0 --lora-dropout 0.0 --lora-targets": lambda e: e.lora and e.lora.rank == 16,
}  # fmt: skip
"""Arguments -> the experiments that want them."""


@pytest.mark.parametrize("arguments", BRINGS)
def test_a_setting_and_it_alone_brings_its_arguments(arguments) -> None:
    wanted = {e.id for e in CATALOG.experiments if BRINGS[arguments](e)}
    assert wanted == {
        id_ for id_, script in SCRIPTS.items() if f" {arguments} " in script
    } and 0 < len(wanted) < len(IDS)


def test_layers_with_experts_are_graphed_in_part() -> None:
    def graphed(id_: str, device: str) -> str:
        groups = megatron_flags(with_changes(CATALOG.find(id_), cuda_graphs=True), device)
        return " ".join(word for group in groups for word in group)

    assert graphed("101", "cuda").count(
        "--cuda-graph"
    ) == 1 and "--cuda-graph-impl local --te-rng-tracker" in graphed("101", "cuda")
    of_experts = (
        "transformer_engine --te-rng-tracker --cuda-graph-modules attn moe_router moe_preprocess"
    )
    assert of_experts in graphed("501", "cuda"), "upstream's own capture a GPT's whole layer"
    assert (
        "cuda-graph" not in graphed("101", "cpu")
        and not miniature(with_changes(CATALOG.find("101"), cuda_graphs=True)).cuda_graphs
    )


def test_learned_positions_are_not_left_to_pytorch() -> None:
    """Its ``Embedding.reset_parameters``, which upstream calls for what was made on the meta device, knows no deviation."""
    assert "--init-model-with-meta-device" in words(
        "711"
    ) and "--init-model-with-meta-device" not in words("705")


def test_gpus_that_are_chosen_are_those_that_nvidia_smi_numbers_so() -> None:
    script = render(CATALOG.find("101"), "cuda", Place(gpu_ids=(2, 3)))
    assert (
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID " in script
        and "export CUDA_VISIBLE_DEVICES=2,3 " in script
    )
    assert (
        "CUDA_VISIBLE_DEVICES" not in render(CATALOG.find("101"), "cuda") and "# None" not in script
    )


def test_several_nodes_meet_at_the_rendezvous() -> None:
    script = render(CATALOG.find("219"), "cuda", Place(node_rank="1", rendezvous="node0:29500"))
    assert (
        "--nnodes 2 --node-rank 1 --rdzv-backend c10d --rdzv-endpoint node0:29500"
        in script.replace(" \\\n    ", " ")
    )


@pytest.mark.parametrize(
    "value",
    [
        "$(touch touched)",
        "`touch touched`",
        "'; touch touched; '",
        "a\ntouch touched\n",
        "&touch touched",
        "$HOME:1",
        "# a",
    ],
)
def test_nothing_in_the_script_executes_but_torchrun(tmp_path, value: str) -> None:
    """Every text that a setting can bring, in one script, and torchrun's words as they were typed."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    fake.chmod(0o755)
    extras = Extras(
        Saving(5, None, Path(f"/tmp/{value}")),
        Loading(Path(f"/tmp/{value}"), 3),
        Tracking("offline", value, value, value),
    )
    e = with_changes(CATALOG.find("219"), extra_args=("--note", value))
    script = render(e, "cuda", Place(value, value), extras=extras).replace(
        "export PATH=", f"export PATH={tmp_path}:"
    )
    done = subprocess.run(
        ["bash", "-c", script], text=True, capture_output=True, check=True, cwd=tmp_path
    )
    assert not [*tmp_path.glob("**/touched")] and not (ROOT / "touched").exists()
    words = done.stdout.split("\0")
    after = {
        word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("-")
    }
    for name in (
        "--node-rank",
        "--rdzv-endpoint",
        "--note",
        "--wandb-project",
        "--wandb-entity",
        "--wandb-exp-name",
    ):
        assert after[name] == value, name
    assert after["--save"] == after["--load"] == f"/tmp/{value}"


def test_without_a_gpu_what_needs_one_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(gpus, "list_gpus", list)
    assert (
        choose_device({}) == "cpu" and choose_device({"DEVICE": "cuda"}, only_show=True) == "cuda"
    )
    with pytest.raises(
        UserError, match=r"the NVIDIA driver shows no GPU here\n.*DEVICE=cpu runs the miniature"
    ):
        choose_device({"DEVICE": "cuda"})
    with pytest.raises(
        UserError, match="CARD=h100-80gb caps the memory of the GPU at hand, but there is none here"
    ):
        plan(CATALOG.find("101"), {"DATA": "mock", "CARD": "h100-80gb"}, "cuda")


@pytest.mark.parametrize(("installed", "backend"), [(None, "auto"), ("flash_attn", "flash")])
def test_without_flash_attn_attention_is_cudnns_and_the_run_says_so(
    monkeypatch, installed, backend
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: ["a GPU"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed)
    planned = plan(CATALOG.find("328"), {"DATA": "mock"}, "cuda")
    assert choose_device({}) == "cuda" and planned.experiment.attention_backend == backend
    assert planned.headline == (
        None
        if installed
        else "attention by cuDNN: the published run's flash-attn is not installed here"
    )


def test_graphs_that_drop_in_evaluation_too_are_told() -> None:
    settings = {"DATA": "mock", "CUDA_GRAPHS": "1"}
    assert plan(CATALOG.find("101"), settings, "cuda").notices == (GRAPHS_DROP,)
    for more in ({"DROPOUT": "0"}, {"EVAL_STEPS": "0"}):
        assert plan(CATALOG.find("101"), settings | more, "cuda").notices == ()


def test_a_notice_says_that_adapters_on_random_weights_learn_little() -> None:
    assert plan(CATALOG.find("802"), {"DATA": "mock"}, "cuda").notices == (RANDOM_WEIGHTS,)
    assert plan(CATALOG.find("802"), {"DATA": "mock", "LORA_RANK": "0"}, "cuda").notices == ()


def test_where_a_node_stands_is_said_or_left_to_slurm() -> None:
    there = {"DATA": "mock", "NODES": "2"}
    assert plan(
        CATALOG.find("219"), there | {"RENDEZVOUS": "a:1", "NODE_RANK": "1"}, "cuda"
    ).place == Place("1", "a:1")
    assert (
        plan(CATALOG.find("219"), there | {"SLURM": "1"}, "cuda").place.node_rank == "$SLURM_NODEID"
    )


@pytest.mark.parametrize(("setting", "value"), [("GPUS_IDS", "0,99"), ("CARD", "h100-80gb")])
def test_what_only_a_gpu_has_is_refused_on_a_cpu(setting, value):
    with pytest.raises(
        UserError,
        match=f"{setting}={value} needs a GPU, and this would run the miniature on the CPU",
    ):
        plan(CATALOG.find("101"), {"DATA": "mock", setting: value}, "cpu")


def test_the_ids_of_gpus_are_numbers():
    with pytest.raises(UserError, match="GPUS_IDS=zero: expected a whole number"):
        plan(CATALOG.find("101"), {"DATA": "mock", "GPUS_IDS": "zero"}, "cuda")


@pytest.mark.parametrize(("settings", "said"), [
    ({"FP8": "tensorwise"}, "precision fp8 -> bf16"),
    ({"FP4": "nvfp4"}, "precision fp4 -> bf16"),
    ({"CUDA_GRAPHS": "1", "DROPOUT": "0"}, "CUDA graphs on -> off"),
    ({"OPTIMIZER_STATE": "bf16", "SHARDING": "optim"}, "optimizer state bf16 -> fp32"),
    ({"OFFLOAD": "0.5", "SHARDING": "optim"}, "offloaded 0.5 -> 0.0"),
])  # fmt: skip
def test_what_the_miniature_replaces_is_said(settings, said):
    assert said in plan(CATALOG.find("111"), {"DATA": "mock", **settings}, "cpu").headline


def test_a_row_of_conversations_says_that_it_gets_none(monkeypatch) -> None:
    """Plain text is trained on without --sft; with conversations, and in other rows, nothing is said."""
    from harness.data import data_sets

    def script(id_: str, **settings: str) -> str:
        return plan(CATALOG.find(id_), settings, "cuda").script()

    said = "DATA=mock holds no conversations: every token is learned, not only answers, and --sft is left out; DATA=toy-chat has"
    told = script("801", DATA="mock")
    assert said in told and "--sft" not in told.replace(PLAIN_TEXT.format("mock", "toy-chat"), "")
    assert "no conversations" not in script(
        "101", DATA="mock"
    ) and "no conversations" not in script("811", DATA="mock")
    monkeypatch.setattr(data_sets, "is_chat", lambda data: True)
    assert not plan(CATALOG.find("801"), {"DATA": "mock"}, "cuda").headline
