"""The table of GPUs, and a GPU that behaves as a smaller one."""

import pytest

from harness.errors import UserError
from harness.experiment.hardware import CARDS, allocator_fraction, find_card, peak_tflops


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA GB200", "gb200-186gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("H100-80GB", "h100-80gb"),
    ],
)
def test_names_of_nvml_and_short_keys_are_found(name, key):
    assert find_card(name).key == key


@pytest.mark.parametrize(
    "name", ["NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Quadro FX 570", ""]
)
def test_unknown_names_are_not_guessed(name):
    assert find_card(name) is None
    assert peak_tflops(name, "bf16") is None


def test_keys_and_names_are_unique():
    assert len({card.key for card in CARDS}) == len(CARDS)
    assert all(find_card(card.key) is card and find_card(card.name) is card for card in CARDS)


def test_peaks_are_dense_and_by_precision():
    assert peak_tflops("NVIDIA H200", "bf16") == 989.5
    assert peak_tflops("NVIDIA H200", "fp8") == 1979
    assert peak_tflops("NVIDIA H200", "fp32") == 67
    assert peak_tflops("Tesla V100-SXM2-32GB", "bf16") is None
    for card in CARDS:
        assert card.fp8_tflops is None or card.fp8_tflops == pytest.approx(
            2 * card.bf16_tflops, rel=0.02
        ), card.key
    fp4 = {card.key: card.fp4_tflops for card in CARDS if card.fp4_tflops}
    # of eight or 72 GPUs: 72 and 108 PFLOP/s of an HGX B200 and B300, 720 and 1,080 of an NVL72
    assert fp4 == {"rtx5090": 1676, "b200-180gb": 72e3 / 8, "b300-288gb": 108e3 / 8, "gb200-186gb": 720e3 / 72, "gb300-288gb": 1080e3 / 72}  # fmt: skip
    assert peak_tflops("NVIDIA H200", "fp4") is None


def test_an_h200_as_an_h100_leaves_the_allocator_what_was_proven_there():
    fraction = allocator_fraction("h100-80gb", find_card("NVIDIA H200").memory_mib)
    assert fraction == 0.548
    assert fraction * 139.81 == pytest.approx(76.6, abs=0.05)  # GiB; 111 ran and 121 did not


def test_only_a_smaller_card_can_be_emulated():
    with pytest.raises(UserError, match=r"CARD=h200-141gb has 143,771 MiB, this GPU 81,559 MiB"):
        allocator_fraction("h200-141gb", 81559)
    with pytest.raises(UserError, match="only a smaller card"):
        allocator_fraction("h200-141gb", 143771)
    with pytest.raises(UserError, match=r"CARD=h100-80g: unknown GPU; did you mean h100-80gb"):
        allocator_fraction("h100-80g", 143771)
