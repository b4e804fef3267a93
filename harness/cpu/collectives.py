"""Collectives that NCCL has and gloo lacks.

Tensors whose length differs between ranks: expert tensor parallelism gathers and scatters them.

Concurrent collectives of one group, which Megatron-FSDP and overlapping optimizers start. A gloo
group has two threads, and each writes the name of its last collective into one string without a
lock (``ProcessGroupGloo::runLoop``, ``lastCompletedWorkName``). A long name, such as
ALLGATHER_COALESCED, lies on the heap; two threads that finish at the same moment corrupt it, and
the rank aborts. So a group gets one thread here, which runs its collectives in order.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def install() -> None:
    """Gather and reduce-scatter tensors [n_rank, ...] of different n; one thread per group."""
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
    """A collective for lists of tensors of equal or different lengths."""

    def collective(output, tensor, *args, **kwargs):
        shares = output if isinstance(output, Sequence) else tensor
        chosen = one_length if len({len(share) for share in shares}) == 1 else several_lengths
        return chosen(output, tensor, *args, **kwargs)

    return collective


def _all_gather(
    shares: list[torch.Tensor], mine: torch.Tensor, group, async_op: bool = False
) -> dist.Work | None:
    """Every rank sends its tensor to all; ``shares`` receives them.

    This returns only then, even where ``async_op`` is true.
    """
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
    """Every rank sends each rank its share; ``mine`` becomes their sum, added in order of ranks."""
    lengths = [len(share) for share in shares]
    received = torch.cat([mine] * len(shares))
    dist.all_to_all_single(
        received, torch.cat(shares), [len(mine)] * len(shares), lengths, group=group
    )
    mine.copy_(received.unflatten(0, (len(shares), len(mine))).sum(0))
