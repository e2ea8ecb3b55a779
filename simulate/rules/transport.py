"""Decide how a merge's tensors travel; methods and costs share these decisions, so planned bytes are sent bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulate.comm.transfers import bucket
from simulate.models.shapes import LinearShape, ParameterShape


def gather_groups(sizes_bytes: Sequence[int], devices: int) -> list[range]:
    """Group gathered items into messages, by the size that all devices' parts have together."""
    # A gathered message holds all devices' parts at once, so the limit on messages applies to their sum.
    return bucket([size * devices for size in sizes_bytes])


def layer_transport(linear: LinearShape, total_rank: int, transport: str, frozen_a: bool) -> str:
    """Return how a layer's merge travels: as set, or for auto the way that sends fewer bytes in full precision.

    All devices together send (N−1)·Σ_n F_n elements to gather factors, and 2·(N−1)·O·I to reduce the delta. Both sides
    of the comparison below are divided by N−1. `total_rank` is the sum of the ranks of all devices' heads.
    """
    if transport != "auto":
        return transport
    return "gather" if linear.factors(total_rank, frozen_a) <= 2 * linear.weights else "reduce"


def is_averaged(tensor: ParameterShape, norms: str, biases: str) -> bool:
    """Whether every device trains its own copy of a parameter without adapters, so that merges average it."""
    if tensor.kind == "norm":  # the keys method.norms and method.biases decide for their kinds
        return norms in ("average", "vector-lora")
    return tensor.kind != "bias" or biases == "average"


def factor_buffer_bytes(
    layers: Iterable[LinearShape], total_rank: int, held_rank: int, transport: str, element_bytes: int, frozen_a: bool
) -> list[int]:
    """Return one device's buffer bytes by layer: all devices' factors; with a server, its own and the new weights.

    `held_rank` is of the device that holds most, so that all devices group layers alike.
    """
    return [
        x.factors(held_rank if transport == "server" else total_rank, frozen_a) * element_bytes
        + (x.weights * element_bytes if transport == "server" else 0)
        for x in layers
    ]
