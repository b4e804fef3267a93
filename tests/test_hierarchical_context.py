"""Hierarchical context parallelism (a2a+p2p): heads within a node, keys and values in a ring between nodes."""

import numpy as np
import pytest

from harness.cli import main
from harness.errors import UserError
from harness.experiment import command_line, overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.unlisted import experiment_from
from harness.planning.miniature import describe, miniature
from harness.predict import calibrations
from harness.predict.activations import attention_bytes
from harness.predict.context import COMMUNICATOR_GIB, context_gib
from harness.predict.formulas import attention_exchange_mib
from harness.predict.network import MESSAGE_S, Group, Groups, Network
from harness.predict.work import KERNEL_S, RING_SHARE, MicroBatchWork
from harness.search.layouts import Search, best
from harness.upstreams.megatron_lm.flags import megatron_flags

CATALOG = load_catalog()
MACHINE = calibrations.load()["h100-tutorial"]
SPEED = MACHINE.speed()
LINK, ADAPTER = 0.82 * 450e9, 0.82 * 50e9
BOTH = "CP_COMM_TYPE=a2a+p2p"


def long(settings):
    words = {"SEQ": "16384", "GBS": "16", **command_line.parse(settings.split())}
    return experiment_from("llama3-8b", words)


def row(id_, settings):
    return overrides.apply(CATALOG.find(id_), command_line.parse(settings.split()))


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ("GPUS=32 CP=32", (8, 4)),  # the ranks of a node
        ("GPUS=32 CP=16 TP=2", (4, 4)),  # of a node with TP=2
        ("GPUS=32 CP=8 TP=4", (2, 4)),  # 2 of the 8 key/value heads on a rank
        ("GPUS=8 CP=8", (4, 2)),  # fewer than all
        ("GPUS=24 CP=12 SEQ=24576", (4, 3)),  # 8 does not divide 12, nor 6 the heads
        ("GPUS=32 CP=32 CP_A2A=2", (2, 16)),
    ],
)
def test_the_first_level_is_as_large_as_node_heads_and_cp_admit(settings, levels):
    e = long(f"{settings} {BOTH}")
    assert e.cp_levels == levels and e.exchanges_heads


def test_one_level_is_what_the_others_have():
    ways = [row("308", f"CP_COMM_TYPE={how}").cp_levels for how in ("p2p", "all_gather", "a2a")]
    assert ways == [(1, 8), (1, 8), (8, 1)]
    assert row("101", BOTH).cp_levels == (1, 1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("CP_A2A=2", "308: CP_A2A=2 is about CP_COMM_TYPE=a2a+p2p, not p2p; leave it out"),
        (f"{BOTH} CP_A2A=8", "CP_A2A=8 must divide CP (8) and lie between 1 and CP; try CP_A2A in {2, 4}"),
        (f"{BOTH} CP_A2A=3", "CP_A2A=3 must divide CP (8)"),
        (f"{BOTH} CP_A2A=1", "CP_A2A=1 must divide CP (8) and lie between 1 and CP"),
        (f"{BOTH} CP=2", "a2a+p2p exchanges heads between 2 or more of CP=2 ranks, fewer than all"),
        (f"{BOTH} CP=32 GPUS=64 TP=2 CP_A2A=16", "a2a+p2p splits heads over CP_A2A: num_attention_heads (16) must be divisible by"
         " TP x CP_A2A (2 x 16 = 32); try CP_A2A in {2, 4, 8}, or CP_COMM_TYPE=p2p"),
    ],
)  # fmt: skip
def test_levels_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(UserError) as refused:
        row("308", settings)
    assert complaint in str(refused.value)


def test_key_value_heads_are_split_too():
    with pytest.raises(
        UserError,
        match=r"num_query_groups \(8\) must be divisible by TP x CP_A2A \(4 x 4 = 16\); try CP_A2A in \{2\}",
    ):
        long(f"GPUS=32 CP=8 TP=4 {BOTH} CP_A2A=4")


def test_upstream_is_told_both_sizes():
    def words(settings):
        return " ".join(word for group in megatron_flags(row("308", settings), "cuda") for word in group)  # fmt: skip

    assert "--hierarchical-context-parallel-sizes" not in words("CP_COMM_TYPE=a2a")
    for settings, sizes in ((BOTH, "4 2"), (f"{BOTH} CP_A2A=2", "2 4")):
        assert f"--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes {sizes} " in words(settings)  # fmt: skip
    assert "--hierarchical" not in " ".join(
        word for group in megatron_flags(row("101", BOTH), "cuda") for word in group
    )


def test_groups_are_those_that_upstream_makes(monkeypatch):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    pytest.importorskip("einops")
    made = []
    monkeypatch.setattr(parallel_state, "create_group", lambda ranks, **_: made.append(ranks) or ranks)  # fmt: skip
    e = long(f"GPUS=32 CP=16 TP=2 {BOTH}")
    ranks = parallel_state.RankGenerator(tp=2, ep=1, dp=1, pp=1, cp=16, order="tp-cp-ep-dp-pp")
    first, second = parallel_state.create_hierarchical_groups(
        0, ranks.get_ranks("cp")[0], list(e.cp_levels)
    )[0]
    groups = Groups(e)
    for made, group in ((first, groups.exchanging_heads), (second, groups.exchanging_keys)):
        assert made == [group.stride * place for place in range(group.ranks)]
    network = Network.of(MACHINE.card)
    assert not network.crosses_nodes(groups.exchanging_heads)
    assert network.crosses_nodes(groups.exchanging_keys)


def test_a_ring_waits_for_its_slowest_pair():
    """Of a ring over four nodes with four ranks each, one pair in four is in different nodes."""
    network, message = Network.of(MACHINE.card), 2**30
    assert network.send_s(message, Group(16, 2)) == pytest.approx(message / LINK)
    assert network.turn_s(message, Group(16, 2)) == pytest.approx(message / ADAPTER)
    assert network.turn_s(message, Group(4, 8)) == pytest.approx(message / ADAPTER)
    assert network.turn_s(message, Group(4, 2)) == pytest.approx(message / LINK)
    assert network.turn_s(message, Group(1, 2)) == 0


def test_heads_travel_within_the_node_and_keys_and_values_between_nodes():
    """Of 1,024 tokens, half of 4,096 query and 1,024 key and value elements; three turns of a ring over four nodes."""
    e = long(f"GPUS=32 CP=16 TP=2 {BOTH}")
    work = MicroBatchWork(e, SPEED)
    queries, keys, byte_s = 1024 * 4096 / 2, 1024 * 1024 / 2, work.bytes_per_s
    exchanged = 2 * (2 * queries + 2 * keys)
    heads_s = 3 / 4 * exchanged / LINK + 4 * MESSAGE_S
    for passed, attention, times, merged in zip(
        work.context_parallel(),
        work.attention(),
        (1, 2),
        (12 * queries, 6 * (queries + 2 * keys)),
        strict=True,
    ):
        turn_s = times * 2 * 2 * keys / ADAPTER
        exposed_s = turn_s - attention.attention / 4
        assert exposed_s > 0
        assert passed.exchange == pytest.approx(heads_s + 3 * exposed_s)
        assert passed.passes == pytest.approx(2 * exchanged / byte_s + 3 * (merged / byte_s + KERNEL_S))  # fmt: skip
        assert passed.launches == pytest.approx((2 + 4 * RING_SHARE) * work.context_launches_s)


def test_a_short_ring_between_nodes_sends_less_than_a_long_one():
    rings = [MACHINE.predict(long(f"GPUS=32 CP=16 TP=2{more}")) for more in ("", f" {BOTH}")]
    assert rings[1].exchange < rings[0].exchange / 2
    assert "context parallelism by a2a+p2p" in MACHINE.unmeasured(long(f"GPUS=32 CP=16 {BOTH}"))


def test_the_result_is_kept_on_either_side_and_each_level_has_a_communicator():
    a2a, both = (row("308", f"CP_COMM_TYPE={how}") for how in ("a2a", "a2a+p2p"))
    assert attention_bytes(both) == attention_bytes(a2a) > attention_bytes(row("308", ""))
    assert context_gib(both) - context_gib(a2a) == pytest.approx(COMMUNICATOR_GIB)


def test_bytes_received():
    """Three quarters of a rank's queries, keys, values and results, and one other part's keys and values."""
    piece = 8 * 4096 / 8 * 1536 * 2 / 2**20
    received = attention_exchange_mib(row("308", BOTH))
    assert received == pytest.approx((4 * 3 / 4 + 2 * 1) * piece)


def test_layouts_have_both_levels_only_over_nodes():
    e = long("GPUS=64 CP=16 SEQ=131072")
    table = Search(e, 64, MACHINE.card, MACHINE).table()
    both = table.array("cp_comm_type") == "a2a+p2p"
    crossing = table.array("tp") * table.array("cp") > 8
    assert both.any() and np.all(crossing[both])
    eight = long("GPUS=8 GBS=1 CP=8")
    assert "a2a+p2p" not in Search(eight, 8, None, None).table().array("cp_comm_type")


@pytest.mark.parametrize("fixed", [{"cp_a2a": 2}, {"cp_a2a": 2, "cp_comm_type": "a2a+p2p"}])
def test_typed_levels_are_searched_within_a_node_too(fixed):
    search = Search(long("GPUS=8 GBS=1 CP=8"), 8, None, None, fixed)
    table = search.table()
    found = [search.laid_out(table, place) for place in range(len(table))]
    assert {layout.cp_levels for layout in found} == {(2, 2), (2, 4)}
    assert all(f"{BOTH} CP_A2A=2" in overrides.typed(layout.overrides) for layout in found)


def test_faster_layouts_may_exchange_otherwise_than_the_row():
    e = row("308", f"{BOTH} CP_A2A=2")
    search = Search(e, 8, MACHINE.card, None)
    table = search.table()
    found = [search.laid_out(table, place) for place in range(len(table))]
    ways = {(layout.cp_comm_type, layout.cp_a2a) for layout in found if layout.cp == 8}
    assert {("a2a", None), ("p2p", None), ("a2a+p2p", 2), ("a2a+p2p", None)} <= ways


def test_a_plan_takes_typed_levels(capsys):
    words = "plan MODEL=llama3-8b GPUS=64 CARD=h100-80gb SEQ=131072 GBS=16 CP_A2A=2"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{BOTH} CP_A2A=2") >= 5 and "to run the first: make 611 " in printed


def test_long_sequences_over_nodes_are_planned_with_both_levels():
    search = Search(long("GPUS=64 CP=16 SEQ=131072"), 64, MACHINE.card, MACHINE)
    first = next(best(search))
    assert BOTH in first.settings and first.experiment.cp_levels[0] > 1
    ring = next(best(Search(search.experiment, 64, MACHINE.card, MACHINE, {"cp_comm_type": "p2p"})))
    assert first.step.total < ring.step.total


@pytest.mark.parametrize(
    ("settings", "ranks", "levels"),
    [
        ("GPUS=16 CP=16", 8, (4, 2)),
        ("GPUS=16 CP=16 CP_A2A=2", 8, (2, 4)),
        ("GPUS=32 CP=8 TP=4", 4, (2, 2)),
        ("GPUS=64 CP=4 PP=8 TP=2 SP=1", 2, (1, 2)),
    ],
)
def test_a_miniature_has_both_levels_while_its_ranks_make_two(settings, ranks, levels):
    full = row("308", f"{settings} MBS=1 {BOTH}")
    small = miniature(full)
    assert (small.cp, small.cp_levels) == (ranks, levels)
    assert small.cp_comm_type == ("a2a+p2p" if levels[0] > 1 else "p2p")
    assert ("context parallelism a2a+p2p -> p2p" in describe(full, small)) == (levels[0] == 1)
