"""The precision-aware optimizer's 16 bits of a weight: whole in a checkpoint, and read back bit by bit."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.cpu

WEIGHTS = [
    0.0,
    1.0,
    -1.0,
    1.00390625,
    -1.00390625,
    3e-39,
    -3e-39,
    65504.1,
    -2.7182818,
    1 / 3,
]  # two lie halfway


def weights():
    import torch

    drawn = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.02
    return torch.cat([torch.tensor(WEIGHTS), drawn])


def test_a_weight_is_its_rounded_half_and_the_remainder():
    import torch

    from harness.entry.remainders import joined, split

    whole = weights()
    rounded, rest = split(whole)
    assert (rounded.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert joined(rounded, rest).equal(whole)
    halfway = whole.view(torch.int32) & 0xFFFF == 0x8000
    assert halfway.sum() == 2
    assert rounded[~halfway].equal(whole[~halfway].bfloat16())  # elsewhere as torch rounds
    assert torch.stack([*rounded[halfway]]).abs().gt(whole[halfway].abs()).all()
    bits, low = rounded.view(torch.int16).int(), rest.int()
    upper = torch.where(
        low < 0, bits - 1, bits
    )  # Transformer Engine's kernel: undo rounding, then put the halves together
    assert (upper << 16 | low & 0xFFFF).view(torch.float32).equal(whole)


class Adam:
    """What upstream asks of Transformer Engine's FusedAdam, with its assertions (pytorch/optimizers/fused_adam.py)."""

    def __init__(self, whole, remainders: bool) -> None:
        import torch

        from harness.entry.remainders import split

        rounded, rest = split(whole)
        self.store_param_remainders = remainders
        self.param_groups = [{"params": [rounded]}]
        self.state = {
            rounded: {
                "master_param": rest if remainders else whole.clone(),
                "exp_avg": torch.zeros_like(whole),
            }
        }

    def get_unscaled_state(self, param, name):
        return self.state[param][name]

    def set_scaled_state(self, param, name, value) -> None:
        import torch

        remainder = self.store_param_remainders and name == "master_param"
        assert value.dtype == (torch.int16 if remainder else torch.float32)
        self.state[param][name].copy_(value)


@pytest.fixture
def upstreams(monkeypatch):
    """Upstream's distributed optimizer with its two methods wrapped, for this test only."""
    import torch  # noqa: F401 before upstream
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from harness.entry import remainders

    for name in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"):
        monkeypatch.setattr(DistributedOptimizer, name, getattr(DistributedOptimizer, name))
    remainders.install()
    return DistributedOptimizer


@pytest.mark.parametrize("saved, loaded", [(True, True), (True, False), (False, True)])
def test_a_checkpoint_holds_whole_weights_for_either_optimizer(upstreams, saved, loaded):
    import torch

    def optimizer(whole, remainders):
        return SimpleNamespace(
            config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
            model_param_group_index_map={"weight": (0, 0)},
            optimizer=Adam(whole, remainders),
        )

    whole = weights()
    given = upstreams._get_main_param_and_optimizer_states(optimizer(whole, saved), "weight")
    assert given["param"].equal(whole)
    taking = optimizer(torch.zeros_like(whole), loaded)
    in_a_file = {
        name: torch.zeros_like(whole).copy_(tensor) for name, tensor in given.items()
    }  # fp32, as upstream writes
    upstreams._set_main_param_and_optimizer_states(taking, "weight", in_a_file)
    assert upstreams._get_main_param_and_optimizer_states(taking, "weight")["param"].equal(whole)
