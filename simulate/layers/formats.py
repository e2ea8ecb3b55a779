"""Formats of weights and how many bytes they take; torch-free."""

from __future__ import annotations

from typing import Literal

ELEMENT_BYTES = {"fp32": 4, "fp64": 8}
PRODUCT_BYTES = {"bf16": 2, "fp16": 2}
"""Of an element as autocast has it."""
Quantize = Literal["none", "bf16", "int8", "nf4", "nf4-double"]
"""Formats of frozen weights."""
NF4_BLOCK = 64
"""Elements that share a scale."""
NF4_GROUP = 256
"""Scales of nf4-double that share a scale of their own."""
PACK_CHUNK_ELEMENTS = 2**16
"""What is packed at once, in fp32: whole blocks, so that a merge needs little room beside the weight."""
PACKING_BYTES = {"none": 0, "bf16": 0, "int8": 4, "nf4": 8, "nf4-double": 8}
"""An element of a chunk while it is packed: over its scale; for nf4 as a code, too."""
LOSS_CHUNK_ELEMENTS = 2**20
"""Logits that the loss works on at once: a few megabytes of scratch, whatever the batch."""
Norms = Literal["average", "one", "vector-lora", "none"]
Biases = Literal["average", "frozen"]
Convolutions = Literal["lora", "average"]
Draws = Literal["own", "joint"]
"""How the A of different heads are drawn: independently, or with rows that are orthogonal to one another's."""


def quantized_bytes(elements: int, inputs: int, quantize: str, element_bytes: int) -> int:
    """Bytes of a frozen weight matrix.

    bf16: two bytes. int8: one byte, and an fp32 scale a row of `inputs` (1 + 4/I a parameter). nf4: half a byte, and an
    fp32 scale for each block of 64 (0.5625 a parameter; Dettmers et al. 2023, arXiv 2305.14314); nf4-double: scales of
    a byte, with an fp32 top for each 256 of them (0.516).
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
    """Bytes of a frozen matrix while a product uses it: as it is, unpacked (nf4 by way of fp32), and its scales."""
    if quantize == "none":
        return 0
    by_way_of = 4 if quantize.startswith("nf4") and element_bytes == 8 else 0
    unpacked = elements * (element_bytes + by_way_of)
    return unpacked + (4 * -(-elements // NF4_BLOCK) if quantize == "nf4-double" else 0)


def packing_bytes(elements: int, inputs: int, quantize: str, element_bytes: int) -> int:
    """Bytes of a merged matrix while it is packed: as it is, the packed form, its parts, and what a chunk needs."""
    if quantize == "none":
        return 0
    chunk = PACKING_BYTES[quantize] * min(elements, PACK_CHUNK_ELEMENTS)
    parts = 2 if quantize.startswith("nf4") else 1  # chunks, and all of them in one
    return elements * element_bytes + parts * quantized_bytes(elements, inputs, quantize, element_bytes) + chunk
