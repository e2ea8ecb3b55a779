"""How a merge's tensors travel; the program and its forecast decide it alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulate.comm.transfers import bucket
from simulate.models.shapes import LinearShape, ParameterShape


def gather_groups(sizes_bytes: Sequence[int], devices: int) -> list[range]:
    """Group items that are gathered into messages, whose size is that of everyone's parts together."""
    return bucket([size * devices for size in sizes_bytes])


def layer_transport(linear: LinearShape, held_rank: int, devices: int, transport: str, frozen_a: bool) -> str:
    """Return how a layer's merge travels: what is set, or for auto what sends fewer bytes in full precision.

    N·(N−1)·F of all gathered factors against 2·(N−1)·O·I of a reduced delta.
    """
    if transport != "auto":
        return transport
    return "gather" if devices * linear.factors(held_rank, frozen_a) <= 2 * linear.weights else "reduce"


def is_averaged(tensor: ParameterShape, norms: str, biases: str) -> bool:
    """Whether every device trains its own copy of a parameter beside adapters, so that merges average it."""
    if tensor.kind == "norm":
        return norms in ("average", "vector-lora")
    return tensor.kind != "bias" or biases == "average"


def factor_buffer_bytes(
    layers: Iterable[LinearShape], devices: int, held_rank: int, transport: str, element_bytes: int, frozen_a: bool
) -> list[int]:
    """Bytes that one device buffers for each layer while it travels: everyone's factors, or the weights that return."""
    return [
        x.factors(held_rank, frozen_a) * element_bytes * (1 if transport == "server" else devices)
        + (x.weights * element_bytes if transport == "server" else 0)
        for x in layers
    ]
