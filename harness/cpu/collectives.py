"""Collectives of shares of different lengths, which NCCL has and gloo lacks: expert tensor parallelism needs them."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def install() -> None:
    """Let ``torch.distributed`` gather and reduce-scatter tensors [n_rank, ...] whose n differs between ranks."""
    dist.all_gather = _any_lengths(dist.all_gather, _all_gather)
    dist.reduce_scatter = _any_lengths(dist.reduce_scatter, _reduce_scatter)


def _any_lengths(one_length: Callable, several_lengths: Callable) -> Callable:
    """Return a collective that takes lists of tensors of one length or of several."""

    def collective(output, tensor, *args, **kwargs):
        shares = output if isinstance(output, Sequence) else tensor
        chosen = one_length if len({len(share) for share in shares}) == 1 else several_lengths
        return chosen(output, tensor, *args, **kwargs)

    return collective


def _all_gather(shares: list[torch.Tensor], mine: torch.Tensor, group, async_op: bool = False) -> dist.Work | None:
    """Every rank sends its tensor to all; ``shares`` receives them, before this returns even where ``async_op`` is true."""
    lengths = [len(share) for share in shares]
    received = torch.cat(shares)
    sent = torch.cat([mine] * len(shares))
    work = dist.all_to_all_single(received, sent, lengths, [len(mine)] * len(shares), group=group, async_op=True)
    work.wait()
    for share, tensor in zip(shares, received.split(lengths), strict=True):
        share.copy_(tensor)
    return work if async_op else None


def _reduce_scatter(mine: torch.Tensor, shares: list[torch.Tensor], group) -> None:
    """Every rank sends each rank its share; ``mine`` receives the sum of what is sent to this one, in ranks' order."""
    lengths = [len(share) for share in shares]
    received = torch.cat([mine] * len(shares))
    dist.all_to_all_single(received, torch.cat(shares), [len(mine)] * len(shares), lengths, group=group)
    mine.copy_(received.unflatten(0, (len(shares), len(mine))).sum(0))
