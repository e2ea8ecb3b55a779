"""Decide how a merge's tensors travel; methods and costs share these decisions, so planned bytes are sent bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulate.comm.transfers import bucket
from simulate.models.shapes import LinearShape, ParameterShape


def gather_groups(sizes_bytes: Sequence[int], devices: int) -> list[range]:
    """Group gathered items into messages, by the size that all devices' parts have together."""
    # A gathered message holds all devices' parts at once, so the limit on messages applies to their sum.
    return bucket([size * devices for size in sizes_bytes])


def layer_transport(linear: LinearShape, held_rank: int, devices: int, transport: str, frozen_a: bool) -> str:
    """Return how a layer's merge travels: as set, or for auto the way that sends fewer bytes in full precision.

    All devices together send N·(N−1)·F elements to gather factors, and 2·(N−1)·O·I to reduce the delta. Both sides of
    the comparison below are divided by N−1.
    """
    if transport != "auto":
        return transport
    return "gather" if devices * linear.factors(held_rank, frozen_a) <= 2 * linear.weights else "reduce"


def is_averaged(tensor: ParameterShape, norms: str, biases: str) -> bool:
    """Whether every device trains its own copy of a parameter without adapters, so that merges average it."""
    if tensor.kind == "norm":  # the keys method.norms and method.biases decide for their kinds
        return norms in ("average", "vector-lora")
    return tensor.kind != "bias" or biases == "average"


def factor_buffer_bytes(
    layers: Iterable[LinearShape], devices: int, held_rank: int, transport: str, element_bytes: int, frozen_a: bool
) -> list[int]:
    """Return one device's buffer bytes by layer: all devices' factors; with a server, its own and the new weights."""
    return [
        x.factors(held_rank, frozen_a) * element_bytes * (1 if transport == "server" else devices)
        + (x.weights * element_bytes if transport == "server" else 0)
        for x in layers
    ]
