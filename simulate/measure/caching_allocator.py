"""Model of the memory that CUDA's caching allocator reserves for a program with known allocations; torch-free.

The allocator reserves more than tensors hold, and the difference decides whether a run fits a GPU. It takes memory from
the driver in segments, cuts blocks out of them and keeps freed blocks (torch's c10/cuda/CUDACachingAllocator.cpp, its
defaults): sizes are rounded to 512 bytes; blocks of up to 1 MiB come out of segments of 2 MiB, larger ones of less than
10 MiB out of 20 MiB, and others get a segment of their own, rounded to 2 MiB. The smallest free block that is large
enough is taken, and the rest of it stays free if it is large enough for its pool. simulate.measure.fake_tensors calls
`reserved_bytes`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from simulate.costs.allocator import ROUNDING, SMALL_BLOCK, rounded, segment_bytes


@dataclass
class _Block:
    """A part of a segment, with its neighbours in it."""

    size: int
    address: int
    """Position among all segments; it tells blocks of equal size apart."""
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class _Pool:
    """The blocks of all small or of all large segments."""

    smallest_rest: int
    """A block is cut where the rest has at least this many bytes."""
    free: list[tuple[int, int]] = field(default_factory=list)
    """Sorted (bytes, address) of free blocks."""
    blocks: dict[int, _Block] = field(default_factory=dict)
    """Blocks by address."""

    def take(self, size: int) -> _Block | None:
        """Return the smallest free block of at least `size` bytes, cut to size; None where there is none."""
        index = bisect_left(self.free, (size, -1))
        if index == len(self.free):
            return None
        return self._cut(self.blocks[self.free.pop(index)[1]], size)

    def add(self, segment: _Block, size: int) -> _Block:
        """Return a block cut out of a new segment."""
        self.blocks[segment.address] = segment
        return self._cut(segment, size)

    def _cut(self, block: _Block, size: int) -> _Block:
        block.free = False
        if block.size - size >= self.smallest_rest:
            rest = _Block(block.size - size, block.address + size, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            self.blocks[rest.address] = rest
            insort(self.free, (rest.size, rest.address))
        return block

    def give_back(self, block: _Block) -> None:
        """Free a block, and join it with its free neighbours."""
        # The neighbour behind first, then the one before, which may join a block that has just grown.
        for first, second in ((block, block.after), (block.before, block)):
            if first is None or second is None or not (first.free or first is block):
                continue
            if not (second.free or second is block) or first is second:
                continue
            for neighbour in (first, second):
                if neighbour.free:
                    del self.free[bisect_left(self.free, (neighbour.size, neighbour.address))]
            first.size, first.after = first.size + second.size, second.after
            if second.after is not None:
                second.after.before = first
            del self.blocks[second.address]
            block = first
            block.free = False  # not yet: the neighbour before it may join, too
        block.free = True
        insort(self.free, (block.size, block.address))


def reserved_bytes(entries: Iterable[tuple[int, int]]) -> int:
    """Return the bytes of all segments after a sequence of (key, bytes): allocations, and frees with negative bytes."""
    # Blocks of small segments are cut where 512 bytes are left, those of large ones where more than 1 MiB is.
    small, large = _Pool(ROUNDING), _Pool(SMALL_BLOCK + 1)
    held: dict[int, tuple[_Pool, _Block]] = {}
    reserved = 0
    for key, num_bytes in entries:
        if num_bytes < 0:
            pool, block = held.pop(key)
            pool.give_back(block)
            continue
        size = rounded(num_bytes)
        pool = small if size <= SMALL_BLOCK else large
        found = pool.take(size)
        # A segment is never returned to the driver, so that the sum is also the peak.
        if found is None:
            segment = segment_bytes(size)
            found = pool.add(_Block(segment, reserved), size)
            reserved += segment
        held[key] = pool, found
    return reserved
