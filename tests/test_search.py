"""Which layouts are legal, fit and are fastest: the search against the rules and predictions of one experiment at a time."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from harness.experiment import command_line, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import divisors, violations
from harness.experiment.experiment import SHARDING
from harness.experiment.hardware import find_card
from harness.predict import calibrations
from harness.predict.capacity import cannot_fit, surely_fits, verdict
from harness.predict.memory import predict
from harness.predict.step_time import unknown
from harness.search import layouts
from harness.search.estimates import sizes, steps_ms
from harness.search.layouts import SLACK, Search, best, by_gpus, faster
from harness.search.space import CP_COMM_TYPES, LEVERS
from harness.search.table import Column, Table

CATALOG = load_catalog()
MACHINES = calibrations.load()
PUBLISHED = MACHINES["h100-tutorial"]
PLAIN = dict.fromkeys(LEVERS, False)


def find(id_, settings=""):
    return overrides.apply(CATALOG.find(id_), command_line.parse(settings.split()))


def every(e, ranks, **fixed):
    """All legal layouts, one by one."""
    search = Search(e, ranks, None, None, fixed)
    table = search.table()
    return [search.laid_out(table, row) for row in range(len(table))]


def fields(e):
    names = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "sequence_parallel", "cp_comm_type", "micro_batch_size", "sharding", "recompute", "recompute_modules", "cross_entropy_fusion", "cuda_graphs", "embedding_as_layer", "loss_as_layer")  # fmt: skip
    return tuple(getattr(e, name) for name in names)


def admitted_one_by_one(e, ranks):
    """What constraints admit of every combination of fields."""
    model = e.model
    of_ranks, modules = divisors(ranks), e.recompute_modules
    axes = [sizes for sizes in itertools.product(of_ranks, repeat=4) if math.prod(sizes) == ranks]
    choices = {
        "axes": axes, "sequence_parallel": [False, True], "cp_comm_type": CP_COMM_TYPES,
        "vpp": {vpp for more in range(3) for vpp in divisors(model.num_layers + more)},
        "counted": [(False, False), (True, True), (False, True)], "micro_batch_size": divisors(e.global_batch_size),
        "ep": divisors(model.num_experts or 1), "etp": of_ranks, "sharding": SHARDING,
        "recompute": ["none", "selective", "full"], "cuda_graphs": {e.cuda_graphs, True},
    }  # fmt: skip
    for values in itertools.product(*choices.values()):
        changed = dict(zip(choices, values, strict=True))
        changed |= dict(zip(("tp", "pp", "cp", "dp"), changed.pop("axes"), strict=True))
        changed["embedding_as_layer"], changed["loss_as_layer"] = changed.pop("counted")
        changed["recompute_modules"] = modules if changed["recompute"] == "selective" else ()
        layout = e.model_copy(update=changed)
        if next(violations(layout), None) is None:
            yield layout


@pytest.mark.parametrize(
    ("id_", "settings", "ranks"),
    [
        ("101", "GBS=2", 2),
        ("358h", "GBS=1 MBS=1", 4),
        ("130", "GBS=3 MBS=1 DP=1", 3),
        ("502h", "GBS=2 MBS=1 DP=1 EP=1", 2),
        pytest.param("620", "GBS=2 DP=1 EP=1", 2, marks=pytest.mark.full),
        ("612", "GBS=1 DP=1 SEQ=32", 2),
    ],
)
def test_legal_are_the_layouts_that_constraints_admit(id_, settings, ranks):
    e = find(id_, settings)
    single = "no_shard" if e.fully_sharded else e.sharding
    one_by_one = {
        fields(layout)
        for layout in admitted_one_by_one(e, ranks)
        if (layout.cp > 1 or layout.cp_comm_type == e.cp_comm_type)
        and layout.cp_comm_type != "a2a+p2p"  # all within a node
        and (layout.dp * layout.cp > 1 or layout.sharding == single)
        and (not layout.loss_as_layer or layout.model.num_layers % layout.pp)
    }
    found = every(e, ranks, cross_entropy_fusion=e.cross_entropy_fusion)
    assert None not in found
    assert len({*map(fields, found)}) == len(found)
    assert {*map(fields, found)} == one_by_one and len(found) > 3


def sample(search, table, number=150):
    """Some layouts of ``table``, with their places."""
    rows = np.random.default_rng(0).choice(len(table), min(number, len(table)), replace=False)
    return [(row, search.laid_out(table, row)) for row in rows]


ROWS = ["101", "124", "408", "443", "308", "512", "641", "703", "613"]


def search_for(id_):
    e = find(id_)
    machine = MACHINES["h200"] if id_ in ("641", "613") else PUBLISHED
    return Search(e, e.world_size, machine.card, machine)


@pytest.mark.parametrize("id_", ROWS)
def test_memory_is_that_of_the_prediction(id_):
    search = search_for(id_)
    table = search.table()
    gib, context = sizes(table)
    context = np.broadcast_to(context, len(table))
    for row, layout in sample(search, table):
        memory = predict(layout)
        if not layout.cuda_graphs:  # by what they hide, another stage may count as the fullest
            assert gib[row] == pytest.approx(memory.all_tensors, rel=1e-9)
        assert context[row] == pytest.approx(memory.context)
        assert not cannot_fit(memory, search.card)


@pytest.mark.parametrize("id_", ROWS)
def test_step_times_are_those_of_the_prediction_but_for_the_bubble(id_):
    search = search_for(id_)
    table, machine = search.table(), search.machine
    table = table.take(~table.true(lambda one: bool(unknown(one))))
    found = steps_ms(table, machine.speed())
    for row, layout in sample(search, table):
        error = 1e-9 if layout.pp == 1 else SLACK
        assert found[row] == pytest.approx(machine.predict(layout).total, rel=error), layout.layout


@pytest.mark.parametrize(
    ("id_", "settings", "ranks"),
    [("101", "GBS=4", 4), ("124", "", 4), ("308h", "", 4), ("502h", "GBS=16", 4), ("408", "GBS=8 PP=4 MBS=1", 4)],
)  # fmt: skip
def test_the_best_is_that_of_an_exhaustive_search(id_, settings, ranks):
    e = find(id_, settings)
    search = Search(e, ranks, PUBLISHED.card, PUBLISHED, PLAIN)
    found = []
    for layout in every(e, ranks, **PLAIN):
        if not unknown(layout):
            step, error = PUBLISHED.predict(layout), PUBLISHED.error(layout)
            found.append(layouts.Layout(layout, predict(layout), step, error))
    found.sort(key=layouts._preference)
    first = next(layout for layout in found if surely_fits(layout.memory, search.card))
    assert layouts._preference(next(best(search))) == layouts._preference(first)
    # levers may only bring more
    assert next(best(replace(search, fixed={}))).slowest_ms <= first.slowest_ms


def test_a_formula_is_asked_once_for_each_combination_of_what_it_reads():
    asked = []

    def rows_of(one):
        asked.append((one.tp, one.pp))
        return one.micro_batch_size * 100 + one.tp if one.pp > 1 else one.tp, one.world_size

    codes = np.arange(1000)
    table = Table(
        find("101"),
        {
            "tp": Column(codes % 4, [1, 2, 4, 8]),
            "pp": Column(codes // 4 % 2, [1, 2]),
            "micro_batch_size": Column(codes // 8 % 5, [1, 2, 4, 8, 16]),
            "vpp": Column(codes // 40, list(range(25))),
        },
    )
    said, ranks = table.each(rows_of)
    tp, pp, mbs = (table.array(name) for name in ("tp", "pp", "micro_batch_size"))
    assert (said == np.where(pp > 1, mbs * 100 + tp, tp)).all()
    assert (ranks == tp * pp).all() and len(asked) <= 40 + 3, "25 values of vpp make no difference"
    together = table.together(lambda rows: rows.each("both", rows_of)[0] + rows.pp)
    assert (together == said + pp).all()


def test_levers_are_kept_where_each_brings_a_hundredth():
    codes = np.arange(8)
    columns = {
        "vpp": Column(codes // 4, [1, 2]),
        "cross_entropy_fusion": Column(codes // 2 % 2, [False, True]),
        "cuda_graphs": Column(codes % 2, [False, True]),
    }
    table = Table(find("101"), columns)
    slowest = np.array([100, 98, 99.5, 90, 100, 99.5, 98, 97.5])
    # of the first four: fused alone brings too little, graphs enough; of the others: fused only
    assert np.flatnonzero(layouts._levers_bring(table, slowest)).tolist() == [0, 1, 4, 6]
    assert np.flatnonzero(layouts._levers_bring(table.take([1, 3]), slowest[[1, 3]])).tolist() == [
        0,
        1,
    ]


def test_an_unsure_layout_comes_after_a_sure_one_that_is_nearly_as_fast():
    step = PUBLISHED.predict(find("111"))
    sure, unsure, slow = (
        layouts.Layout(find("111"), predict(find("111")), replace(step, products=products), error)
        for products, error in ((200, 0.05), (190, 0.3), (400, 0.05))
    )
    assert sorted([slow, unsure, sure], key=layouts._preference) == [sure, unsure, slow]
    assert unsure.ties_with(sure) and not slow.ties_with(sure)


@pytest.mark.parametrize("id_", ["420", "408", "512", "282", "244", "300"])
def test_faster_layouts_do_the_same_work_on_as_many_gpus(id_):
    e = find(id_)
    now, found = PUBLISHED.predict(e).total, faster(e, PUBLISHED)
    ends = [round(layout.slowest_ms, 1) for layout in found]
    assert ends == sorted(ends)
    for layout in found[:12]:
        made = find(id_, layout.settings)
        assert made.model_copy(update={"overrides": {}}) == layout.experiment.model_copy(
            update={"overrides": {}}
        )
        assert (made.world_size, made.global_batch_size, made.seq_length) == (
            e.world_size,
            e.global_batch_size,
            e.seq_length,
        )
        assert (
            verdict(predict(made), PUBLISHED.card) == "fits" and PUBLISHED.predict(made).total < now
        )


@pytest.mark.parametrize("id_", ["301", "642"])
def test_what_may_not_fit_gets_every_layout_that_fits(id_):
    e = find(id_)
    assert verdict(predict(e), PUBLISHED.card) != "fits"
    found = faster(e, PUBLISHED)
    assert all(verdict(predict(layout.experiment), PUBLISHED.card) == "fits" for layout in found)
    assert any(layout.step.total > PUBLISHED.predict(e).total for layout in found)


def test_recomputation_of_the_catalogue_is_tried_before_everything_is_recomputed():
    found = [layout.experiment.recompute for layout in faster(find("642"), MACHINES["h200"])]
    assert {"none", "selective"} <= set(found)


def test_layouts_keep_what_was_asked_for():
    e = find("408", "GPUS=4 PP=2 GBS=16 SEQ=2048")
    found = list(every(e, e.world_size))
    assert all(
        (way.world_size, way.global_batch_size, way.seq_length) == (4, 16, 2048) for way in found
    )
    axes = {(way.tp, way.pp, way.cp, way.dp) for way in found}
    assert {
        (4, 1, 1, 1),
        (1, 4, 1, 1),
        (1, 1, 4, 1),
        (1, 1, 1, 4),
        (2, 2, 1, 1),
        (2, 1, 1, 2),
    } <= axes
    assert all(math.prod(way) == 4 for way in axes)


def test_layouts_exchange_keys_and_values_in_every_way():
    """One sample cannot be dealt out to replicas; 308's ring over eight GPUs waits for launches, all-to-all less."""
    e = find("308", "GBS=1 MBS=1")
    ways = {way.cp_comm_type for way in every(e, 8) if way.cp == 8}
    assert ways == {"p2p", "all_gather", "a2a"}
    assert any("CP_COMM_TYPE=a2a" in layout.settings for layout in faster(e, PUBLISHED))


def test_on_one_gpu_levers_are_what_there_is():
    assert [layout.settings for layout in faster(find("101"), PUBLISHED)] == ["CUDA_GRAPHS=1"]
    assert faster(find("101", "CUDA_GRAPHS=1"), PUBLISHED) == []
    found = [layout.experiment for layout in faster(find("642"), MACHINES["h200"])]
    assert found and not any(e.cuda_graphs and e.recompute == "full" for e in found)


def test_a_lever_is_pulled_where_it_brings_a_hundredth():
    best = {id_: faster(find(id_), PUBLISHED) for id_ in ("124", "282h")}
    assert best["124"][0].settings.startswith("CROSS_ENTROPY_FUSION=1")
    assert all(layout.step.total < PUBLISHED.predict(find("124")).total for layout in best["124"])
    assert best["282h"] and not any(layout.experiment.cuda_graphs for layout in best["282h"])


@pytest.mark.parametrize("id_", ["124", "408"])
def test_the_best_layout_for_each_number_of_gpus(id_):
    e, fewest = find(id_), 0
    for gpus, found in by_gpus(e, PUBLISHED.card, PUBLISHED, 8):
        if found is None:
            assert not fewest
            continue
        fewest = fewest or gpus
        made = find(id_, found.settings)
        assert made.model_copy(update={"overrides": {}}) == found.experiment.model_copy(
            update={"overrides": {}}
        )
        assert (made.world_size, made.global_batch_size, made.seq_length) == (
            gpus,
            e.global_batch_size,
            e.seq_length,
        )
        assert verdict(predict(made), PUBLISHED.card) == "fits"
        assert found == next(best(Search(e, gpus, PUBLISHED.card, PUBLISHED)))
    assert fewest == {"124": 1, "408": 2}[id_]


def test_as_many_gpus_as_the_row_has_get_what_faster_finds_first():
    found = dict(by_gpus(find("408"), PUBLISHED.card, PUBLISHED, 8))
    first = faster(find("408"), PUBLISHED)[0]
    assert (found[8].experiment, found[8].step) == (first.experiment, first.step)
    assert found.keys() == {1, 2, 4, 8}


def test_what_a_node_does_not_hold_goes_to_several_by_memory_alone():
    card = find_card("a100-40gb")
    *none, (gpus, best) = by_gpus(find("641"), card, None)
    assert [ranks for ranks, layout in none if layout is None] == [1, 2, 4, 8]
    assert (
        gpus == 16
        and best.experiment.nodes == 2
        and best.step is None
        and verdict(best.memory, card) == "fits"
    )
    assert find("641", best.settings).nodes == 2


def test_without_a_speed_the_model_is_split_least():
    card, e = find_card("h200-141gb"), find("620")
    found = dict(by_gpus(e, card, None, 8))[8]
    sharding = found.experiment.sharding
    fitting = [
        layout
        for layout in every(e, 8, recompute="none", vpp=1, sharding=sharding, etp=1, **PLAIN)
        if verdict(predict(layout), card) == "fits"
    ]
    first = found.experiment
    assert found.step is None and first.recompute == "none"
    splits = (layout.tp * layout.pp * layout.cp * layout.ep for layout in fitting)
    assert first.tp * first.pp * first.cp * first.ep == min(splits)


def test_sharded_weights_stay_an_option_for_rows_that_have_them():
    ways = {way.sharding for way in every(find("703"), 4)}
    assert find("703").sharding in ways and {"no_shard", "optim"} < ways
    assert {way.sharding for way in every(find("703"), 1)} == {"no_shard"}
