"""PyTorch's caching allocator of GPU memory: what a program's allocations reserve.

Mirrors get_allocation_size, should_split, get_free_block and free_block of
c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.11) for one stream and default settings. Tensors up to
SMALL_LIMIT are left out: they share segments of 2 MiB, and come to less than 0.1 GiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
SMALLEST_BLOCK = 512
SMALL_LIMIT = MIB
"""No remainder up to this size is split off from a larger tensor's block."""
SHARED_SEGMENT = 20 * MIB
SHARED_LIMIT = 10 * MIB
"""From this size on, a tensor that no free block holds gets a segment of its own."""
SEGMENT_STEP = 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment: its free neighbours merge with it once it is free."""

    address: int
    size: int
    before: Block | None = None
    after: Block | None = None
    is_free: bool = False
    requested: int = 0


class Allocator:
    """Sizes in bytes. ``allocated`` counts whole blocks, as torch.cuda.memory_allocated does."""

    def __init__(self) -> None:
        self.allocated = self.requested = self.reserved = 0
        self.most_allocated = self.most_reserved = 0
        self.requested_at_most = 0
        """What tensors had asked for when ``most_allocated`` was reached."""
        self._free: list[tuple[int, int, Block]] = []
        """Free blocks by size and address."""
        self._next_address = 0

    def allocate(self, size: float) -> Block | None:
        """A block for ``size`` bytes; None for a small tensor."""
        if size <= SMALL_LIMIT:
            return None
        rounded = -int(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK
        index = bisect_left(self._free, (rounded, -1))
        fits = index < len(self._free)
        block = self._free.pop(index)[2] if fits else self._new_segment(rounded)
        block.is_free = False
        if block.size - rounded > SMALL_LIMIT:
            rest = Block(block.address + rounded, block.size - rounded, block, block.after)
            if block.after:
                block.after.before = rest
            block.after, block.size = rest, rounded
            self._keep(rest)
        block.requested = int(size)
        self.allocated += block.size
        self.requested += block.requested
        if self.allocated > self.most_allocated:
            self.most_allocated, self.requested_at_most = self.allocated, self.requested
        return block

    def allocate_all(self, sizes: Iterable[float]) -> list[Block | None]:
        return [self.allocate(size) for size in sizes]

    def free(self, *blocks: Block | None) -> None:
        """Give ``blocks`` back to the cache. What is None is skipped."""
        for block in blocks:
            if block is None:
                continue
            self.allocated -= block.size
            self.requested -= block.requested
            if block.after and block.after.is_free:
                self._take(block.after)
                _join(block, block.after)
            if block.before and block.before.is_free:
                self._take(block.before)
                block = _join(block.before, block)
            self._keep(block)

    def release_cache(self) -> None:
        """Give whole free segments back to the GPU, as torch.cuda.empty_cache does."""
        whole = [entry for entry in self._free if entry[2].before is entry[2].after is None]
        self.reserved -= sum(size for size, _, _ in whole)
        self._free = [entry for entry in self._free if entry not in whole]

    def forget_cache(self) -> None:
        """Let free blocks stay reserved but unused: they belong to another stream."""
        self._free = []

    def _new_segment(self, size: int) -> Block:
        segment = SHARED_SEGMENT
        if size >= SHARED_LIMIT:
            segment = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        self.reserved += segment
        self.most_reserved = max(self.most_reserved, self.reserved)
        address = self._next_address
        self._next_address += segment
        return Block(address, segment)

    def _keep(self, block: Block) -> None:
        block.is_free = True
        insort(self._free, (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]


def _join(block: Block, after: Block) -> Block:
    """``block`` with its neighbour ``after``."""
    block.size += after.size
    block.after = after.after
    if block.after:
        block.after.before = block
    return block
