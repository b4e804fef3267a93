"""How long a step takes, by formula: against records and the published table, unseen rows first."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness import RECORDS
from harness.cli import main
from harness.errors import UserError
from harness.evidence import calibrate, step_time_tables
from harness.evidence.facts import Facts
from harness.evidence.rows import predicted_step_ms
from harness.experiment import command_line, overrides
from harness.experiment.catalog import load_catalog, load_models
from harness.experiment.constraints import with_changes
from harness.experiment.fabrics import LINKS
from harness.experiment.hardware import find_card
from harness.experiment.model import Lora
from harness.experiment.unlisted import experiment_from
from harness.predict import calibrations, machine_file, rates, step_time, timeline
from harness.predict.calibrations import Machine
from harness.predict.flops import count_parameters, parameters_on
from harness.predict.network import MESSAGE_S
from harness.predict.step_time import (
    ADAM_BYTES,
    HOST_ADAM_BYTES,
    HOST_BYTES_PER_S,
    StepWork,
    unknown,
)
from harness.predict.work import ROUTED_PASSES, Calibration

CATALOG = load_catalog()
NOWHERE = Path("/nowhere")
"""An output directory without a machine file."""
FACTS = Facts.load(RECORDS)
MACHINES = calibrations.load()
KNOWN = [e for e in CATALOG.experiments if not unknown(e)]
PUBLISHED = MACHINES["h100-tutorial"]
SPEED = PUBLISHED.speed()
PAIR = SPEED.rates.link_gb_s * 1e9
"""What each of two GPUs sends to the other in a second."""
NODE = find_card("h100-80gb").link_gb_per_s
LINK = LINKS["nvlink4"].share * NODE * 1e9
REDUCED = LINKS["nvlink4"].reduce_share * NODE * 1e9
"""What a rank sends in a second to seven others, and where the switch adds up."""


def find(id_, settings=""):
    return overrides.apply(CATALOG.find(id_), command_line.parse(settings.split()))


def steps_of(machine):
    return calibrate.steps_of(machine, FACTS.rows, FACTS.references, CATALOG)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("e", KNOWN, ids=lambda e: e.id)
def test_pieces_make_the_step(e, machine):
    step = machine.predict(e)
    assert all(ms >= 0 for ms in step.pieces.values())
    assert step.total == pytest.approx(sum(step.pieces.values())) and step.products > 0
    assert (step.bubble > 0) == (e.pp > 1)
    assert (step.gradients > 0) == (e.dp * e.cp > 1 or (e.pp > 1 and not e.model.untie_embeddings))
    sends = e.tp > 1 or (e.pp > 1 and e.vpp == 1) or e.ep * e.etp > 1 or e.cp_comm_type != "p2p"
    assert (step.exchange > 0) == sends or e.cp * e.vpp > 1  # which hide behind computing
    assert (step.stragglers > 0) == (e.world_size > 8)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_file_has_every_measured_step_and_what_the_formula_says_now(machine):
    """Where this fails, records, references or the formula changed: make calibrate."""
    steps = {step.name: step for step in steps_of(machine)}
    assert steps.keys() == machine.rows.keys()
    for name, row in machine.rows.items():
        assert row.measured_ms == pytest.approx(steps[name].step_ms, abs=0.06)
        foretold = calibrate.predicted_ms(machine, steps[name])
        assert row.predicted_ms == pytest.approx(foretold, rel=2e-3)


@pytest.mark.parametrize("name", MACHINES)
def test_constants_are_those_that_fit(name):
    pytest.importorskip("scipy", reason="SciPy is not installed: scripts/setup.sh calibrate")
    machine, steps = MACHINES[name], steps_of(MACHINES[name])
    again = calibrate.fit(machine, MACHINES.get(machine.like), steps, machine)
    for step in steps:
        now = calibrate.predicted_ms(machine, step)
        assert calibrate.predicted_ms(again, step) == pytest.approx(now, rel=0.01)


def test_a_fit_finds_the_machine_that_made_the_steps():
    """Steps computed with other constants, a slow CPU and slow links: the fit must predict rows that it was not given."""
    pytest.importorskip("scipy", reason="SciPy is not installed: scripts/setup.sh calibrate")
    made_by = PUBLISHED.model_copy(
        update={
            "constants": PUBLISHED.constants.model_copy(
                update={"host": 2.2, "exposed": 0.3, "collective_ms": 0.6, "step_ms": 90.0}
            )
        }
    )
    given = (
        "101",
        "104",
        "111",
        "114",
        "211",
        "214",
        "218",
        "221",
        "224",
        "228",
        "234",
        "244",
        "282",
    )
    steps = [calibrate.Measured(id_, find(id_), made_by.predict(find(id_)).total) for id_ in given]
    found = calibrate.fit(PUBLISHED, PUBLISHED, steps)
    for id_ in ("212", "222", "232", "248", "283"):
        assert found.predict(find(id_)).total == pytest.approx(
            made_by.predict(find(id_)).total, rel=0.06
        )
        assert abs(PUBLISHED.predict(find(id_)).total / made_by.predict(find(id_)).total - 1) > 0.08


@pytest.mark.parametrize(
    ("name", "median", "most"), [("h200", 0.045, 0.22), ("h100-tutorial", 0.05, 0.3)]
)
def test_rows_of_chapters_that_were_left_out(name, median, most):
    """H100's rates are another card's: without its rows of a chapter, its experts and rings are a guess."""
    half, nine_tenths, _ = MACHINES[name].misses()
    assert half < median and nine_tenths < most


def test_what_a_chapter_shares_with_another_is_left_out_with_it():
    steps = steps_of(MACHINES["h200"])
    assert {"211", "231", "601"} <= {step.name for step in steps}
    left = {step.name for step in calibrate.unseen_by("2", steps)}
    assert "601" in left and not left & {"211", "231", "241"}
    twin = [
        replace(step, experiment=step.experiment.model_copy(update={"id": "931"}))
        for step in steps
        if step.name == "231"
    ]
    assert not {"211", "231"} & {step.name for step in calibrate.unseen_by("9", [*steps, *twin])}


@pytest.mark.parametrize(
    ("group", "half", "off"), [("h200-4gpu", 0.05, 0.22), ("h200-8gpu", 0.1, 0.37)]
)
def test_rows_that_nothing_but_their_host_was_fitted_to(group, half, off):
    """Rings of eight ranks on the machine with eight GPUs are the ones that are far off."""
    machine, rows = MACHINES["h200"], FACTS.references.group(group)
    steps = [(e, row.step_ms) for row, e in step_time_tables.predictable_rows(rows, CATALOG)]
    operation_us = machine.launch_rate_behind(steps)
    errors = sorted(abs(machine.predict(e, operation_us).total / ms - 1) for e, ms in steps)
    assert errors[-1] < off and errors[len(errors) // 2] < half


def test_the_launch_rate_behind_steps_is_found():
    machine = MACHINES["h200"]
    steps = [(find(id_), machine.predict(find(id_), 31.0).total) for id_ in ("101", "111", "601")]
    assert machine.launch_rate_behind(steps) == pytest.approx(31, rel=0.02)


def test_layouts_come_in_the_order_that_was_measured():
    """The 8.3B model on four H200s: 1,170 ms with TP 4, 825 with PP 4, 551 (without dropout) with DP 4."""
    tensor, pipeline, data = (
        MACHINES["h200"].predict(find(*words)).total
        for words in (
            ("420", "GPUS=4 TP=4 GBS=16 MBS=4"),
            ("401", "GPUS=4 PP=4 GBS=16 MBS=2"),
            ("401", "GPUS=4 PP=1 DP=4 SHARDING=optim GBS=16 MBS=4 DROPOUT=0"),
        )
    )
    assert tensor > pipeline > data


def test_a_graph_leaves_nothing_to_launch():
    """101 waits for launches, 111 for its GPU."""
    for machine in MACHINES.values():
        small, graphs = machine.predict(find("101")), machine.predict(find("101", "CUDA_GRAPHS=1"))
        assert (
            graphs.launches < small.launches / 3
            and graphs.products == small.products
            and graphs.total < 0.6 * small.total
        )
        large, graphs = machine.predict(find("111")), machine.predict(find("111", "CUDA_GRAPHS=1"))
        assert 0.98 * large.total < graphs.total <= large.total
    experts, graphs = (
        PUBLISHED.predict(find("501")),
        PUBLISHED.predict(find("501", "CUDA_GRAPHS=1")),
    )
    assert 0 < graphs.launches < experts.launches, "experts are launched one by one"
    for id_, pair in (("408", "pipelines"), ("302", "context parallelism by p2p")):
        assert any(
            {"CUDA graphs", pair} == set(kinds.split(" with "))
            for kinds in MACHINES["h200"].unmeasured(find(id_, "CUDA_GRAPHS=1"))
        ), pair
    measured = MACHINES["h200"].unmeasured(find("501", "CUDA_GRAPHS=1"))
    assert not any({"CUDA graphs", "experts"} == set(one.split(" with ")) for one in measured)


@pytest.mark.parametrize("group", ["h100-tutorial"])
def test_teaching_points_follow_from_the_formula(group):
    """What the chapters say of the published table, for constants that fit it."""
    ms = {e.id: MACHINES[group].predict(e).total for e in KNOWN}
    pieces = {e.id: MACHINES[group].predict(e).pieces for e in KNOWN}
    assert max(pieces["101"], key=pieces["101"].get) == "launches"
    assert ms["401"] > ms["402"] > ms["404"] > ms["408"] < ms["416"] < ms["432"]
    assert ms["438"] < ms["408"] and ms["282"] < ms["283"]
    assert (
        ms["328"] < ms["308"]
        and ms["502"] < ms["501"] < ms["503"]
        and ms["506"] < ms["511"] < ms["512"]
    )


def test_recomputing_an_activation_of_experts_moves_their_rows_and_a_norm_its_tokens():
    e, machine = find("642"), MACHINES["h200"]
    none, experts, norm = (
        machine.predict(
            with_changes(e, recompute="selective" if modules else "none", recompute_modules=modules)
        ).passes
        for modules in ((), ("moe_act",), ("layernorm",))
    )
    rows = ROUTED_PASSES * e.model.moe_router_topk * e.model.moe_ffn * 6
    assert norm > none and (experts - none) / (norm - none) == pytest.approx(
        rows / (e.model.hidden_size * 4)
    )


def test_a_pipeline_waits_as_its_schedule_says():
    """With stages alike, idle over busy time is (p-1)/(v m)."""
    e = find("408", "GBS=64")
    alike = Calibration(stage_ms=1e-9, host=1e-9)
    machine = replace_constants(PUBLISHED, alike)
    for settings, chunks in (("GBS=64", 1), ("GBS=64 VPP=3", 3)):
        e = find("408", settings).model_copy(
            update={"model": CATALOG.find("408").model.model_copy(update={"vocab_size": 128})}
        )
        step = machine.predict(e)
        busy = step.products + step.attention + step.passes + step.exchange + step.launches
        assert step.bubble / busy == pytest.approx(
            timeline.bubble_fraction(8, 16, chunks), rel=0.03
        )


@pytest.mark.parametrize(
    ("stages", "micro_batches", "chunks"), [(2, 1, 1), (4, 8, 1), (8, 8, 3), (8, 32, 1), (3, 6, 4)]
)
def test_a_duration_is_the_end_of_its_timeline(stages, micro_batches, chunks):
    times = timeline.Times(
        tuple(1 + stage / 10 for stage in range(stages)),
        tuple(2 + stage / 3 for stage in range(stages)),
    )
    ends = timeline.simulate(micro_batches, times, chunks).end
    assert timeline.duration(micro_batches, times, chunks) == pytest.approx(ends, rel=1e-12)


def test_the_slower_of_gpu_and_cpu_decides():
    e, fast_us, slow_us = find("101"), 1e-6, 20 * SPEED.operation_us
    launched = SPEED.rates.plain.forward + SPEED.rates.plain.backward
    slow = 48 * launched * 20 * PUBLISHED.constants.host
    assert PUBLISHED.predict(e, slow_us).total == pytest.approx(slow, rel=0.2)
    assert PUBLISHED.predict(e, fast_us).launches < 0.1 < PUBLISHED.predict(e).launches


def pieces(id_, settings="", **changes):
    """The pieces of a step with ``changes`` to the experiment, and with ``model`` ones to its model."""
    e = find(id_, settings)
    model = e.model.model_copy(update=changes.pop("model", {}))
    return PUBLISHED.predict(e.model_copy(update={"model": model} | changes))


def test_tied_embeddings_are_summed_up_over_the_ends_of_a_pipeline():
    tied, untied = pieces("408"), pieces("408", model={"untie_embeddings": True})
    message = 4 * 50304 * 3072
    # over two of eight stages in one node, a ring sends the message once
    assert tied.gradients == pytest.approx(1e3 * (message / PAIR + MESSAGE_S))
    assert untied.gradients == 0 and pieces("228").gradients == 0


def test_embedding_and_output_layer_send_under_tensor_parallelism():
    """48 layers send 2 sums each way; the embedding one forward, the output layer one backward, and the loss three numbers."""
    link, exposed = REDUCED, PUBLISHED.constants.exposed
    e = find("281")
    each = 9 / 8 * 2 * e.seq_length * e.micro_batch_size * e.model.hidden_size / link + MESSAGE_S
    forward, backward = 2 * e.model.num_layers + 1, 2 * e.model.num_layers + 1
    sent = forward * each + backward * each * exposed + 3 * MESSAGE_S
    assert pieces("281").exchange == pytest.approx(1e3 * sent)
    assert pieces("281").exchange - pieces(
        "281", cross_entropy_fusion=True
    ).exchange == pytest.approx(1e3 * MESSAGE_S)


def test_sequence_parallelism_splits_tokens_before_they_are_routed():
    """Experts exchange tokens: of tensor parallelism's sums, attention's are left."""
    whole, split = pieces("502", "DP=1 GBS=4 EP=1"), pieces("502", "TP=8 SP=1 DP=1 GBS=4 EP=8")
    assert split.products < whole.products / 5
    e = find("502", "TP=8 SP=1 DP=1 GBS=4 EP=8")
    link, tokens = LINK, e.seq_length * e.micro_batch_size
    gathered = 7 / 8 * 2 * tokens * e.model.hidden_size / link + MESSAGE_S
    exchanged = 2 * tokens / 8 * 8 * e.model.hidden_size * 2 * 7 / 8 / link + 2 * MESSAGE_S
    sums = 2 * gathered * (1 + PUBLISHED.constants.exposed)
    # with learned positions, embeddings are all-reduced
    embedding = 9 / 8 * 2 * tokens * e.model.hidden_size / REDUCED + MESSAGE_S
    ends = (
        embedding + gathered + gathered + 2 * gathered * PUBLISHED.constants.exposed + 3 * MESSAGE_S
    )
    assert split.exchange == pytest.approx(
        1e3 * (e.model.num_layers * (sums + 2 * exchanged) + ends)
    )


def test_the_host_updates_what_it_holds():
    """A core's rate by hand: 34 bytes a parameter of an eighth of the model."""
    on_gpu, half = (pieces("128", sharding="optim", offload=offload) for offload in (0.0, 0.5))
    parameters = count_parameters(find("128")).total / 8
    moved = parameters * ADAM_BYTES["fp32"] / 2 / PUBLISHED.speed().rates.memory_gb_s / 1e9
    host = parameters / 2 * HOST_ADAM_BYTES / HOST_BYTES_PER_S
    more = half.optimizer - on_gpu.optimizer
    assert more == pytest.approx(1e3 * (host - moved), rel=0.05) and more > 500 / 8
    assert half.total - on_gpu.total == pytest.approx(more)


def test_bf16_moments_and_gradients_move_less():
    full, moments, both = (
        pieces("611", optimizer_state=state, gradients=gradients)
        for state, gradients in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
    )
    assert full.optimizer > moments.optimizer > both.optimizer
    assert full.gradients == moments.gradients == pytest.approx(both.gradients * 6 / 4)
    assert full.passes == moments.passes > both.passes


def test_fewer_key_heads_move_less_and_every_element_of_a_model_costs():
    assert pieces("111", model={"num_query_groups": 5}).products < pieces("111").products
    for element in (
        {"position_embedding": "rope"},
        {"qk_norm": "head"},
        {"attention_output_gate": True},
        {"activation": "swiglu"},
    ):
        assert pieces("111", model=element).passes > pieces("111").passes
    assert pieces("111", cross_entropy_fusion=True).passes < pieces("111").passes


def test_fp8_halves_products_and_pays_with_passes():
    """Of 611's layers: what enters a linear layer forward, and the gradient of what leaves it, is quantized; logits are not."""
    e, machine = (
        find("611"),
        PUBLISHED,
    )
    m, tokens = e.model, e.seq_length * e.micro_batch_size * e.num_microbatches
    step = {id_: machine.predict(find(id_)) for id_ in ("611", "612", "613", "614")}
    logits = (
        3 * machine.predict(find("611")).products
    )  # an upper bound of what the output layer takes of it
    assert (
        0.5 < step["612"].products / step["611"].products < 0.65
        and 1 < step["613"].products / step["612"].products < 1.05
        and step["614"].products < logits
    )
    elements = tokens * (2 * m.hidden_size + m.query_size + m.ffn) + tokens * (
        m.qkv_size + 2 * m.ffn + 2 * m.hidden_size
    )
    weights = m.hidden_size * (m.qkv_size + m.query_size + 3 * m.ffn)
    bandwidth = SPEED.rates.memory_gb_s * 1e9 * machine.constants.passes
    for id_, each in (("612", 4), ("613", 6), ("614", 4)):
        more = each * m.num_layers * (elements + weights) / bandwidth
        assert step[id_].passes - step["611"].passes == pytest.approx(1e3 * more)
    assert (
        step["613"].gradients == pytest.approx(step["611"].gradients)
        and step["613"].attention == step["611"].attention
    )
    assert unknown(find("615", "FP8=delayed")) == []
    assert pieces("501", "FP8=delayed").products < pieces("501").products
    assert pieces("501", "FP8=delayed").passes > pieces("501").passes


def test_sharded_weights_are_gathered_twice_a_micro_batch():
    """Bytes of a parameter: fp32 gradients and bf16 weights once, 6; bf16 both, 4; weights twice, 6; in two micro-batches, 12."""
    sent = {id_: pieces(id_).gradients for id_ in ("702", "703", "704", "705", "706", "611", "711")}
    assert (
        sent["702"] == sent["705"] == pytest.approx(1.5 * sent["703"])
        and sent["703"] == sent["704"]
    )
    assert sent["711"] == pytest.approx(2 * sent["611"]) and sent["706"] > sent["705"]
    assert pieces("704", "MBS=8").gradients == pytest.approx(sent["704"] * 6 / 4)
    assert (
        pieces("702").optimizer
        > pieces("703").optimizer
        > pieces("704").optimizer
        == pieces("705").optimizer
    )
    assert pieces("713", "DP=1").gradients == 0
    alone, sharded = pieces("282"), pieces("282", sharding="fsdp_optim_grads_params")
    assert sharded.exchange > 1.1 * alone.exchange, "both want the queues otherwise"


def test_adapters_leave_out_the_products_of_frozen_weights():
    """A third of all products is for the weights' gradients; what adapters add is small and launched one by one."""
    whole, narrow, wide = (
        pieces("811", "LORA_RANK=0"),
        pieces("811", "LORA_RANK=1"),
        pieces("811", "LORA_RANK=512"),
    )
    assert 2 / 3 < narrow.products / whole.products < 0.8 < wide.products / whole.products
    once = 1e3 * PUBLISHED.constants.step_ms * SPEED.host_s
    assert narrow.optimizer - once < 0.1 * (whole.optimizer - once)
    assert narrow.optimizer < wide.optimizer
    few, all_four = (
        pieces("802", f"LORA_TARGETS={targets}")
        for targets in ("linear_qkv", "linear_qkv,linear_proj,linear_fc1,linear_fc2")
    )
    assert (
        few.launches + few.products + few.passes
        < all_four.launches + all_four.products + all_four.passes
    )
    assert pieces("802", "LORA_DROPOUT=0.1").passes > pieces("802", "LORA_DROPOUT=0").passes
    assert pieces("803").exchange > pieces("803", "LORA_TARGETS=linear_qkv").exchange > 0


@pytest.mark.parametrize("model", ["gpt-7.5b", "olmoe-1b-7b", "qwen3-235b-a22b", "deepseek-v3"])
def test_muon_iterates_on_matrices_of_every_kind(model):
    """Queries, keys and values apart; latent attention, shared experts, the layer that predicts."""
    experts = {"EP": "8"} if "gpt" not in model else {}
    e = experiment_from(model, {"GPUS": "32", "GBS": "64", "TP": "4"} | experts)
    work = StepWork(e, SPEED)
    held = parameters_on(e, work.fullest)
    weights = sum(rows * columns * number for rows, columns, number in work.orthogonalized())
    assert weights == held.matrices + held.expert_matrices


def test_muon_iterates_on_every_matrix():
    """Beyond Adam: five times three products of each of 24 x 6 matrices, bytes, and launches, which take longest."""
    adam, muon, shared = pieces("661"), pieces("671"), pieces("672")
    operations = 24 * SPEED.rates.more("muon").optimizer * SPEED.host_s
    assert muon.optimizer - adam.optimizer == pytest.approx(1e3 * operations, rel=0.2)
    assert muon.optimizer - adam.optimizer > 1e3 * operations
    without = pieces("672", optimizer="adam").optimizer
    assert shared.optimizer - without == pytest.approx((muon.optimizer - adam.optimizer) / 4)
    assert replace(muon, optimizer=0.0) == replace(adam, optimizer=0.0)


def test_norms_over_projections_cost_more_than_those_of_heads():
    none, head, projection = (
        pieces("631", model={"qk_norm": kind}) for kind in ("none", "head", "projection")
    )
    assert none.passes < head.passes < projection.passes
    for id_ in ("101", "631"):  # where the GPU waits for launches, and where it does not
        waits = [
            sum(pieces(id_, model={"qk_norm": kind}).pieces.values())
            for kind in ("head", "projection")
        ]
        assert waits[0] < waits[1]
    tp, heads = (
        pieces("631", "TP=2 SP=1 DP=2 EP=4", model={"qk_norm": kind})
        for kind in ("projection", "head")
    )
    assert tp.exchange - heads.exchange == pytest.approx(
        1e3 * 2 * 2 * 4 * 16 * MESSAGE_S
    )  # passes, sums, micro-batches, layers


def test_what_no_row_has_is_named():
    assert PUBLISHED.unmeasured(find("111")) == ()
    assert PUBLISHED.unmeasured(find("705")) == ("FSDP",)
    young = young_machine()
    assert "fp8 tensorwise" in young.unmeasured(
        find("613")
    ) and "fp8 blockwise" in young.unmeasured(find("614"))
    assert "pipelines" in young.unmeasured(find("408")), (
        "of the machine that it is like, other errors are known"
    )
    assert PUBLISHED.how_sure(find("705")) == "no measured row has FSDP: error unknown"
    assert all(step_time.kinds(e) for e in CATALOG.experiments if e.world_size > 1)


def test_no_band_where_no_measured_row_has_the_like():
    """408 on eight H200s took 17.5 % longer than foretold, beside "nine in ten within 10 %" of rows on up to four."""
    h200 = MACHINES["h200"]
    assert h200.how_sure(find("408")) == "no measured row has 8 GPUs: error unknown"
    for id_ in ("128", "505", "651"):
        assert h200.band(find(id_)) is None and h200.how_sure(find(id_)).endswith(
            "error unknown"
        ), id_
    known, other = find("111"), find("713")
    assert h200.how_sure(known) == str(h200.bands["one GPU"])
    both = h200.how_sure(known, other, find("408"))
    assert both == (
        f"{h200.bands['one GPU']}; {h200.bands['sharded replicas']}; "
        "no measured row has 8 GPUs: error unknown"
    )
    for machine in MACHINES.values():
        assert not any(
            machine.unmeasured(overrides.experiment_of(row.make or name, CATALOG))
            for name, row in machine.rows.items()
        )


def test_a_band_is_that_of_the_rows_of_its_kind():
    def row(measured_ms):
        return calibrations.Fitted(measured_ms=measured_ms, predicted_ms=100, left_out_ms=100)

    rows = {f"{id_}": row(100) for id_ in ("101", "111", "211", "241", "601")}
    rows["111"] = row(80)  # off by a quarter
    machine = PUBLISHED.model_copy(update={"rows": rows | {"408": row(125), "438": row(50)}})
    one, pipelines = machine.bands["one GPU"], machine.bands["pipelines"]
    assert (one.rows, one.median, one.most) == (5, 0, pytest.approx(0.25))
    assert (pipelines.rows, pipelines.most) == (2, pytest.approx(1.0))
    assert str(pipelines).endswith("100% at most (2 rows left out of the fit)")
    assert (
        str(one) == "one GPU: off by 0.0% median, 25% 90th percentile (5 rows left out of the fit)"
    )
    assert machine.error(find("101")) == one.most
    assert machine.error(find("502")) == pipelines.most, "the worst, where no row is of the kind"


def test_methods_that_no_row_has_together_are_named_as_a_pair():
    """One row has tensor parallelism, another one pipelines."""
    rows = {name: PUBLISHED.rows[name] for name in ("248", "408", "128")}
    apart = PUBLISHED.model_copy(update={"rows": rows})
    assert "pipelines with tensor parallelism" in apart.unmeasured(find("443"))
    assert "pipelines with tensor parallelism" not in PUBLISHED.unmeasured(find("443"))
    assert apart.unmeasured(find("408")) == ()


SIZES = {"num_layers", "layer_pattern", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "vocab_size", "norm_epsilon", "rotary_base",
         "rope_scaling_factor", "init_method_std", "moe_router_topk", "moe_ffn_hidden_size", "name", "moe_router_group_topk",
         "moe_router_topk_scaling_factor", "mtp_loss_scaling_factor"}  # fmt: skip
NO_WORK = {"id", "slug", "chapter", "shows", "model", "micro_batch_size", "global_batch_size", "seq_length", "lr", "min_lr", "lr_decay",
           "lr_warmup_steps", "weights", "positions", "steps", "eval_interval", "eval_steps", "save_every", "keep", "until", "load",
           "window_first_step", "data", "split", "published_data", "card", "profile", "miniature", "overrides", "extra_args"}  # fmt: skip
CHOICES = {
    "num_query_groups": 2, "untie_embeddings": True, "add_bias_linear": False, "normalization": "RMSNorm", "activation": "swiglu",
    "position_embedding": "rope", "yarn": None, "qk_norm": "head", "attention_output_gate": True, "attention_sinks": True, "window_size": 4,
    "dropout": 0.0, "num_experts": 8, "moe_router_pre_softmax": True, "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1,
    "latent_attention": load_models()["deepseek-v3"].latent_attention, "rotary_percent": 0.5, "first_dense_layers": 1, "mtp_num_layers": 1,
    "moe_shared_expert_intermediate_size": 64, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "mamba": load_models()["nemotron-h-8b"].mamba, "moe_router_num_groups": 4, "moe_router_load_balancing_type": "seq_aux_loss",
    "tp": 2, "pp": 2, "vpp": 2, "first_stage_layers": 2, "last_stage_layers": 2, "pp_layout": "E|tL", "embedding_as_layer": True, "loss_as_layer": True, "cp": 2, "ep": 2, "etp": 2, "dp": 2, "nodes": 2, "moe_dispatcher": "flex", "ep_overlap": True, "delay_wgrad": True, "grouped_gemm": "cublas", "entry": "hybrid", "moe_backend": "hybridep", "moe_capacity": 1.25, "router_fusion": True, "shared_expert_overlap": True, "deterministic": True, "sequence_parallel": True, "tp_overlap": True, "sharding": "torch_fsdp2",
    "recompute": "full", "precision": "fp8", "optimizer": "muon", "optimizer_state": "bf16", "offload": 0.5, "gradients": "bf16",
    "lora": Lora(rank=4, alpha=8.0), "cross_entropy_fusion": True, "cross_entropy_fusion_impl": "te", "attention_mask": False, "gradient_fusion": True, "overlap": False, "optimizer_instances": 2, "fp8_params": True, "cuda_graphs": True, "attention_backend": "unfused",
}  # fmt: skip
"""A value of each other field that the catalogue's 101 does not have."""


def test_every_choice_that_changes_the_work_is_a_kind_of_its_own():
    """A field that is added must be told here, too, and so in kinds, or a row of it would get others' error."""
    e = find("101")
    for field in {*type(e).model_fields, *type(e.model).model_fields} - SIZES - NO_WORK - {"yarn"}:
        if field in ("fp8_recipe", "fp4_recipe", "cp_comm_type", "cp_a2a", "recompute_modules"):
            continue  # what these change is asked for below
        of_model = field in type(e.model).model_fields
        change = {field: CHOICES[field]}
        changed = e.model_copy(
            update={"model": e.model.model_copy(update=change)} if of_model else change
        )
        assert step_time.kinds(changed) - step_time.kinds(e), field
    for pair in (
        (
            {"precision": "fp8", "fp8_recipe": "delayed"},
            {"precision": "fp8", "fp8_recipe": "blockwise"},
        ),
        (
            {"precision": "fp8", "fp8_recipe": "tensorwise"},
            {"precision": "fp8", "fp8_recipe": "mxfp8"},
        ),
        (
            {"precision": "fp8", "fp8_recipe": "mxfp8"},
            {"precision": "fp4", "fp4_recipe": "nvfp4"},
        ),
        ({"cp": 2, "cp_comm_type": "p2p"}, {"cp": 2, "cp_comm_type": "a2a"}),
        ({"cp": 4, "cp_comm_type": "a2a"}, {"cp": 4, "cp_comm_type": "a2a+p2p", "cp_a2a": 2}),
        ({"dp": 4}, {"dp": 8}),
        ({"dp": 2, "sharding": "fsdp_optim"}, {"dp": 2, "sharding": "torch_fsdp2"}),
        ({"recompute": "selective"}, {"recompute": "selective", "recompute_modules": ("mlp",)}),
    ):
        one, other = (step_time.kinds(e.model_copy(update=change)) for change in pair)
        assert one != other, pair


def test_fp8_needs_a_card_that_has_it():
    machine = Machine(gpu="a100-80gb", measured_by="records", switch_reduces=True)
    with pytest.raises(
        UserError, match="612 computes in fp8, which NVIDIA A100-SXM4-80GB does not"
    ):
        machine.predict(find("612"))


def test_nvfp4_needs_a_card_that_has_it():
    machine = Machine(gpu="h200-141gb", measured_by="records", switch_reduces=True)
    with pytest.raises(
        UserError, match=r"611: FP4=nvfp4: NVIDIA H200 has no .* set FP8=tensorwise in its place"
    ):
        machine.predict(find("611", "FP4=nvfp4"))


@pytest.mark.parametrize(
    ("key", "times"), [("b200-180gb", 2), ("b300-288gb", 3), ("gb200-186gb", 2), ("gb300-288gb", 3)]
)
def test_nvfp4_multiplies_as_the_data_sheet_says_of_its_peak_and_that_of_fp8(key, times):
    machine = calibrations.machine_of(find_card(key))
    fp8, fp4 = (
        StepWork(find("611", words), machine.speed()) for words in ("FP8=tensorwise", "FP4=nvfp4")
    )
    assert fp4.quantised_flop_per_s == pytest.approx(times * fp8.quantised_flop_per_s)
    # fewer bytes than with tensorwise scales are moved: 2 x 9/16 in place of 2 are written
    of_fp8, of_fp4 = (sum(each.passes for each in one.quantization()) for one in (fp8, fp4))
    assert of_fp4 / of_fp8 == pytest.approx((4 + 2 * 9 / 16) / 6)
    assert fp4.linear_layers()[0].products < fp8.linear_layers()[0].products
    step = machine.predict(find("611", "FP4=nvfp4"))
    assert "fp4 nvfp4" in machine.how_sure(find("611", "FP4=nvfp4")) and step.total > 0


def test_cards_before_blackwell_have_no_rate_of_nvfp4():
    assert calibrations.machine_of(find_card("h200-141gb")).speed().rates.fp4_tflops is None
    assert calibrations.machine_of(find_card("b200-180gb")).speed().rates.fp4_tflops > 4000


def test_multi_token_prediction_takes_as_long_with_nvfp4():
    machine = calibrations.machine_of(find_card("b200-180gb"))
    bf16, fp4, fp8 = (
        StepWork(find("611", f"MTP=1 {words}"), machine.speed()).layers
        for words in ("", "FP4=nvfp4", "FP8=tensorwise")
    )
    assert fp4["predictors"] == bf16["predictors"] != fp8["predictors"]
    assert fp4["dense"][0].products < fp8["dense"][0].products < bf16["dense"][0].products


def test_what_delayed_gradients_bring_is_not_predicted(capsys):
    plain, delayed = "EP_OVERLAP=1", "EP_OVERLAP=1 DELAY_WGRAD=1"
    assert PUBLISHED.predict(find("502", plain)) == PUBLISHED.predict(find("502", delayed))
    assert PUBLISHED.band(find("502", delayed)) is None
    assert main(["speed", "502", *delayed.split(), "CARD=h100-80gb"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not predicted: how much DELAY_WGRAD=1 hides" in said
    assert "no measured row has" in said and "delayed weights' gradients" in said


def test_recomputation_costs_what_is_done_again():
    none, selective, full = (
        pieces("302", f"RECOMPUTE={how}") for how in ("none", "selective", "full")
    )
    assert none.attention < selective.attention == full.attention
    assert (
        none.products == selective.products < full.products
        and none.passes < selective.passes < full.passes
    )
    mlp = pieces("302", "RECOMPUTE_MODULES=mlp")
    assert none.products < mlp.products < full.products and mlp.attention == none.attention
    plain, *again = (
        PUBLISHED.predict(find("501", words)).total
        for words in ("", "RECOMPUTE_MODULES=layernorm", "RECOMPUTE_MODULES=moe", "RECOMPUTE=full")
    )
    assert plain < again[0] < again[1] < again[2]


def test_instances_of_the_optimizer_exchange_within_and_then_their_shards():
    """An instance that stays in its node sends as in a node, and its shards' gradients to the others."""
    sizes = {"SHARDING": "optim", "OVERLAP": "0", "GBS": "64"}
    node, eight = (
        PUBLISHED.predict(experiment_from("llama3-8b", sizes | more)).gradients
        for more in ({"GPUS": "8"}, {"GPUS": "64", "OPTIM_INSTANCES": "8"})
    )
    parameters = parameters_on(experiment_from("llama3-8b", sizes | {"GPUS": "8"}), 0).dense
    shards_s = 2 * (7 / 8) * 4 * parameters / 8 / 50e9
    assert eight - node == pytest.approx(1e3 * shards_s, rel=0.3), "over a NIC of 50 GB/s"
    same, more = pieces("128", "OVERLAP=0"), pieces("128", "OVERLAP=0 OPTIM_INSTANCES=2")
    assert more.gradients > same.gradients, "within a node it sends shards twice"


def test_an_instance_updates_its_whole_state():
    """Eight ranks, two instances: each updates a quarter of the parameters in place of an eighth."""
    one, two, four = (pieces("128", f"OPTIM_INSTANCES={n}").optimizer for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one)) and two > 1.1 * one


def test_instances_of_sharded_weights_gather_them_within_an_instance():
    """Megatron-FSDP gathers weights of an instance; instances sum up gradients once a step."""
    words = {"GPUS": "64", "GBS": "512", "MBS": "1", "SHARDING": "fsdp_optim_grads_params"}
    one, eight = (
        PUBLISHED.predict(experiment_from("llama3-8b", words | more)).gradients
        for more in ({}, {"OPTIM_INSTANCES": "8"})
    )
    assert eight < one
    with pytest.raises(
        UserError, match=r"OPTIM_INSTANCES=2 is for Adam with .* not for adam with torch_fsdp2"
    ):
        find("128", "SHARDING=torch_fsdp2 OPTIM_INSTANCES=2")


def test_weights_in_fp8_are_gathered_in_fp8():
    words = "SHARDING=optim OVERLAP=0"
    bf16, fp8 = (pieces("613", f"{words}{more}") for more in ("", " FP8_PARAMS=1"))
    assert fp8.gradients < bf16.gradients and fp8.products == bf16.products


def test_without_overlap_all_that_replicas_send_is_exposed():
    beside, alone = (pieces("128", words) for words in ("", "OVERLAP=0"))
    e = find("128")
    parameters, sent = parameters_on(e, 0).dense, 2 * (e.dp - 1) / e.dp
    assert alone.gradients > beside.gradients
    assert alone.gradients == pytest.approx(1e3 * parameters * (4 + 2) * sent / 2 / LINK, rel=0.1)
    assert pieces("111", "OVERLAP=0") == pieces("111", "")


def test_reducing_in_the_switch_sends_less():
    e = find("248")
    without = PUBLISHED.model_copy(update={"switch_reduces": False})
    assert PUBLISHED.predict(e).exchange < without.predict(e).exchange
    assert (
        PUBLISHED.predict(find("242")).exchange == without.predict(find("242")).exchange
    )  # two ranks send directly


def young_machine() -> Machine:
    """One that has measured nothing but 111, and is like the published."""
    return MACHINES["h200"].model_copy(update={"rows": {"111": MACHINES["h200"].rows["111"]}})


def replace_constants(machine: Machine, constants: Calibration) -> Machine:
    return machine.model_copy(update={"constants": constants})


def test_measured_steps_are_those_that_the_catalogue_makes():
    """A run that was traced, capped, shared its node or ran on another GPU calibrates nothing; nor does a row that has changed."""
    machine, row = MACHINES["h200"], next(row for row in FACTS.rows if row.origin.stem == "101")

    def names(rows):
        return [step.name for step in calibrate.steps_of(machine, rows, FACTS.references, CATALOG)]

    assert names([row]) == ["101"]
    changed = calibrate.steps_of(
        machine,
        [replace(row, experiment=find("101", "MBS=2 GBS=2 STEPS=30"))],
        FACTS.references,
        CATALOG,
    )
    assert [step.experiment for step in changed] == [find("101", "MBS=2 GBS=2")]
    for not_its_own in ("PROFILE=1", "CARD=h100-80gb", "ARGS=--manual-gc"):
        assert names([replace(row, experiment=find("101", not_its_own))]) == []
    assert (
        names([replace(row, experiment=row.experiment.model_copy(update={"seq_length": 512}))])
        == []
    ), "the row was another then"
    assert names([replace(row, gpu_name="NVIDIA H100 80GB HBM3")]) == []
    assert (
        names([replace(row, result=row.result.model_copy(update={"packed_with": ("104",)}))]) == []
    )
    assert names([replace(row, state="oom")]) == []
    assert "115" not in {step.name for step in steps_of(PUBLISHED)}, (
        "nobody knows what the row published as 115 ran"
    )


def test_a_row_shows_what_was_foretold_without_it():
    row = next(row for row in FACTS.rows if row.origin.stem == "304")
    assert row.predicted_step_ms == MACHINES["h200"].rows["304"].left_out_ms
    changed = replace(row, experiment=find("304", "MBS=4"))
    assert changed.predicted_step_ms == pytest.approx(
        MACHINES["h200"].predict(find("304", "MBS=4"), row.operation_us).total
    )
    assert row.operation_us == MACHINES["h200"].launch_us[MACHINES["h200"].rows["304"].day]
    unpredictable = find("620", "ARGS=--manual-gc")
    assert replace(row, experiment=unpredictable).predicted_step_ms is None
    assert replace(row, gpu_name="Tesla T4").predicted_step_ms is None


def test_a_changed_run_calibrates_and_is_found_again():
    e = find("111", "DROPOUT=0 FP8=tensorwise STEPS=30")
    assert (
        overrides.command_of(e) == "111 DROPOUT=0 FP8=tensorwise"
        and overrides.command_of(find("111", "STEPS=3")) == "111"
    )
    row = calibrations.Fitted(
        measured_ms=318, predicted_ms=300, left_out_ms=290, make=overrides.command_of(e)
    )
    young = young_machine()
    machine = young.model_copy(update={"rows": young.rows | {"111_fp8": row}})
    assert (
        predicted_step_ms(e, machine) == 290
        and predicted_step_ms(find("111", "FP8=delayed"), machine) != 290
    )
    assert machine.row_of(find("111")) == MACHINES["h200"].rows["111"]
    assert "fp8 tensorwise" in young.unmeasured(e) and machine.unmeasured(e) == ()


def test_a_row_published_under_another_label_stands_beside_what_ran():
    """The published 443 ran 446 and the other way round; 458 ran 424, which has a row of its own."""
    assert (
        PUBLISHED.row_of(find("446")).measured_ms == 680
        and PUBLISHED.row_of(find("443")).measured_ms == 665
    )
    assert (
        PUBLISHED.row_of(find("424")).measured_ms == 887 and PUBLISHED.row_of(find("458")) is None
    )
    e = find("443")
    assert predicted_step_ms(e, PUBLISHED) == PUBLISHED.row_of(find("443")).left_out_ms
    assert PUBLISHED.row_of(find("443")).predicted_ms == pytest.approx(
        PUBLISHED.predict(e).total, rel=2e-3
    )


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "calibrations.yaml"
    path.write_text(calibrate.render(MACHINES))
    assert calibrations.load(path) == MACHINES
    assert path.read_text() == calibrations.FILE.read_text()


def test_what_a_run_says_before_it_begins():
    assert "step by formula: " in calibrations.summary(
        find("408"), find_card("h100-80gb"), NOWHERE, ()
    )
    assert "percentile" in calibrations.summary(find("408"), find_card("h100-80gb"), NOWHERE, ())
    assert calibrations.summary(find("408"), find_card("h200-141gb"), NOWHERE, ()).endswith(
        "8 GPUs: error unknown"
    )
    unpredictable = find("620", "ARGS=--manual-gc")
    assert calibrations.summary(unpredictable, find_card("h100-80gb"), NOWHERE, ()) is None
    borrowed = calibrations.summary(find("101"), find_card("a100-80gb"), NOWHERE, ())
    assert borrowed.endswith("no measured row has steps on NVIDIA A100-SXM4-80GB: error unknown")
    assert calibrations.summary(find("101"), find_card("v100-16gb"), NOWHERE, ()) is None


def test_the_commands(capsys):
    assert main(["speed", "408", "CARD=h100-80gb"]) == 0
    said = capsys.readouterr().out
    assert (
        "largest; pipeline stages wait for each other" in said
        and "published 875: prediction +" in said
    )
    assert main(["speed", "101"]) == 0
    assert f"measured {FACTS.value('step_ms[101]'):,.1f}: prediction " in capsys.readouterr().out
    assert main(["speed", "281", "CARD=h100-80gb"]) == 0
    assert "memory-281 CARD=h100-80gb lists settings that fit" in capsys.readouterr().out
    assert main(["faster", "420", "GPUS=4", "TP=4", "GBS=16", "MBS=4", "CARD=h200-141gb"]) == 0
    said = capsys.readouterr().out
    assert (
        "layouts of the same work that fit and are faster, the surest first" in said
        and "CARD=" not in said.partition("\n")[2]
    )
    assert main(["faster", "101", "CUDA_GRAPHS=1"]) == 0
    assert "no layout that fits is faster" in capsys.readouterr().out
    assert main(["gpus", "408", "CARD=h100-80gb"]) == 0
    said = capsys.readouterr().out
    assert (
        "32 samples of 1,024 tokens per step" in said
        and "      1                                   no layout divides them and fits" in said
    )
    assert "\n\nNVIDIA H100 80GB HBM3: the fastest layout that fits, predicted\n" in said
    assert (
        "efficiency" in said
        and "make 408 GPUS=16384 TP=8" in said
        and "no measured row has CUDA graphs" in said
    )
    assert "not predicted" not in said
    rows = [
        [float(cell.replace(",", "")) for cell in line.split()[:3]]
        for line in said.splitlines()
        if "make 408" in line
    ]
    assert len(rows) == 14 and rows[0][2] == 1
    for gpus, step_ms, efficiency in rows:
        assert efficiency == pytest.approx(rows[0][0] * rows[0][1] / (gpus * step_ms), abs=0.01)
    assert main(["gpus", "651", "CARD=h200-141gb"]) == 0
    said = capsys.readouterr().out
    assert (
        ": the fastest layout that fits, predicted\n" in said
        and "norms of queries and keys" in said
        and "error unknown" in said
    )
    assert main(["gpus", "101", "CARD=a100-80gb"]) == 0
    said = capsys.readouterr().out
    assert (
        "gpt2-xl, 1 sample of 1,024 tokens per step" in said
        and "no measured row has steps on NVIDIA A100-SXM4-80GB" in said
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["speed"], "which experiment"),
        (["faster", "TP=2"], "which experiment"),
        (["gpus"], "which experiment"),
        (["gpus", "101", "MBS=x"], "expected a whole number"),
        (["speed", "620", "ARGS=--fp16"], "no formula covers --fp16"),
        (["speed", "111", "FP8=yes"], "FP8=yes; valid: delayed, tensorwise, blockwise, mxfp8, 0"),
        (["speed", "101", "CARD=v100-16gb"], "V100-SXM2-16GB has no bf16"),
        (["speed", "101", "TP=7"], "must be divisible by TP (7)"),
        (["speed", "101", "ARGS=--manual-gc"], "no formula covers --manual-gc"),
    ],
)
def test_bad_input(words, complaint, capsys):
    assert main(words) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_of_constants_that_makes_no_sense(tmp_path):
    path = tmp_path / "calibrations.yaml"
    path.write_text(
        "mine: {gpu: h100-80gb, measured_by: records, switch_reduces: true, constants: {exposed: -1}}"
    )
    with pytest.raises(UserError, match=r"constants.exposed = -1"):
        calibrations.load(path)
    path.write_text(
        "mine: {gpu: h100-80gb, measured_by: records, switch_reduces: true, constants: {hosts: 1}}"
    )
    with pytest.raises(UserError, match=r"host"):
        calibrations.load(path)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("{gpu: h111, measured_by: records, switch_reduces: true}", "'h111': unknown GPU"),
        ("{gpu: v100-16gb, measured_by: records, switch_reduces: true}", "has no bf16"),
        (
            "{gpu: h200-141gb, measured_by: records, switch_reduces: true, like: theirs}",
            "no earlier entry has this name",
        ),
        (
            "{gpu: h200-141gb, measured_by: records, switch_reduces: true, like: mine}",
            "no earlier entry has this name",
        ),
        (
            "{gpu: h200-141gb, measured_by: records, switch_reduces: true, rows: {'101': {measured_ms: 0, predicted_ms: 1, left_out_ms: 1}}}",
            "greater than 0",
        ),
        ("3", "mine: expected key: value pairs, found 3"),
    ],
)
def test_an_entry_that_makes_no_sense(tmp_path, entry, complaint):
    path = tmp_path / "calibrations.yaml"
    path.write_text(
        f"first: {{gpu: h100-80gb, measured_by: records, switch_reduces: true}}\nmine: {entry}\n"
        "theirs: {gpu: h100-80gb, measured_by: records, switch_reduces: true}\n"
    )
    with pytest.raises(UserError, match=complaint):
        calibrations.load(path)


def test_of_two_entries_for_a_card_the_last_that_was_fitted_counts(monkeypatch):
    mine = PUBLISHED.model_copy(update={"measured_by": "records"})
    monkeypatch.setattr(
        calibrations, "load", lambda: MACHINES | {"mine": mine.model_copy(update={"rows": {}})}
    )
    assert calibrations.machine_of(PUBLISHED.card) is PUBLISHED
    monkeypatch.setattr(calibrations, "load", lambda: MACHINES | {"mine": mine})
    assert calibrations.machine_of(PUBLISHED.card) is mine


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (
            "{gpu: a100-80gb, measured_by: records, switch_reduces: true}",
            "records has no step on NVIDIA A100-SXM4-80GB",
        ),
        (
            "{gpu: a100-80gb, measured_by: h100-tutorial, switch_reduces: true}",
            "h100-tutorial has no step on NVIDIA A100-SXM4-80GB",
        ),
        (
            "{gpu: h100-80gb, measured_by: h100-tutorials, switch_reduces: true}",
            "no references called h100-tutorials",
        ),
    ],
)
def test_a_machine_without_steps_is_refused_before_anything_is_fitted(
    tmp_path, entry, complaint, monkeypatch
):
    monkeypatch.setattr(calibrate, "fit_machine", None)
    monkeypatch.setattr(calibrate, "find_spec", lambda _: True)
    path = tmp_path / "calibrations.yaml"
    path.write_text(before := f"mine: {entry}\n")
    with pytest.raises(UserError, match=complaint):
        calibrate.calibrate(path)
    assert path.read_text() == before


def test_without_scipy_nothing_is_fitted(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "find_spec", lambda _: None)
    assert main(["calibrate"]) == 2
    assert "SciPy is not installed" in capsys.readouterr().err


def here(tmp_path, **changed):
    """A machine file of this machine: the committed one of two H200s, with changes."""
    path = sorted((rates.FOLDER / "h200-141gb").glob("*.json"))[0]
    file = machine_file.read(path).model_copy(update=changed)
    machine_file.write(tmp_path / machine_file.NAME, file)
    return file, {gpu.uuid for gpu in file.gpus}


def test_the_machine_file_of_this_machine_sets_the_rates(tmp_path):
    card = find_card("h200-141gb")
    usual, line = calibrations.machine_here(card, tmp_path, ())
    assert usual.here is None and line.endswith("make preflight measures this machine")
    file, uuids = here(tmp_path)
    slow = file.launch.model_copy(update={"operation_us": 3 * file.launch.operation_us})
    layers = [
        rate.model_copy(
            update={"forward_ms": 3 * rate.forward_ms, "backward_ms": 3 * rate.backward_ms}
        )
        for rate in file.layers
    ]
    here(tmp_path, launch=slow, layers=tuple(layers))
    machine, line = calibrations.machine_here(card, tmp_path, uuids)
    assert line.startswith(f"rates: {tmp_path}/machine.json, measured on {file.host} at 2026-11-30")
    launch_bound, bound_by_gpu = find("101"), find("300")
    assert machine.predict(launch_bound).total > 2 * usual.predict(launch_bound).total
    ratio = machine.predict(bound_by_gpu).products / usual.predict(bound_by_gpu).products
    assert ratio == pytest.approx(1, rel=0.05)


def test_a_quick_machine_file_scales_the_cards_layers_by_its_launch_rate(tmp_path):
    card = find_card("h200-141gb")
    file, uuids = here(tmp_path, quick=True, layers=(), attention=(), linears=(), collectives=())
    fast = file.launch.model_copy(update={"operation_us": file.launch.operation_us / 2})
    here(tmp_path, quick=True, launch=fast, layers=(), attention=(), linears=(), collectives=())
    machine, line = calibrations.machine_here(card, tmp_path, uuids)
    usual = machine.model_copy(update={"here": None})
    assert "QUICK=1 leaves out" in line
    assert machine.predict(find("101")).total < 0.7 * usual.predict(find("101")).total
    assert machine.predict(find("101")).attention == usual.predict(find("101")).attention


@pytest.mark.parametrize(
    ("card", "uuids", "changed", "said"),
    [
        (
            "h200-141gb",
            {"GPU-other"},
            {},
            "was measured on another machine (vm, 2026-11-30): not used",
        ),
        ("h100-80gb", set(), {}, "was measured on NVIDIA H200: not used"),
        ("h200-141gb", set(), {"device": "cpu"}, "was measured on a CPU: not used"),
    ],
    ids=["another machine", "another card", "a CPU"],
)
def test_a_machine_file_of_another_machine_is_named_and_not_used(
    tmp_path, card, uuids, changed, said
):
    here(tmp_path, **changed)
    machine, line = calibrations.machine_here(find_card(card), tmp_path, uuids)
    assert machine.here is None and said in line


def test_a_half_written_machine_file_is_refused(tmp_path, capsys):
    here(tmp_path)
    path = tmp_path / machine_file.NAME
    path.write_text(path.read_text()[:500])
    assert main(["speed", "101", f"OUTDIR={tmp_path}"]) == 2
    assert "machine.json is no complete machine file" in capsys.readouterr().err


def test_attention_is_interpolated_between_what_was_measured():
    found = rates.of_card("h200-141gb")
    at = {score.length: score for score in found.scores if score.head_size == 64 and score.dropout}
    assert found.attention_ps(64, 4096, True) == pytest.approx(
        (at[4096].forward_ps, at[4096].backward_ps)
    )
    forward, backward = found.attention_ps(96, 2048, True)
    low, high = found.attention_ps(64, 2048, True), found.attention_ps(128, 2048, True)
    assert (forward, backward) == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2))
    assert found.attention_ps(64, 4096, False)[0] < 0.5 * at[4096].forward_ps


def test_rates_of_a_card_without_machine_files_are_scaled_by_the_data_sheets():
    h200, h100 = find_card("h200-141gb"), find_card("h100-80gb")
    measured, scaled = rates.of_card("h200-141gb"), rates.of_card_like(h200, h100)
    assert scaled.product_tflops == pytest.approx(measured.product_tflops)
    assert scaled.memory_gb_s / measured.memory_gb_s == pytest.approx(
        h100.memory_gb_per_s / h200.memory_gb_per_s
    )
    with pytest.raises(UserError, match="make preflight writes one"):
        rates.of_card("a100-80gb")


def test_hooks_of_the_distributed_optimizer_work_once_a_step_those_of_fsdp_every_micro_batch():
    """Doubling the micro-batches doubles what FSDP's launch, not what the optimizer's do."""

    def hooks(settings):
        layer_work = step_time.StepWork(find("124", settings), PUBLISHED.speed())
        forward, backward = layer_work.hooks()
        return (forward.launches + backward.launches) * layer_work.experiment.num_microbatches

    assert hooks("MBS=8") == pytest.approx(hooks("MBS=16"))
    sharded = "SHARDING=fsdp_optim_grads_params"
    assert hooks(f"MBS=8 {sharded}") == pytest.approx(2 * hooks(f"MBS=16 {sharded}"))
    assert hooks("SHARDING=no_shard") == 0


def test_a_damaged_machine_file_holds_up_no_run(tmp_path):
    here(tmp_path)
    (tmp_path / machine_file.NAME).write_text("{")
    said = calibrations.summary(find("101"), find_card("h200-141gb"), tmp_path, ())
    assert said.startswith("step time not predicted: ") and "no complete machine file" in said


def test_a_copy_of_a_machine_has_nothing_derived_from_the_fields_before():
    machine = MACHINES["h200"]
    before = machine.predict(find("101")).total, machine.bands
    slow = machine.constants.model_copy(update={"host": 2 * machine.constants.host})
    changed = machine.model_copy(update={"constants": slow, "rows": {"101": machine.rows["101"]}})
    assert changed.predict(find("101")).total > 1.5 * before[0] and changed.bands != before[1]
