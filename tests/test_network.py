"""How long messages take, by the links and networks that a group of ranks crosses."""

import pytest

from harness.experiment.fabrics import LINKS, NETWORKS
from harness.experiment.hardware import CARDS, find_card
from harness.experiment.unlisted import experiment_from
from harness.predict import calibrations, step_time
from harness.predict.network import MESSAGE_S, NETWORK_HOP_S, Group, Groups, Network

H100 = find_card("h100-80gb")
LINK = 0.82 * 450e9
ADAPTER = 0.82 * 50e9
GIB = 2**30


def of(card: str = "h100-80gb") -> Network:
    return Network.of(find_card(card))


def test_groups_lie_as_upstream_orders_ranks():
    """tp-cp-ep-dp-pp: compared with ranks of megatron.core's RankGenerator for tp 2, cp 2, dp 4, pp 2."""
    groups = Groups(experiment_from("llama3-70b", {"GPUS": "32", "TP": "2", "CP": "2", "PP": "2"}))
    assert groups.tensor == Group(2, 1) and groups.exchanging_keys == Group(2, 2)
    assert groups.replicas == Group(8, 2) and groups.stages == Group(2, 16)


def test_group_strides_are_those_of_upstream():
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    order = "tp-cp-ep-dp-pp"
    generator = parallel_state.RankGenerator(tp=2, ep=1, dp=4, pp=2, cp=2, order=order)
    experts = parallel_state.RankGenerator(tp=2, ep=4, dp=2, pp=2, cp=1, order=order)
    settings = {"GPUS": "32", "TP": "2", "CP": "2", "PP": "2", "EP": "4", "ETP": "2", "SP": "1"}
    groups = Groups(experiment_from("mixtral-8x7b", settings))
    for axes, group, made in (
        ("tp", groups.tensor, generator),
        ("cp", groups.exchanging_keys, generator),
        ("dp-cp", groups.replicas, generator),
        ("pp", groups.stages, generator),
        ("ep", groups.experts, experts),
        ("tp", groups.split_experts, experts),
        ("dp", groups.expert_replicas, experts),
    ):
        first = made.get_ranks(axes)[0]
        assert first == [group.stride * place for place in range(group.ranks)], axes


def test_within_a_node_links_decide_and_between_nodes_adapters():
    network = of()
    assert network.bytes_per_s(Group(8, 1)) == pytest.approx(LINK)
    # one rank a node: one adapter; four ranks a node: a ring through each one's
    assert network.bytes_per_s(Group(16, 8)) == pytest.approx(ADAPTER)
    assert network.bytes_per_s(Group(8, 2)) == pytest.approx(4 * ADAPTER)
    assert network.bytes_per_s(Group(16, 1)) == pytest.approx(8 * ADAPTER)
    assert network.bytes_per_s(Group(2, 7)) == pytest.approx(LINK)


def test_two_ranks_of_a_node_send_as_fast_as_measured():
    measured = Network.of(H100, 293.0)
    assert measured.bytes_per_s(Group(2, 1)) == 293e9
    assert measured.bytes_per_s(Group(2, 8)) == pytest.approx(ADAPTER)
    assert measured.bytes_per_s(Group(4, 1)) == pytest.approx(LINK)


def test_a_gather_sends_all_but_its_own_part_and_waits_for_each_node():
    assert of().gather_s(GIB, Group(8, 1)) == pytest.approx(7 / 8 * GIB / LINK + MESSAGE_S)
    crossing = of().gather_s(GIB, Group(4, 8))
    assert crossing == pytest.approx(3 / 4 * GIB / ADAPTER + MESSAGE_S + 3 * NETWORK_HOP_S)
    assert of().gather_s(GIB, Group(1, 8)) == 0


def test_a_switch_that_adds_up_sends_less_and_many_nodes_use_a_tree():
    reduced = 9 / 8 * GIB / (0.685 * 450e9) + MESSAGE_S
    assert of().all_reduce_s(GIB, Group(8, 1)) == pytest.approx(reduced)
    ring = 2 * 7 / 8 * GIB / (0.78 * 300e9) + MESSAGE_S
    assert of("a100-80gb").all_reduce_s(GIB, Group(8, 1)) == pytest.approx(ring)
    # of four ranks, NCCL builds a ring
    assert of().all_reduce_s(GIB, Group(4, 1)) == pytest.approx(1.5 * GIB / LINK + MESSAGE_S)
    small = of().all_reduce_s(4, Group(128, 8))
    assert small == pytest.approx(MESSAGE_S + 2 * 7 * NETWORK_HOP_S, rel=1e-3)


def test_all_to_all_uses_links_and_network_at_the_same_time():
    inside = 7 / 8 * GIB / LINK
    assert of().all_to_all_s(GIB, Group(8, 1)) == pytest.approx(inside + MESSAGE_S)
    outside = 24 / 32 * GIB / ADAPTER
    assert of().all_to_all_s(GIB, Group(32, 1)) == pytest.approx(
        outside + MESSAGE_S + NETWORK_HOP_S
    )


def test_a_rack_of_72_is_one_node_and_a_bridge_joins_a_pair():
    assert not of("gb200-186gb").crosses_nodes(Group(64, 1))
    assert of("gb200-186gb").crosses_nodes(Group(128, 1))
    bridged = of("h100-nvl-94gb")
    assert bridged.bytes_per_s(Group(2, 1)) == pytest.approx(0.8 * 300e9)
    # four ranks cross the slower switch, two of them from each pair
    assert bridged.bytes_per_s(Group(4, 1)) == pytest.approx(0.8 * 2 * 64e9)


def test_nodes_with_fewer_ranks_end_earlier():
    small = of().with_ranks_per_node(2)
    assert small.crosses_nodes(Group(4, 1)) and not small.crosses_nodes(Group(2, 1))
    assert small.bytes_per_s(Group(4, 1)) == pytest.approx(2 * ADAPTER)
    assert of().with_ranks_per_node(16).node == 8


def test_every_card_has_links_and_a_network_with_sources():
    for card in CARDS:
        assert card.node_gpus >= 8 and card.link_gb_per_s > 0
        assert LINKS[card.link].source and NETWORKS[card.network].source


def test_traffic_between_nodes_hides_behind_computing_as_far_as_it_can():
    """Gradients of 48 nodes take longer than a node's, and a short backward pass hides less."""
    machine = calibrations.load()["h100-tutorial"]
    model = "llama3-8b"
    one = experiment_from(model, {"GPUS": "16", "TP": "8", "GBS": "16", "SEQ": "8192"})
    many = experiment_from(model, {"GPUS": "384", "TP": "8", "GBS": "384", "SEQ": "8192"})
    short = experiment_from(model, {"GPUS": "384", "TP": "8", "GBS": "384", "SEQ": "512"})
    steps = [machine.predict(each, operation_us=1) for each in (one, many, short)]
    assert steps[0].gradients < steps[1].gradients < 3 * steps[0].gradients
    assert steps[2].gradients > 3 * steps[1].gradients
    assert steps[0].stragglers < steps[1].stragglers


def test_overlapping_by_pieces_leaves_one_piece():
    settings = {"GPUS": "8", "TP": "4", "GBS": "8", "SEQ": "4096"}
    plain, piecewise = (
        calibrations.load()["h100-tutorial"].predict(
            experiment_from("llama3-8b", settings | {"TP_OVERLAP": overlap})
        )
        for overlap in ("0", "1")
    )
    assert piecewise.exchange < plain.exchange / 2


def test_the_slowest_of_more_ranks_is_later():
    shares = [step_time.slowest_of(ranks) for ranks in (1, 8, 64, 1024)]
    assert (
        shares[0] == 0 and shares == sorted(shares) and shares[3] == pytest.approx(0.0372, abs=1e-4)
    )


def test_a_card_without_steps_borrows_rates_that_others_published():
    borrowed = calibrations.machine_of(find_card("b200-180gb"))
    assert borrowed.speed().rates.product_tflops == pytest.approx(1090.4)
    a100 = calibrations.machine_of(find_card("a100-80gb")).speed().rates
    assert a100.product_tflops == pytest.approx(223.9 * 271.2 / 252.9)
    assert borrowed.row_of(experiment_from("llama3-8b", {})) is None
    assert calibrations.machine_of(find_card("t4")) is None
