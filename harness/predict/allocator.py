"""PyTorch's caching allocator of GPU memory: what a program's allocations reserve.

Mirrors get_allocation_size, should_split, get_free_block and free_block of
c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.11) for one stream and default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
SMALLEST_BLOCK = 512
SMALL_LIMIT = MIB
"""Larger tensors come from the large pool, which splits off no remainder up to this size."""
SMALL_SEGMENT, SHARED_SEGMENT = 2 * MIB, 20 * MIB
SHARED_LIMIT = 10 * MIB
"""From this size on, a tensor that no free block holds gets a segment of its own."""
SEGMENT_STEP = 2 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment: its free neighbours merge with it once it is free."""

    address: int
    size: int
    free: list[tuple[int, int, Block]]
    """The free blocks of its pool: size, address, block."""
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
        self._small: list[tuple[int, int, Block]] = []
        self._large: list[tuple[int, int, Block]] = []
        self._next_address = 0

    def allocate(self, size: float) -> Block | None:
        """A block for ``size`` bytes; None for none."""
        if size <= 0:
            return None
        rounded = -int(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK
        small = rounded <= SMALL_LIMIT
        block = self._smallest_free(rounded, small) or self._new_segment(rounded, small)
        block.is_free = False
        rest = block.size - rounded
        if rest >= SMALLEST_BLOCK if small else rest > SMALL_LIMIT:
            self._split(block, rounded)
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
        for block in filter(None, blocks):
            self.allocated -= block.size
            self.requested -= block.requested
            self._merge_and_keep(block)

    def release_cache(self) -> None:
        """Give whole free segments back to the GPU, as torch.cuda.empty_cache does."""
        for pool in (self._small, self._large):
            whole = [entry for entry in pool if entry[2].before is entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            pool[:] = [entry for entry in pool if entry not in whole]

    def _smallest_free(self, size: int, small: bool) -> Block | None:
        pool = self._small if small else self._large
        index = bisect_left(pool, (size, -1))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT
        elif size < SHARED_LIMIT:
            segment = SHARED_SEGMENT
        else:
            segment = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        self.reserved += segment
        self.most_reserved = max(self.most_reserved, self.reserved)
        address = self._next_address
        self._next_address += segment
        return Block(address, segment, self._small if small else self._large)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.free, block, block.after)
        if block.after:
            block.after.before = rest
        block.after, block.size = rest, size
        self._keep(rest)

    def _merge_and_keep(self, block: Block) -> None:
        if block.after and block.after.is_free:
            self._absorb(block, self._taken(block.after))
        if block.before and block.before.is_free:
            freed, block = block, self._taken(block.before)
            self._absorb(block, freed)
        self._keep(block)

    def _absorb(self, block: Block, after: Block) -> None:
        block.size += after.size
        block.after = after.after
        if block.after:
            block.after.before = block

    def _keep(self, block: Block) -> None:
        block.is_free = True
        insort(block.free, (block.size, block.address, block))

    def _taken(self, block: Block) -> Block:
        """``block``, which no longer counts as free."""
        del block.free[bisect_left(block.free, (block.size, block.address))]
        return block
