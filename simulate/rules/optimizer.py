"""Which form of an optimizer's step a parameter gets; the program and its forecast decide it alike."""

from __future__ import annotations

BLOCK_ELEMENTS = 256
"""Moments in 8 bits share a scale in float32 with so many neighbours."""
SMALLEST_ELEMENTS = 4096
"""Of one copy or head; smaller parameters keep their moments in full, as bitsandbytes has it."""
CPU_CHUNK_ELEMENTS = 2**16
"""That a step with 8 bits works on at once where its kernel needs room, on a CPU; a multiple of a block."""
CPU_CHUNK_BYTES = 20
"""An element of that chunk: both moments, a denominator and its root, and what is written."""


def through_gram(rows: int, columns: int) -> bool:
    """Whether Muon iterates on a matrix's Gram matrix alone: fewer operations where it is long enough."""
    small, large = sorted((rows, columns))
    return large >= 2 * small


def is_eight_bit(elements: int) -> bool:
    """Whether a parameter's moments are kept in 8 bits, by the elements of one copy or head."""
    return elements >= SMALLEST_ELEMENTS
