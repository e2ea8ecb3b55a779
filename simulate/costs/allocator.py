"""Bytes that CUDA's caching allocator holds beside a program's tensors, in closed form.

Whether a run fits a GPU depends on what the allocator takes from the driver, not on what tensors need. It rounds
blocks up, cuts those of 1 to 10 MiB out of segments of 20 MiB, and keeps freed blocks, which later tensors do not
always fit (simulate.measure.caching_allocator replays it block by block; tests hold this form to the replay). Planning
asks simulate.costs.memory, which asks this module, for thousands of candidates, so it counts kinds of tensors, not
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

ROUNDING = 512
SMALL_BLOCK, SMALL_SEGMENT = 2**20, 2 * 2**20
MEDIUM_BLOCK, MEDIUM_SEGMENT = 10 * 2**20, 20 * 2**20
SEGMENT_ROUNDING = 2 * 2**20
"""Size classes of torch's c10/cuda/CUDACachingAllocator.cpp, its defaults."""


def rounded(num_bytes: int) -> int:
    """Return the bytes of the block that a tensor gets."""
    return -(-num_bytes // ROUNDING) * ROUNDING


def segment_bytes(block: int) -> int:
    """Return the bytes of the segment that is taken from the driver for a block that no free one serves."""
    if block <= SMALL_BLOCK:
        return SMALL_SEGMENT
    if block < MEDIUM_BLOCK:
        return MEDIUM_SEGMENT
    return -(-block // SEGMENT_ROUNDING) * SEGMENT_ROUNDING


def packed_bytes(counts: Mapping[int, int]) -> int:
    """Return the bytes of the segments that hold tensors which all stay; `counts` by a tensor's bytes."""
    small = sum(rounded(size) * count for size, count in counts.items() if size <= SMALL_BLOCK)
    total = -(-small // SMALL_SEGMENT) * SMALL_SEGMENT
    for size, count in counts.items():
        if size > SMALL_BLOCK:  # tensors of one size share segments
            segment = segment_bytes(rounded(size))
            total += -(-count // (segment // rounded(size))) * segment
    return total


def unfilled_share(counts: Mapping[int, int]) -> float:
    """Return the room that segments have beside tensors that all stay, as a share of the tensors."""
    return packed_bytes(counts) / sum(size * count for size, count in counts.items()) - 1


WORKSPACE_BYTES = MEDIUM_SEGMENT
"""The segment in which cuBLAS has its workspace of 8,519,680 bytes: CUBLAS_WORKSPACE_CONFIG = :4096:2:16:8, the default
of torch (ATen/cuda/CublasHandlePool.cpp) before Hopper, which has 32 MiB."""
USED_AGAIN = 0.5
"""Share of the room beside tensors that stay which no other tensor uses."""
MISFIT = 0.75
"""Blocks that do not fit the room of others, in tensors of the largest size but logits."""
FRAGMENTS = 0.02
"""Other torn room, as a share of all tensors.

These three were fitted to replays of GPT-2, ViT-B/16, Mixer-B/16 and Llama 1B with LTE, DDP, DiLoCo and PowerSGD, in
fp32, fp16 and NF4 (python bench/allocator.py): -5 to +6 percent off, in fp16 with a large vocabulary -3 to +19,
and up to +45 with few blocks.
"""


def cast_bytes(logits_bytes: int, largest_parameter_bytes: int) -> int:
    """Return the room that a step's casts tear, of logits and of the largest parameter (a table).

    Tensors of half and of full size take turns, so that a block seldom fits the next one. Between none and all of the
    logits' room was torn in replays, or two tables; what is planned is the most.
    """
    return max(logits_bytes, 2 * largest_parameter_bytes)


def held_beside_tensors(tensor_bytes: int, unfilled_bytes: float, largest_bytes: int, torn_bytes: int) -> int:
    """Return the bytes that the allocator and the libraries hold beside the tensors of a run at its peak.

    `unfilled_bytes`: room beside tensors that stay; `largest_bytes`: of the largest tensor that comes and goes, but for
    logits; `torn_bytes`: of autocast.
    """
    beside = USED_AGAIN * unfilled_bytes + MISFIT * largest_bytes + FRAGMENTS * tensor_bytes
    return WORKSPACE_BYTES + torn_bytes + int(beside)
