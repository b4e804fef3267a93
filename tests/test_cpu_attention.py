"""Where context parallelism puts a sequence, against what upstream's data loader does with a batch."""

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_positions_are_those_of_upstreams_batches(size, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from megatron.core.utils import get_batch_on_this_cp_rank

    from harness.cpu.attention import sequence_positions

    sequence = 32
    ours = sequence_positions(size, sequence).chunk(size)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        batch = {"tokens": torch.arange(sequence)[None].repeat(2, 1)}
        theirs = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=None)["tokens"]
        assert theirs.tolist() == [ours[rank].tolist()] * 2
