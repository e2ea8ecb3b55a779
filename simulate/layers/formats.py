"""Names of the formats and options of layers, and the bytes of weights in each format; torch-free."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

ELEMENT_BYTES = {"fp32": 4, "fp64": 8}
"""Bytes of an element, by the run's dtype."""
PRODUCT_BYTES = {"bf16": 2, "fp16": 2}
"""Bytes of an element of matrix products, by `train.autocast`."""
Quantize = Literal["none", "bf16", "int8", "nf4", "nf4-double"]
"""Format of frozen weights."""
NF4_BLOCK = 64
"""Elements that share a scale."""
NF4_GROUP = 256
"""Scales of nf4-double that share a second-level scale."""
PACK_CHUNK_ELEMENTS = 2**16
"""Elements quantized at once, in fp32: whole blocks, and few, so that a merge needs little extra memory."""
PACKING_BYTES = {"none": 0, "bf16": 0, "int8": 4, "nf4": 8, "nf4-double": 8}
"""Bytes of scratch for each element of a chunk: its quotient by the scale, and for nf4 its code as int32."""
LOSS_CHUNK_ELEMENTS = 2**20
"""Logits that the loss converts at once: a few megabytes of scratch, whatever the batch."""
Norms = Literal["average", "one", "vector-lora", "none"]
"""Training of norms: by every device, averaged at merges; by the first for all; by low-rank pairs; not at all."""
Biases = Literal["average", "frozen"]
Convolutions = Literal["lora", "average"]
Draws = Literal["own", "joint", "columns", "slices"]
"""Draws of the heads' A: independent; with rows that are orthogonal between heads; with rows that pick one input each,
in the layers whose inputs all heads together cover: anywhere, or next to each other."""
PICKING = ("columns", "slices")
"""Draws whose A pick inputs."""


def layer_draws(draws: Draws, total_rank: int, inputs: int) -> Draws:
    """Return how the A of one layer are drawn: "columns" also where these are slices.

    `total_rank` is the sum of the ranks of all devices' heads.

    Weights of inputs that no head picks would not move until columns are picked anew, so a layer with more inputs than
    that gets joint draws, which see a part of every input.
    """
    if draws in PICKING:
        return "columns" if total_rank >= inputs else "joint"
    return draws


@lru_cache(maxsize=64)
def head_places(ranks: tuple[int, ...], inputs: int) -> tuple[tuple[int, int], ...]:
    """Return for heads of these ranks, in order, the orthogonal matrix that each takes its rows of, and its first row.

    A head starts where the one before it ends; one that goes beyond the I rows of a matrix begins the next one.
    """
    places, group, first = [], 0, 0
    for rank in ranks:
        if first + rank > inputs:
            group, first = group + 1, 0
        places.append((group, first))
        first += rank
    return tuple(places)


def quantized_bytes(elements: int, inputs: int, quantize: str, element_bytes: int) -> int:
    """Return the bytes of a frozen weight matrix.

    bf16: two bytes an element. int8: one byte, and an fp32 scale a row of `inputs` (1 + 4/I an element). nf4: half a
    byte, and an fp32 scale for each block of 64 (0.5625; Dettmers et al. 2023, arXiv 2305.14314). nf4-double: scales of
    one byte, and an fp32 second-level scale for each 256 of them (0.516).
    """
    if quantize == "none":
        return elements * element_bytes
    if quantize == "bf16":
        return 2 * elements
    if quantize == "int8":
        return elements + 4 * (elements // inputs)
    blocks = -(-elements // NF4_BLOCK)
    scales = 4 * blocks if quantize == "nf4" else blocks + 4 * -(-blocks // NF4_GROUP)
    return (elements + 1) // 2 + scales


def unpacking_bytes(elements: int, quantize: str, element_bytes: int) -> int:
    """Return the extra bytes of a frozen matrix while a product uses it: dequantized, and its decoded scales.

    Codes that end within a block are copied to whole blocks, beside which fp32 values are unpacked.
    """
    if quantize == "none":
        return 0
    # The library dequantizes nf4 to fp32, so fp64 needs both.
    is_nf4, blocks = quantize.startswith("nf4"), -(-elements // NF4_BLOCK)
    beside = 4 * elements if is_nf4 and element_bytes == 8 else 0
    if is_nf4 and elements % NF4_BLOCK:
        beside = max(beside, blocks * NF4_BLOCK // 2)
    return elements * element_bytes + beside + (4 * blocks if quantize == "nf4-double" else 0)


def packing_bytes(elements: int, inputs: int, quantize: str, element_bytes: int) -> int:
    """Return the bytes that quantizing a merged matrix takes: the matrix, the quantized one, and a chunk's scratch."""
    if quantize == "none":
        return 0
    chunk = PACKING_BYTES[quantize] * min(elements, PACK_CHUNK_ELEMENTS)
    parts = 2 if quantize.startswith("nf4") else 1  # nf4 makes chunks and then joins them
    return elements * element_bytes + parts * quantized_bytes(elements, inputs, quantize, element_bytes) + chunk
