"""Parameters and model FLOPs, against published sizes, measured TFLOP/s and upstream itself."""

from types import SimpleNamespace

import pytest

from harness.evidence.references import load_references
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.hybrid import layer_pattern
from harness.experiment.model import Lora
from harness.predict.flops import (
    count_parameters,
    mfu,
    padded_vocab_size,
    parameters_on,
    share_of_upstreams,
    state_gib,
    step_flops,
    tflops_per_gpu,
    upstream_flops,
)
from tests.one_process import answer

CATALOG = load_catalog()
TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1000}


def test_gpt2_xl_has_its_published_size():
    """1,557,611,200 in the released weights, which have 50,257 tokens; here they are padded to 50,304."""
    assert count_parameters(CATALOG.find("101")).total == 1_557_611_200 + (50_304 - 50_257) * 1600


def test_vocabulary_is_padded_for_every_tensor_parallel_rank():
    assert [padded_vocab_size(50257, tp) for tp in (1, 2, 4, 8)] == [50304, 50432, 50688, 51200]
    assert padded_vocab_size(1024, 8) == 1024


def test_ranks_together_hold_the_whole_model():
    whole = count_parameters(CATALOG.find("211")).total
    tp4 = count_parameters(CATALOG.find("234"))
    assert whole / 4 < tp4.per_rank < whole / 4 * 1.02
    pp8 = count_parameters(CATALOG.find("408"))
    assert (
        pp8.total / 8 < pp8.per_rank < pp8.total / 8 * 1.15
    )  # the first stage has the embeddings, too


def test_experts_are_spread_and_mostly_idle():
    replicated, spread = (
        count_parameters(CATALOG.find("501")),
        count_parameters(CATALOG.find("502")),
    )
    assert replicated.total == spread.total and replicated.active == spread.active
    held, held_spread = (parameters_on(CATALOG.find(id_), 0).experts for id_ in ("501", "502"))
    assert held_spread * 8 == held
    assert replicated.per_rank - spread.per_rank == 7 * held_spread
    assert replicated.total - replicated.active == 16 * (64 - 8) * 2 * 1024 * 1024


@pytest.mark.parametrize(
    ("id_", "reference"),
    [
        pytest.param(row.id, row, id=f"{group.name}-{row.id}")
        for group in load_references().groups
        for row in group.rows
        if row.tflops and row.id and row.variant is None
    ],
)
def test_measured_tflops_follow_from_the_measured_step_time(id_, reference):
    e = CATALOG.find(id_)
    counted = tflops_per_gpu(e, reference.step_ms) / share_of_upstreams(
        e
    )  # as the log of that run does
    assert counted == pytest.approx(reference.tflops, abs=0.7)


def test_state_is_18_bytes_a_parameter_and_shards():
    """The published log of 101 says 26,699 MB for weights and optimizer, of 1.5554 billion parameters."""
    assert state_gib(CATALOG.find("101")) * 1024 == pytest.approx(26699, rel=0.002)
    parameters = count_parameters(CATALOG.find("128")).total
    assert state_gib(CATALOG.find("128")) * 2**30 == pytest.approx(parameters * (6 + 12 / 8))
    ring = with_changes(
        CATALOG.find("302"), sharding="optim"
    )  # context parallel ranks share the state out, too
    assert state_gib(ring) * 2**30 == pytest.approx(count_parameters(ring).total * (6 + 12 / 2))
    zero3 = with_changes(CATALOG.find("128"), sharding="fsdp_optim_grads_params")
    assert state_gib(zero3) * 2**30 == pytest.approx(parameters * 16 / 8)


def test_mfu_is_a_share_of_the_peak():
    assert mfu(400, 989.5) == pytest.approx(0.404, abs=5e-4)


@pytest.mark.cpu
def test_flops_and_state_equal_upstreams():
    """Against num_floating_point_operations and compute_weight_and_optimizer_memory for every experiment."""
    training = pytest.importorskip("megatron.training.training")
    theory = pytest.importorskip("megatron.training.theoretical_memory_usage")
    for e in CATALOG.experiments:
        args = _upstream_arguments(e)
        assert upstream_flops(e) == training.num_floating_point_operations(
            args, e.global_batch_size
        ), e.id
        if e.chapter >= 600:  # gated MLPs, states of other sizes: tests/test_models.py
            continue
        left_out = 1 - theory.compute_weight_and_optimizer_memory(args) / (state_gib(e) * 2**30)
        assert 0 < left_out < 0.03, f"{e.id}: biases and position embedding are {left_out:.2%}"


@pytest.mark.cpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2},
        {"add_bias_linear": False},
        {
            "num_experts": 4,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "add_bias_linear": False,
        },
    ],
    ids=lambda changes: ",".join(changes) or "dense",
)
def test_parameters_equal_those_of_upstreams_model(changes):
    """Against a GPTModel built by Megatron Core in this process."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    e = CATALOG.find("101")
    e = with_changes(
        e,
        model=e.model.model_copy(update=TINY | changes),
        seq_length=32,
    )
    m = e.model
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            num_attention_heads=m.num_attention_heads,
            num_query_groups=m.num_query_groups,
            add_bias_linear=m.add_bias_linear,
            num_moe_experts=m.num_experts,
            moe_router_topk=m.moe_router_topk or 2,
            moe_ffn_hidden_size=m.moe_ffn_hidden_size,
            use_cpu_initialization=True,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(m.num_experts, normalization="LayerNorm"),
            padded_vocab_size(m.vocab_size, 1),
            e.seq_length,
            share_embeddings_and_output_weights=True,
        )
        assert count_parameters(e).total == sum(
            parameter.numel() for parameter in model.parameters()
        )
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


TARGETS = ("-", "linear_qkv,linear_proj,linear_fc1,linear_fc2", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2",
           "linear_fc2,linear_proj")  # fmt: skip


@pytest.fixture(scope="module")
def counted():
    """What PyTorch counts in one pass there and back, for every set of adapters: {targets: FLOPs}."""
    pytest.importorskip("torch")
    return answer("tests.count_products", *TARGETS)


@pytest.mark.cpu
@pytest.mark.parametrize("targets", TARGETS)
def test_what_is_counted_is_what_is_computed(counted, targets):
    """Products of frozen weights have no weight gradient, and nothing is gone through backward before the first adapter.

    The CPU's attention computes all scores, causal attention half of them: twice the squares.
    """
    from tests import count_products as tiny

    m = CATALOG.find("611").model.model_copy(
        update={
            "num_layers": tiny.LAYERS,
            "hidden_size": tiny.HIDDEN,
            "num_attention_heads": tiny.HEADS,
            "num_query_groups": 2,
            "ffn_hidden_size": tiny.FFN,
            "vocab_size": tiny.VOCABULARY,
            "kv_channels": None,
        }
    )
    lora = (
        None
        if targets == "-"
        else Lora(rank=tiny.RANK, alpha=4.0, targets=tuple(targets.split(",")))
    )
    e = with_changes(
        CATALOG.find("101"),
        model=m,
        lora=lora,
        seq_length=tiny.SEQUENCE,
        micro_batch_size=tiny.BATCH,
        global_batch_size=tiny.BATCH,
    )
    assert step_flops(e, squares=2 * tiny.BATCH * tiny.SEQUENCE**2) == counted[targets]
    assert (upstream_flops(e) == step_flops(e)) == (lora is None)


def test_frozen_weights_cost_two_thirds():
    """811: 667 TFLOP/s as if all of Llama 3 8B were trained, of which two thirds are computed."""
    e = CATALOG.find("811")
    assert e.lora and 0.66 < share_of_upstreams(e) < 0.70
    assert share_of_upstreams(CATALOG.find("611")) == 1
    recomputed = CATALOG.find("812")
    assert (
        recomputed.recompute == "full"
        and 0 < share_of_upstreams(recomputed) - share_of_upstreams(e) < 0.002
    )
    assert share_of_upstreams(e, tokens=1000, squares=1000) < share_of_upstreams(e), (
        "attention has no frozen weights"
    )


def test_a_window_sees_no_more_than_it_computes():
    """Half the layers of GPT-OSS see 128 tokens; its experts are three matrices, of which upstream counts two."""
    e = CATALOG.find("620")
    narrow, wide = (
        with_changes(e, model=e.model.model_copy(update={"window_size": w}))
        for w in (1, e.seq_length)
    )
    scores = 6 * e.model.query_size * e.global_batch_size
    half = e.model.num_layers // 2
    assert step_flops(wide) - step_flops(narrow) == scores * half * (
        e.seq_length**2 - (2 * e.seq_length - 1)
    )
    window = sum(
        2 * min(seen, 128) - 1 for seen in range(1, e.seq_length + 1)
    )  # as s^2 is the sum of 2 i - 1
    assert (step_flops(e) - step_flops(narrow)) / scores / half == pytest.approx(
        window - (2 * e.seq_length - 1), rel=0.01
    )
    expert = 3 * e.model.hidden_size * e.model.moe_ffn * e.model.moe_router_topk
    gate = 6 * e.model.num_layers * expert / 3 * e.global_batch_size * e.seq_length
    assert step_flops(wide) - upstream_flops(e) == pytest.approx(gate, rel=1e-9)


def _upstream_arguments(e):
    """The attributes of Megatron-LM's arguments that its two estimates read."""
    m = e.model
    absent = "moe_latent_size experimental_attention_variant hybrid_layer_pattern q_lora_rank"
    latent = m.latent_attention.model_dump() if m.latent_attention else {}
    dense = m.first_dense_layers
    if m.mamba:
        absent = absent.replace("hybrid_layer_pattern ", "")
        latent = {f"mamba_{name}": value for name, value in m.mamba.model_dump().items()}
        latent["hybrid_layer_pattern"] = layer_pattern(e)
        latent |= dict.fromkeys(
            f"linear_{name}"
            for name in (
                "key_head_dim",
                "value_head_dim",
                "num_key_heads",
                "num_value_heads",
                "conv_kernel_dim",
            )
        )
    return SimpleNamespace(
        **dict.fromkeys(absent.split()) | latent,
        mtp_num_layers=m.predictors or None,
        moe_shared_expert_intermediate_size=m.moe_shared_expert_intermediate_size,
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups or m.num_attention_heads,
        group_query_attention=m.num_query_groups is not None,
        kv_channels=m.head_size,
        seq_length=e.seq_length,
        padded_vocab_size=padded_vocab_size(m.vocab_size, e.tp),
        num_experts=m.num_experts,
        moe_router_topk=m.moe_router_topk or 2,
        moe_ffn_hidden_size=m.moe_ffn if m.num_experts else None,
        moe_layer_freq=[0] * dense + [1] * (m.num_layers - dense) if dense else 1,
        swiglu=m.activation == "swiglu",
        add_bias_linear=m.add_bias_linear,
        normalization=m.normalization,
        multi_latent_attention=m.latent_attention is not None,
        attention_output_gate=m.attention_output_gate,
        untie_embeddings_and_output_weights=m.untie_embeddings,
        is_hybrid_model=m.mamba is not None,
        use_distributed_optimizer=e.sharding == "optim",
        tensor_model_parallel_size=e.tp,
        pipeline_model_parallel_size=e.pp,
        expert_model_parallel_size=e.ep,
        expert_tensor_parallel_size=e.etp,
        data_parallel_size=e.dp,
        world_size=e.world_size,
    )
