"""Choose the form of an optimizer's step for each parameter; simulate.optim and costs share these decisions."""

from __future__ import annotations

BLOCK_ELEMENTS = 256
"""Elements of 8-bit moments that share one float32 scale, as in bitsandbytes."""
SMALLEST_ELEMENTS = 4096
"""Smallest copy or head whose moments are kept in 8 bits; bitsandbytes has the same limit."""
CPU_CHUNK_ELEMENTS = 2**16
"""Elements that an 8-bit step on a CPU works on at once, to bound its working memory; a multiple of a block."""
CPU_CHUNK_BYTES = 20
"""Working bytes for each element of that chunk, five floats: two moments, a denominator, its root, the result."""


def through_gram(rows: int, columns: int) -> bool:
    """Whether Muon iterates on a matrix's Gram matrix alone, which takes fewer operations for long matrices."""
    # A Gram matrix costs small^2 x large once instead of in each iteration; simulate.costs.flops has both counts.
    small, large = sorted((rows, columns))
    return large >= 2 * small


def projected_rank(rank: int | None, rows: int, columns: int) -> int:
    """Return the rank of APOLLO's projection of a matrix; where none is set, a quarter of the shorter side."""
    return max(1, min(rows, columns) // 4) if rank is None else rank


def is_eight_bit(elements: int) -> bool:
    """Whether a parameter's moments are kept in 8 bits, by the elements of one copy or head."""
    return elements >= SMALLEST_ELEMENTS
