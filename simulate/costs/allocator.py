"""Bytes that CUDA's caching allocator holds beside a program's tensors, in closed form.

Whether a run fits a GPU depends on what the allocator takes from the driver, not on what tensors need. It rounds
blocks up, cuts those of 1 to 10 MiB out of segments of 20 MiB, and keeps freed blocks, which later tensors do not
always fit (simulate.measure.caching_allocator replays it block by block; tests hold this form to the replay). Planning
asks simulate.costs.memory, which asks this module, for thousands of candidates, so it counts kinds of tensors, not
tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from simulate.models.shapes import ModelShape

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


def packed_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of the segments that hold tensors which all stay, each size by itself."""
    counts = Counter(map(rounded, sizes))
    small = sum(block * count for block, count in counts.items() if block <= SMALL_BLOCK)
    total = -(-small // SMALL_SEGMENT) * SMALL_SEGMENT
    for block, count in counts.items():
        if block > SMALL_BLOCK:
            segment = segment_bytes(block)
            total += -(-count // (segment // block)) * segment
    return total


WORKSPACE_BYTES = MEDIUM_SEGMENT
"""The segment in which cuBLAS has its workspace of 8,519,680 bytes: CUBLAS_WORKSPACE_CONFIG = :4096:2:16:8, the default
of torch (ATen/cuda/CublasHandlePool.cpp) before Hopper, which has 32 MiB."""
USED_AGAIN = 0.5
"""Share of the room beside tensors that stay which no other tensor uses."""
MISFIT = 0.75
"""Blocks that do not fit the room of others, in tensors of the largest size but logits."""
FRAGMENTS = 0.02
"""What else is torn, as a share of all tensors. These three were fitted to the replays of 33 runs (GPT-2, ViT-B/16,
Mixer-B/16, Llama 1B; LTE, DDP, DiLoCo, PowerSGD; fp32, fp16, NF4), with an error of -5 to +9 percent; bench/allocator.py
fits them again."""


@lru_cache(maxsize=1024)
def unfilled_share(sizes: tuple[int, ...]) -> float:
    """Return the room that segments have beside tensors of these sizes that all stay, as a share of the tensors."""
    return packed_bytes(sizes) / sum(sizes) - 1


def held_beside_tensors(tensor_bytes: int, unfilled_bytes: float, largest_bytes: int, torn_logits_bytes: int) -> int:
    """Return the bytes that the allocator and the libraries hold beside the tensors of a run at its peak.

    `unfilled_bytes`: room beside tensors that stay; `largest_bytes`: of the largest tensor that comes and goes, but for
    logits; `torn_logits_bytes`: of a step's logits where evaluations have others, so that both need room.
    """
    torn = USED_AGAIN * unfilled_bytes + MISFIT * largest_bytes + FRAGMENTS * tensor_bytes
    return WORKSPACE_BYTES + torn_logits_bytes + int(torn)
