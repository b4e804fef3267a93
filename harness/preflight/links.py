"""Between GPUs, to the host and to the disk: latency and bandwidth by size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from harness.predict.machine_file import CollectiveRate, StorageRates
from harness.preflight.clock import Clock

SIZES = tuple(2**n for n in (12, 16, 20, 22, 24, 26, 28))
"""Bytes: of an all-reduce or send what a rank holds, of the others what all ranks hold together."""
SMALL_SIZES = tuple(2**n for n in (12, 16, 20))
CALLS_BYTES = 2**30
"""So many bytes does a batch of collectives move, in 2 to 50 calls."""
BUFFER_BYTES = {"cuda": 2**28, "cpu": 2**22}


def collectives(
    clock: Clock, sizes: Sequence[int], device: str, group: dist.ProcessGroup | None = None
) -> Iterator[CollectiveRate]:
    """All-reduce, all-gather, reduce-scatter, all-to-all over a group; send to a neighbour in it.

    Args:
        group: None: all ranks.
    """
    ranks = dist.get_world_size(group)
    for size in sizes:
        for name, call in _calls(size, device, group).items():
            dist.barrier()
            us = clock.device_us(call, calls=max(2, min(50, CALLS_BYTES // size)))
            launch_us = clock.launch_us(call)
            yield CollectiveRate(name=name, ranks=ranks, size=size, us=us, launch_us=launch_us)


def _calls(
    size: int, device: str, group: dist.ProcessGroup | None
) -> dict[str, Callable[[], object]]:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    elements = size // 2 // ranks * ranks
    whole, other = (torch.zeros(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
    part = torch.zeros(elements // ranks, device=device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
    }
    if device == "cpu":  # gloo has neither
        del calls["reduce_scatter"], calls["all_to_all"]
    after, before = (_rank_of((rank + step) % ranks, group) for step in (1, -1))
    return {**calls, "send": lambda: _exchange(whole, after, other, before)}


def _exchange(sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> None:
    """Send to one rank while receiving from one, the same or another."""
    operations = [dist.P2POp(dist.isend, sent, to), dist.P2POp(dist.irecv, received, source)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _rank_of(place: int, group: dist.ProcessGroup | None) -> int:
    """The rank, among all, of a place in ``group``."""
    return dist.get_global_rank(group, place) if group else place


def pairs_gb_per_s(
    clock: Clock, device: str, group: dist.ProcessGroup | None = None
) -> dict[int, float]:
    """Bandwidth to each other rank of a group, both ways at once, in GB/s each way, by its place.

    In a round every rank exchanges with one other, as in a tournament where each meets each once
    (the circle method).
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    bytes_ = BUFFER_BYTES[device]
    sent, received = (torch.zeros(bytes_ // 2, device=device, dtype=torch.bfloat16) for _ in "ab")
    found = {}
    for partner in partners(rank, ranks):
        dist.barrier()
        if partner is None:
            continue
        # The same number of calls on both sides, so no clock that chooses it.
        peer = _rank_of(partner, group)
        _exchange(sent, peer, received, peer)
        clock.wait()
        begun = time.perf_counter()
        for _ in range(CALLS := 4):
            _exchange(sent, peer, received, peer)
        clock.wait()
        found[partner] = CALLS * bytes_ / (time.perf_counter() - begun) / 1e9
    return found


def partners(rank: int, ranks: int) -> Iterator[int | None]:
    """Whom ``rank`` meets in each round; None: it rests."""
    seats = ranks + ranks % 2
    fixed = seats - 1
    for turn in range(seats - 1):
        if rank == fixed:
            partner = turn * (seats // 2) % fixed
        else:
            partner = (turn - rank) % fixed
            if partner == rank:
                partner = fixed
        yield partner if partner < ranks else None


def storage(folder: Path, device: str, clock: Clock) -> StorageRates:
    """Copies between host and GPU from pinned memory, and a file written and synced, in GB/s."""
    bytes_ = BUFFER_BYTES[device]
    host = torch.zeros(bytes_, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    to_device = clock.device_us(lambda: there.copy_(host, non_blocking=True))
    to_host = clock.device_us(lambda: host.copy_(there, non_blocking=True))
    return StorageRates(
        to_device_gb_per_s=bytes_ / to_device / 1e3,
        to_host_gb_per_s=bytes_ / to_host / 1e3,
        disk_write_gb_per_s=_disk_gb_per_s(folder, bytes_),
    )


def _disk_gb_per_s(folder: Path, bytes_: int) -> float:
    path = folder / f".preflight-{os.getpid()}"
    content = os.urandom(2**20) * (bytes_ // 2**20)
    try:
        begun = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return bytes_ / (time.perf_counter() - begun) / 1e9
    finally:
        path.unlink(missing_ok=True)
