"""Tensors kept for the backward pass by latent attention, its routers, shared experts and multi-token prediction, against upstream's modules."""

import pytest

from harness.experiment.catalog import load_models
from harness.experiment.constraints import with_changes
from harness.experiment.unlisted import row_of
from harness.predict.activations import (
    attention_bytes,
    loss_bytes,
    mlp_bytes,
    predictor_bytes,
)
from harness.predict.mlp_operations import shared_expert
from harness.predict.operations import hidden_bytes
from tests.one_process import answer

pytestmark = pytest.mark.cpu
DEEPSEEK = load_models()["deepseek-v3"]


@pytest.fixture(scope="module")
def kept():
    """Bytes that upstream's modules keep, by case (tests/count_saved.py)."""
    pytest.importorskip("megatron.core")
    return answer("tests.count_saved")


@pytest.fixture(scope="module")
def tiny():
    """An experiment with the sizes of tests/count_saved.py."""
    pytest.importorskip("torch")
    from tests import count_saved as sizes

    latent = {name: sizes.SIZES[name] for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")}  # fmt: skip
    model = DEEPSEEK.model_copy(
        update={
            "num_layers": 4,
            "hidden_size": sizes.SIZES["hidden_size"],
            "num_attention_heads": sizes.SIZES["num_attention_heads"],
            "ffn_hidden_size": sizes.FFN,
            "latent_attention": DEEPSEEK.latent_attention.model_copy(update=latent),
            "num_experts": sizes.EXPERTS,
            "moe_router_topk": sizes.TOPK,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": sizes.SHARED,
            "moe_aux_loss_coeff": 0.0,
        }
    )
    return with_changes(
        row_of(model),
        seq_length=sizes.LENGTH,
        micro_batch_size=sizes.BATCH,
        global_batch_size=sizes.BATCH,
    )


def changed(experiment, **fields):
    return with_changes(experiment, model=experiment.model.model_copy(update=fields))


def tokens(experiment):
    return experiment.seq_length * experiment.micro_batch_size


def test_latent_attention(kept, tiny):
    assert attention_bytes(tiny) == kept["attention"]


def test_shared_expert(kept, tiny):
    saved = sum(sum(each.saves) for each in shared_expert(tiny))
    assert saved + hidden_bytes(tiny) == kept["shared_expert"], "and the router's input"


def test_predictor(kept, tiny):
    assert predictor_bytes(tiny) + hidden_bytes(tiny) == kept["predictor"], (
        "and the output layer's input for the next token"
    )


def test_scores_before_topk_are_kept(kept, tiny):
    """Besides, sums of a token's chosen weights and indices of top-k, which the formula leaves out."""
    softmax = changed(
        tiny,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,
        moe_router_enable_expert_bias=False,
    )
    more = kept["router sigmoid"] - kept["router softmax"]
    assert mlp_bytes(tiny) - mlp_bytes(softmax) == pytest.approx(more, abs=8 * tokens(tiny))
    balanced = changed(tiny, moe_aux_loss_coeff=0.01)
    more = kept["router sigmoid aux"] - kept["router sigmoid"]
    indices = 8 * tiny.model.moe_router_topk
    assert mlp_bytes(balanced) - mlp_bytes(tiny) == pytest.approx(
        more, abs=(indices + 8) * tokens(tiny)
    )


def test_dense_layers_keep_what_dense_layers_of_a_dense_model_keep(tiny):
    dense = tiny.model.model_copy(
        update={
            "num_experts": None,
            "first_dense_layers": 0,
            "moe_shared_expert_intermediate_size": None,
        }
    )
    assert mlp_bytes(tiny, "dense") == mlp_bytes(with_changes(tiny, model=dense))
    assert mlp_bytes(tiny, "dense") != mlp_bytes(tiny, "experts") == mlp_bytes(tiny)


def test_discarded_projections_up_leave_what_they_are_made_of(tiny):
    m, size = tiny.model, 2 * tokens(tiny)
    discarded = with_changes(tiny, recompute="selective", recompute_modules=("mla_up_proj",))
    latent = m.latent_attention
    normed = size * (latent.q_lora_rank + latent.kv_lora_rank) + 2 * 4 * tokens(tiny)
    assert attention_bytes(tiny) - attention_bytes(discarded) == normed + size * (
        m.query_size + m.key_size + m.value_size
    )


def test_a_further_token_leaves_its_softmax(tiny):
    without = changed(tiny, mtp_num_layers=None)
    logits = tokens(tiny) * 129_280
    assert loss_bytes(tiny) - loss_bytes(without) == 4 * logits


def test_tensor_parallel_ranks_keep_the_whole_of_what_is_compressed(tiny):
    """Under sequence parallelism their share of the tokens; without, all of it."""
    m, half = tiny.model, {"tp": 2, "dp": 1}
    split = with_changes(tiny, **half, sequence_parallel=True)
    assert attention_bytes(split) == attention_bytes(tiny) / 2
    no_experts = m.model_copy(
        update={
            "num_experts": None,
            "first_dense_layers": 0,
            "moe_shared_expert_intermediate_size": None,
        }
    )
    whole = with_changes(tiny, **half, model=no_experts)
    heads = 2 * (m.query_size + m.key_size + m.value_size + m.context_size)
    heads += 4 * m.num_attention_heads
    assert attention_bytes(tiny) - attention_bytes(whole) == tokens(tiny) * heads / 2
