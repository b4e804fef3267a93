"""Work of latent attention, shared experts, dense first layers and multi-token prediction: against counted FLOPs, and what each part adds."""

import pytest

from harness.experiment.catalog import load_models
from harness.experiment.constraints import with_changes
from harness.experiment.linear_layers import of_layer
from harness.experiment.unlisted import experiment_from, row_of
from harness.predict import calibrations, stages
from harness.predict.flops import step_flops
from harness.predict.work import MicroBatchWork, linear_shapes

SPEED = calibrations.load()["h100-tutorial"].speed()
DEEPSEEK = load_models()["deepseek-v3"]


def work(experiment):
    return MicroBatchWork(experiment, SPEED)


def changed(experiment, **fields):
    return with_changes(experiment, model=experiment.model.model_copy(update=fields))


def flops(experiment):
    return sum(2 * rows * out * inner for rows, out, inner in linear_shapes(experiment))


E = with_changes(
    row_of(DEEPSEEK.model_copy(update={"num_layers": 8})),
    dp=8,
    ep=8,
    seq_length=4096,
    global_batch_size=8,
)


def test_products_are_those_that_count_as_model_flops():
    """Of the linear layers, forward: attention's, and the shared expert's."""
    weights = sum(linear.weights for linear in of_layer(DEEPSEEK, "experts").values())
    assert flops(E) == 2 * 4096 * weights
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    assert weights == attention + 3 * 7168 * 2048


def test_ranks_of_tensor_parallelism_compute_projections_down_for_their_own_tokens():
    split = with_changes(E, tp=2, sequence_parallel=True, dp=4, global_batch_size=4)
    assert flops(split) * 2 == flops(E)
    dense = row_of(DEEPSEEK.model_copy(update=WITHOUT_EXPERTS))
    one, whole = (with_changes(dense, seq_length=4096, global_batch_size=1, tp=tp) for tp in (1, 2))
    down = 2 * 4096 * 7168 * (1536 + 576)
    assert flops(whole) * 2 - flops(one) == down, "without sequence parallelism, for all tokens"


WITHOUT_EXPERTS = {
    "num_experts": None,
    "first_dense_layers": 0,
    "moe_shared_expert_intermediate_size": None,
    "mtp_num_layers": None,
    "moe_router_enable_expert_bias": False,
}


def test_time_follows_flops_over_all_kinds_of_layers():
    """A model whose GPU only multiplies: products of a whole step's micro-batch against step_flops, router and norms left out."""
    of_step = work(E)
    forward, backward = (side.products for side in of_step.stages[0])
    assert backward / forward == pytest.approx(2, rel=0.05)
    attention = 3 * (DEEPSEEK.num_attention_heads * (192 + 128)) * 4096**2 * 9
    expected = (step_flops(E) / 8 - attention) / of_step.flop_per_s
    assert forward + backward == pytest.approx(expected, rel=0.1), "grouped products are slower"


def test_stages_work_on_their_own_kinds_of_layers():
    layers = work(E).layers
    assert set(layers) == {"dense", "experts", "predictors"}
    dense, experts = (
        2
        * 4096
        * sum(one.weights for one in of_layer(DEEPSEEK, kind).values())
        / work(E).flop_per_s
        for kind in ("dense", "experts")
    )
    routed = 2 * 4096 * 3 * 7168 * 2048 * 8 / work(E).flop_per_s
    assert layers["dense"][0].products == pytest.approx(dense, rel=0.05)
    assert layers["experts"][0].products > experts + routed, "grouped products are slower"
    pipeline = work(with_changes(E, pp=2, dp=8, global_batch_size=16))
    first = layers["dense"][0].products * 3 + layers["experts"][0].products
    assert pipeline.stages[0][0].products == pytest.approx(first)
    last = layers["experts"][0].products * 4 + layers["predictors"][0].products
    output = pipeline.output()[0].products
    assert pipeline.stages[1][0].products == pytest.approx(last + 2 * output)


def test_chunks_that_hold_other_layers_take_other_shares():
    e = with_changes(E, pp=2, vpp=4, dp=8, global_batch_size=16)
    assert not stages.alike(e)
    first, last = work(e).chunk_shares()
    assert first[0] != first[1] and first[2] == first[3]
    assert last[3] == max(last), "with the layer that predicts, and two losses"
    assert sum(first) == pytest.approx(1) and sum(last) == pytest.approx(1)


def test_attention_costs_its_queries_and_values():
    """Forward, queries and values count alike; backward, three products over queries and two over values."""
    wide = changed(E, latent_attention=DEEPSEEK.latent_attention.model_copy(update={"v_head_dim": 192}))  # fmt: skip
    latent, equal = work(E).attention(), work(wide).attention()
    rates = SPEED.rates
    for side, width in ((0, 160), (1, 166.4)):
        ratio = rates.attention_ps(width, 4096, False)[side] / rates.attention_ps(192, 4096, False)[side]  # fmt: skip
        assert latent[side].attention / equal[side].attention == pytest.approx(ratio, rel=1e-3)


def test_latent_attention_sends_less_over_tensor_parallel_ranks():
    split = with_changes(E, tp=2, sequence_parallel=True, dp=4, global_batch_size=4)
    latent = work(split).latent_tensor_parallel()
    plain = changed(
        split, latent_attention=None, position_embedding="rope", yarn=None, kv_channels=128
    )
    both = [sum(part.exchange for part in work(e).tensor_parallel()) for e in (plain, split)]
    whole = both[0] - both[1]
    sent = sum(part.exchange for part in latent)
    assert 0.5 * whole < sent < whole, "a third of the width before, all of it after"
    without = with_changes(split, sequence_parallel=False, ep=1, dp=4, model=split.model.model_copy(update=WITHOUT_EXPERTS))  # fmt: skip
    forward, backward = work(without).latent_tensor_parallel()
    assert forward.exchange > backward.exchange > 0, "the gradient of what is compressed"


def test_a_shared_expert_adds_its_products_and_a_sum():
    without = changed(E, moe_shared_expert_intermediate_size=None)
    more = work(E).layer()[0].products - work(without).layer()[0].products
    weights = 3 * 7168 * 2048
    assert more == pytest.approx(2 * 4096 * weights / work(E).flop_per_s, rel=0.05)
    split = {"tp": 2, "sequence_parallel": True, "dp": 4, "global_batch_size": 4}
    with_it, plain = (work(with_changes(e, **split)).tensor_parallel()[0] for e in (E, without))
    assert with_it.exchange > plain.exchange == 0, "attention's sums are latent attention's own"


def test_recomputed_projections_up_cost_their_products_again():
    again = with_changes(E, recompute="selective", recompute_modules=("mla_up_proj",))
    more = work(again).layer()[1].products - work(E).layer()[1].products
    weights = 1536 * 128 * 192 + 512 * 128 * 256
    assert more == pytest.approx(2 * 4096 * weights / work(E).flop_per_s, rel=0.05)


def test_a_step_of_deepseek_v3_is_predicted():
    """Of 256 nodes; multi-token prediction makes it longer by about its share of the FLOPs."""
    settings = {"GPUS": "2048", "TP": "2", "EP": "64", "GBS": "8192", "SEQ": "4096", "PP": "1"}
    with_it = experiment_from("deepseek-v3", settings)
    without = changed(with_it, mtp_num_layers=None)
    machine = calibrations.load()["h100-tutorial"]
    longer = machine.predict(with_it).total / machine.predict(without).total
    assert longer == pytest.approx(step_flops(with_it) / step_flops(without), rel=0.05)
