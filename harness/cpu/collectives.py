"""What NCCL has and gloo lacks.

Collectives of shares of different lengths: expert tensor parallelism needs them.

Several collectives of one group under way at once, which Megatron-FSDP and overlapping optimizers
start: a gloo group has two threads for them, and each writes the name of what it has done into one
string, without a lock (``ProcessGroupGloo::runLoop``, ``lastCompletedWorkName``). Names longer than
a C++ string holds in itself, such as ALLGATHER_COALESCED, lie on the heap; two threads that end at
the same moment corrupt it, and the rank aborts. So here a group has one thread, and its collectives
run in the order in which they were started.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def install() -> None:
    """Let ``torch.distributed`` gather and reduce-scatter tensors [n_rank, ...] whose n differs
    between ranks, and let gloo run the collectives of a group one after another.
    """
    _one_thread_a_group()
    dist.all_gather = _any_lengths(dist.all_gather, _all_gather)
    dist.reduce_scatter = _any_lengths(dist.reduce_scatter, _reduce_scatter)


def _one_thread_a_group() -> None:
    init, group = dist.ProcessGroupGloo.__init__, dist.ProcessGroupGloo

    def init_with_one_thread(
        self, store: dist.Store, rank: int, size: int, timeout: timedelta
    ) -> None:
        options = group._Options()
        options._timeout, options._threads = timeout, 1
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
        options._devices = [
            group.create_device(interface=name) for name in interfaces.split(",") if name
        ] or [group.create_default_device()]
        init(self, store, rank, size, options)

    group.__init__ = init_with_one_thread


def _any_lengths(one_length: Callable, several_lengths: Callable) -> Callable:
    """Return a collective that takes lists of tensors of one length or of several."""

    def collective(output, tensor, *args, **kwargs):
        shares = output if isinstance(output, Sequence) else tensor
        chosen = one_length if len({len(share) for share in shares}) == 1 else several_lengths
        return chosen(output, tensor, *args, **kwargs)

    return collective


def _all_gather(
    shares: list[torch.Tensor], mine: torch.Tensor, group, async_op: bool = False
) -> dist.Work | None:
    """Every rank sends its tensor to all; ``shares`` receives them, before this returns even where
    ``async_op`` is true."""
    lengths = [len(share) for share in shares]
    received = torch.cat(shares)
    sent = torch.cat([mine] * len(shares))
    work = dist.all_to_all_single(
        received, sent, lengths, [len(mine)] * len(shares), group=group, async_op=True
    )
    work.wait()
    for share, tensor in zip(shares, received.split(lengths), strict=True):
        share.copy_(tensor)
    return work if async_op else None


def _reduce_scatter(mine: torch.Tensor, shares: list[torch.Tensor], group) -> None:
    """Every rank sends each rank its share; ``mine`` receives the sum of what is sent to this one,
    in ranks' order."""
    lengths = [len(share) for share in shares]
    received = torch.cat([mine] * len(shares))
    dist.all_to_all_single(
        received, torch.cat(shares), [len(mine)] * len(shares), lengths, group=group
    )
    mine.copy_(received.unflatten(0, (len(shares), len(mine))).sum(0))
