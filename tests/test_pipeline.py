"""Which layers a pipeline stage holds: as upstream splits them, in memory, in step time, and in a miniature."""

import random
from itertools import product
from types import SimpleNamespace

import pytest

from harness.errors import UserError
from harness.experiment import command_line, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.pipeline import (
    chunk_layers,
    fullest_stage,
    is_even,
    layer_ranges,
    predictor_chunk,
    stage_layers,
)
from harness.experiment.unlisted import experiment_from
from harness.planning.miniature import miniature
from harness.predict import calibrations, stages, timeline
from harness.predict.flops import parameters_on
from harness.predict.memory import predict
from harness.predict.replay import layers_in_flight, replay
from harness.upstreams.megatron_lm.flags import megatron_flags

CATALOG = load_catalog()
MACHINE = calibrations.load()["h100-tutorial"]
LAYOUT = "Et*7|(t*10|)*6t*5L"


def find(id_, *settings):
    return overrides.apply(CATALOG.find(id_), command_line.parse(settings))


def complaint(id_, *settings):
    with pytest.raises(UserError) as error:
        find(id_, *settings)
    return str(error.value)


def test_layers_follow_upstreams_order_of_chunks():
    """[0, 1] [4, 5] on the first of two stages, as the comment in get_num_layers_to_build says."""
    layers = layer_ranges(find("438", "PP=2", "VPP=2", "ARGS=--num-layers 8"))
    assert layers == ((range(2), range(4, 6)), (range(2, 4), range(6, 8)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (9,) * 8),
        (("FIRST_STAGE_LAYERS=2",), (2, *(10,) * 7)),
        (("LAST_STAGE_LAYERS=9",), (9,) * 8),
        (("FIRST_STAGE_LAYERS=6", "LAST_STAGE_LAYERS=12"), (6, *(9,) * 6, 12)),
        (("EMBEDDING_AS_LAYER=1", "ARGS=--num-layers 71"), (8, *(9,) * 7)),
        (("LOSS_AS_LAYER=1", "ARGS=--num-layers 71"), (*(9,) * 7, 8)),
        (("EMBEDDING_AS_LAYER=1", "LOSS_AS_LAYER=1", "ARGS=--num-layers 126"), (15, *(16,) * 6, 15)),
        ((f"PP_LAYOUT={LAYOUT}",), (7, *(10,) * 6, 5)),
        (("PP_LAYOUT=E|(t*12|)*6L",), (0, *(12,) * 6, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_layers_of_a_stage(settings, expected):
    e = find("408", *settings)
    assert stage_layers(e) == expected and sum(expected) == e.model.num_layers
    assert is_even(e) == (len(set(expected)) == 1)
    assert fullest_stage(e) == expected.index(max(expected))


def test_126_layers_over_64_virtual_stages():
    sizes = {"PP": "8", "VPP": "8", "EMBEDDING_AS_LAYER": "1", "LOSS_AS_LAYER": "1", "GBS": "64"}
    e = experiment_from("llama3.1-405b", sizes)
    chunks = chunk_layers(e)
    assert chunks[0] == (1, *(2,) * 7) and chunks[-1] == (*(2,) * 7, 1)
    assert set(chunks[1:-1]) == {(2,) * 8}


def test_a_layout_says_how_many_virtual_stages_there_are():
    e = find("404", "PP=4", "PP_LAYOUT=Et*8|(t*9|)*6t*10L")
    assert e.vpp == 2 and stage_layers(e) == (17, 18, 18, 19)
    flags = [word for group in megatron_flags(e, "cpu") for word in group]
    assert flags[flags.index("--pipeline-model-parallel-layout") + 1] == e.pp_layout
    assert "--num-virtual-stages-per-pipeline-rank" not in flags
    assert (
        find("438", "PP=1").vpp == 1
        and not find("408", f"PP_LAYOUT={LAYOUT}", "PP_LAYOUT=0").pp_layout
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["408", "FIRST_STAGE_LAYERS=5"], "layers of the other stages (67) must be divisible by PP x VPP (7 x 1 = 7)"),
        (["408", "FIRST_STAGE_LAYERS=72"], "(72) leave 0 for 7 other stages"),
        (["438", "FIRST_STAGE_LAYERS=10", "ARGS=--num-layers 73"], "FIRST_STAGE_LAYERS (10) must be divisible by VPP (3)"),
        (["438", "ARGS=--num-layers 46"], "no PP fits, or EMBEDDING_AS_LAYER=1 LOSS_AS_LAYER=1"),
        (["408", "ARGS=--num-layers 47"], ", or LOSS_AS_LAYER=1"),
        (["408", "LOSS_AS_LAYER=1"], "layers + loss (73) must be divisible by"),
        (["408", "PP=1", "LOSS_AS_LAYER=1"], "but PP=1; set PP > 1"),
        (["408", "FIRST_STAGE_LAYERS=2", "LOSS_AS_LAYER=1"], "FIRST_STAGE_LAYERS and LOSS_AS_LAYER contradict each other"),
        (["408", f"PP_LAYOUT={LAYOUT}", "LAST_STAGE_LAYERS=5"], "contradict each other"),
        (["408", "PP_LAYOUT=Et|tL"], "has 2 stages, PP x VPP are 8 x 1 = 8"),
        (["408", "PP_LAYOUT=E(t|)*7L"], "has 7 layers, the model 72"),
        (["408", "PP_LAYOUT=E(t|)*7x"], "'x' is none of E (embedding)"),
        (["408", "PP_LAYOUT=t|(t|)*6tL"], "E must come first"),
        (["408", "PP_LAYOUT=E(t*99999|)*7L"], "'*' is none of E"),
        (["408", "PP_LAYOUT=E(t*12|)*6|mL"], "1 m, layers of multi-token prediction, in 1 stages; the model has 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_stages(words, expected):
    assert expected in complaint(*words)


@pytest.mark.cpu
def test_stages_hold_what_upstream_builds():
    """Every split that upstream accepts of some, and no other."""
    block = pytest.importorskip("megatron.core.transformer.transformer_block")
    from megatron.core.transformer import transformer_layer

    found = 0
    for layers, pp, vpp, first, last, embedding, loss in product(
        (14, 16, 20), (2, 4), (1, 2), (None, 2, 4), (None, 2, 6), (False, True), (False, True)
    ):
        settings = {"FIRST_STAGE_LAYERS": first or 0, "LAST_STAGE_LAYERS": last or 0}
        settings |= {"EMBEDDING_AS_LAYER": int(embedding), "LOSS_AS_LAYER": int(loss)}
        sizes = {"PP": pp, "VPP": vpp, "ARGS": f"--num-layers {layers}"}
        ours = overrides.admitted(CATALOG.find("438"), sizes | settings)
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_layout=None,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
        )
        chunks = [(s, c) for s in range(pp) for c in range(vpp)]
        try:
            built = [
                block.get_num_layers_to_build(config, c if vpp > 1 else None, s) for s, c in chunks
            ]
        except AssertionError:
            built = []
        if sum(built) != layers:
            # the last check is TransformerConfig's, of the layers that remain for no stage
            assert ours is None, (sizes, settings, built)
            continue
        assert [chunk_layers(ours)[s][c] for s, c in chunks] == built, (sizes, settings)
        offsets = [
            transformer_layer.get_transformer_layer_offset(config, c if vpp > 1 else None, s)
            for s, c in chunks
        ]
        held = [layer_ranges(ours)[s][c] for s, c in chunks]
        assert [span.start for span in held if span] == [
            offset for offset, span in zip(offsets, held, strict=True) if span
        ]
        found += 1
    assert found > 30


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("layout", "pp"),
    [("Ettt|(tt|)*6tL", 4), ("E|(t,t|t*3|)*3L", 8), ("Et*5|t|t|t*2|t|L", 3), ("E(t|t)*3|L", 5)],
)
def test_a_layout_is_read_as_upstream_reads_it(layout, pp):
    upstream = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    from megatron.core.transformer.enums import LayerType

    theirs = upstream.PipelineParallelLayerLayout(layout, pp)
    layers = theirs.flatten_layout.count(LayerType.decoder)
    theirs.validate_layer_layout(layers, None)
    e = find(
        "408", f"PP={pp}", f"PP_LAYOUT={layout}", f"ARGS=--num-layers {layers}", "GBS=480", "MBS=1"
    )
    assert chunk_layers(e) == tuple(
        tuple(chunk.count(LayerType.decoder) for chunk in stage) for stage in theirs.layout
    )


def deepseek(layout, pp, vpp):
    sizes = {"PP": pp, "VPP": vpp, "EP": "64", "DP": "64", "GBS": "1024", "PP_LAYOUT": layout}
    return experiment_from("deepseek-v3", sizes)


def test_multi_token_prediction_before_the_last_stage():
    """61 layers and one of multi-token prediction, as DeepSeek-V3 is often split: its stage has the word embedding, too."""
    e, together = deepseek("Et*3|(tt|)*29m|L", "16", "2"), deepseek("Et*3|(tt|)*29mL", "31", "1")
    assert predictor_chunk(e) == (14, 1) and stage_layers(e) == (5, *(4,) * 13, 2, 2)
    assert [layers.dense for layers in stages.chunks(e, 0)] == [3, 0]
    assert [layers.predictors for layers in stages.chunks(e, 14)] == [0, 1]
    assert parameters_on(e, 14).ends == parameters_on(e, 0).ends
    assert parameters_on(e, 15).ends + parameters_on(e, 14).ends == parameters_on(together, 30).ends
    with pytest.raises(UserError, match="only in the last virtual stage of a rank"):
        deepseek("Et*3|(tt|)*14t*30|m|(|)*14L", "16", "2")


def test_a_stage_holds_the_parameters_of_its_layers():
    even, uneven = find("408"), find("408", "FIRST_STAGE_LAYERS=2")
    layer = (parameters_on(even, 3).dense) / 9
    held = [parameters_on(uneven, stage).dense for stage in range(8)]
    assert held[1] == 10 * layer and held[0] == parameters_on(even, 0).dense - 7 * layer
    assert sum(held) == sum(parameters_on(even, stage).dense for stage in range(8))


def test_the_first_stage_keeps_most_micro_batches_so_fewer_layers_there_save_memory():
    even, lighter = find("416"), find("416", "FIRST_STAGE_LAYERS=2")
    first, second = stages.Layers(9), stages.Layers(10)
    assert layers_in_flight(even, 0) == (first,) * 8
    assert layers_in_flight(lighter, 0) == (stages.Layers(2),) * 8
    assert layers_in_flight(lighter, 1) == (second,) * 7
    ratio = (predict(lighter).attention + predict(lighter).mlp) / (
        predict(even).attention + predict(even).mlp
    )
    assert ratio == pytest.approx(10 * 7 / (9 * 8)), "the second stage is the fullest"
    assert replay(lighter, 0).allocated < replay(lighter, 1).allocated


def test_a_heavy_last_stage_is_the_fullest():
    e = find("416", "LAST_STAGE_LAYERS=65", "RECOMPUTE=full")
    # 65 layers' states on the last stage, one on each other
    assert predict(e).weights == pytest.approx(2 * parameters_on(e, 7).dense / 2**30)


def test_chunks_of_uneven_sizes_in_flight():
    """By hand, two stages of two chunks, four micro-batches: forward 0a 1a 0b 1b, then alternately."""
    orders = [f"{p.kind[0]}{p.chunk}" for p in timeline.order(0, 2, 4, 2)]
    assert orders[:8] == ["f0", "f0", "f1", "f1", "f0", "b1", "f0", "b1"]
    assert timeline.most_in_flight(0, 2, 4, (1, 5)) == (0, 0, 1, 1, 0)
    assert timeline.most_in_flight(0, 2, 4, (5, 1)) == (0, 0, 1, 0, 0), "once chunk 1 has gone back"
    for stage, micro_batches in product((0, 3), (8, 64)):
        alike = timeline.most_in_flight(stage, 4, micro_batches, (3, 3))
        assert len(alike) == timeline.warm_up_passes(stage, 4, 2) + 1


def test_the_heaviest_stage_sets_the_pace():
    even, uneven = find("408"), find("408", "FIRST_STAGE_LAYERS=2", "GBS=4096")
    times = MACHINE.stage_times(uneven)
    slower = times.forward[1] / MACHINE.stage_times(even).forward[1]
    assert 1.05 < slower < 10 / 9, "but for the message between stages"
    assert times.forward[1] > 2 * times.forward[0]
    step = MACHINE.predict(uneven)
    each = max(f + b for f, b in zip(times.forward, times.backward, strict=True))
    busy = step.products + step.attention + step.passes + step.exchange + step.launches
    assert busy == pytest.approx(each * uneven.num_microbatches)


def test_a_chunk_without_layers_takes_next_to_no_time():
    e = find("404", "PP=4", "PP_LAYOUT=Et*10|(t*10|)*6t*2L")
    times = MACHINE.stage_times(e)
    assert [sum(shares) for shares in times.shares] == pytest.approx([1] * 4)
    assert times.shares[1] == (0.5, 0.5) and 0.15 < times.shares[3][1] < 0.45
    spans = timeline.simulate(8, times, 2).of_stage(3)
    taken = {
        span.work.chunk: span.end - span.start for span in spans if span.work.kind == "forward"
    }
    assert taken[1] / taken[0] == pytest.approx(times.shares[3][1] / times.shares[3][0])
    assert find("438").vpp == 3 and MACHINE.stage_times(find("438")).shares is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["408", "FIRST_STAGE_LAYERS=2"], (1, *(2,) * 7)),
        (["416", "FIRST_STAGE_LAYERS=6", "LAST_STAGE_LAYERS=12"], (1, *(2,) * 7)),
        (["408", f"PP_LAYOUT={LAYOUT}"], (2, *(2,) * 6, 1)),
        (["408", "PP_LAYOUT=Et*12|(t*12|)*5|L"], (*(1,) * 6, 0, 0)),
        (["408", "PP=16", "PP_LAYOUT=E|(t*5|)*14t*2L"], (0, *(2,) * 6, 1)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_miniature_is_uneven_in_the_same_way(words, expected):
    small = miniature(find(*words))
    assert stage_layers(small) == expected and small.pp == 8


def test_a_miniature_of_126_layers_over_64_virtual_stages():
    sizes = {"PP": "8", "VPP": "8", "EMBEDDING_AS_LAYER": "1", "LOSS_AS_LAYER": "1", "GBS": "64"}
    assert stage_layers(miniature(experiment_from("llama3.1-405b", sizes))) == (15, *(16,) * 6, 15)


def test_a_long_step_takes_what_its_simulation_takes():
    """Stages, micro-batches and times at random: groups that are alike are not simulated."""
    chance = random.Random(17)
    for _ in range(60):
        pp, vpp = chance.choice([2, 3, 4, 8]), chance.choice([1, 1, 2, 5])
        micro_batches = pp * chance.randint(1, 60) + (chance.randrange(pp) if vpp == 1 else 0)
        forward, backward = (tuple(chance.choice([1, 1, 1.1, 2]) for _ in range(pp)) for _ in "fb")
        shares = None
        if chance.random() < 0.5:
            parts = [[chance.randint(1, 3) for _ in range(vpp)] for _ in range(pp)]
            shares = tuple(tuple(one / sum(own) for one in own) for own in parts)
        times = timeline.Times(forward, backward, shares)
        simulated = timeline.simulate(micro_batches, times, vpp).end
        assert timeline.duration(micro_batches, times, vpp) == pytest.approx(simulated, rel=1e-9)


def test_a_step_of_many_micro_batches_is_not_simulated_whole(monkeypatch):
    planned, plan = [], timeline._plan
    monkeypatch.setattr(timeline, "_plan", lambda *sizes: planned.append(sizes) or plan(*sizes))
    timeline.duration(1024, timeline.Times.alike(4), 2)
    assert planned == [(4, 4 * timeline.FILLING, 2)]
    with pytest.raises(UserError, match=r"micro-batches \(1022\)"):
        timeline.duration(1022, timeline.Times.alike(4), 2)
