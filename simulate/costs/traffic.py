"""Payload bytes and messages of each method, in closed form.

Letters: N devices, K heads per device, F elements of one head's factors, S adapted weights, E replicated parameters,
P all parameters. Bytes are summed over all devices, so that they are whole numbers; divide by N for one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from simulate.config import DdpOptions, LteOptions, Run, Transport
from simulate.models.shapes import ModelShape

Operation = Literal["all_reduce", "all_gather", "push", "pull"]

MESSAGE_BYTES = 16 * 2**20
"""Tensors travel packed into messages of at most this many bytes (or one tensor): few latencies, small buffers."""

ELEMENT_BYTES = {"fp32": 4, "fp64": 8}
QUANTIZED_BITS = {"int8": 8, "nf4": 4}


@dataclass(frozen=True)
class Transfer:
    """One message of a collective: `payload_bytes` is what one device contributes (pull: what one device gets)."""

    operation: Operation
    payload_bytes: int

    def sent_bytes(self, devices: int) -> int:
        """Bytes that all devices together send.

        Ring all-reduce: 2(N−1)/N of the buffer each. Ring all-gather: N−1 contributions each. Push: the contribution.
        Pull: nothing, the server sends it.
        """
        return {
            "all_reduce": 2 * (devices - 1) * self.payload_bytes,
            "all_gather": devices * (devices - 1) * self.payload_bytes,
            "push": devices * self.payload_bytes,
            "pull": 0,
        }[self.operation]

    def received_bytes(self, devices: int) -> int:
        """Bytes that all devices together receive."""
        if self.operation == "push":
            return 0
        return devices * self.payload_bytes if self.operation == "pull" else self.sent_bytes(devices)


@dataclass(frozen=True, eq=False)
class Exchange:
    """The messages of one round, and what they add up to over all devices."""

    transfers: tuple[Transfer, ...]
    devices: int

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that all devices together send."""
        return sum(transfer.sent_bytes(self.devices) for transfer in self.transfers)

    @cached_property
    def received_bytes(self) -> int:
        """Bytes that all devices together receive."""
        return sum(transfer.received_bytes(self.devices) for transfer in self.transfers)


def pack(sizes_bytes: Sequence[int], cap_bytes: int = MESSAGE_BYTES) -> list[range]:
    """Group consecutive items into messages of at most `cap_bytes`; an item larger than that travels alone."""
    groups: list[range] = []
    first, total = 0, 0
    for index, size in enumerate(sizes_bytes):
        if index > first and total + size > cap_bytes:
            groups.append(range(first, index))
            first, total = index, 0
        total += size
    if sizes_bytes:
        groups.append(range(first, len(sizes_bytes)))
    return groups


def quantized_bytes(elements: int, inputs: int, quantize: str, element_bytes: int) -> int:
    """Bytes of a frozen weight matrix.

    int8: one byte, and an fp32 scale a row of `inputs` (1 + 4/I a parameter); nf4: half a byte, and an fp32 scale for
    each block of 64 (0.5625 a parameter; Dettmers et al. 2023, arXiv 2305.14314, without double quantisation).
    """
    if quantize == "none":
        return elements * element_bytes
    if quantize == "int8":
        return elements + 4 * (elements // inputs)
    return (elements + 1) // 2 + 4 * -(-elements // 64)


@lru_cache(maxsize=256)
def frozen_bytes(shape: ModelShape, quantize: str, element_bytes: int) -> int:
    """Bytes of all adapted weights in their frozen format."""
    return sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) * x.count for x in shape.adapted)


@lru_cache(maxsize=4096)
def lte_merge_sizes(
    shape: ModelShape, rank: int, heads_per_device: int, quantize: str, transport: Transport, element_bytes: int
) -> tuple[tuple[int, int], ...]:
    """Return (contributed, pulled) bytes of one device for each adapted layer of the network, in order."""
    sizes = []
    for linear in shape.in_order():
        factors = heads_per_device * linear.factors(rank) * element_bytes
        dense = linear.weights * element_bytes
        pulled = quantized_bytes(linear.weights, linear.in_features, quantize, element_bytes)
        sizes.append((dense, 0) if transport == "reduce" else (factors, pulled if transport == "server" else 0))
    return tuple(sizes)


def lte_merge_groups(
    shape: ModelShape, devices: int, rank: int, heads_per_device: int, quantize: str, transport: Transport,
    element_bytes: int,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """Return (contributed, pulled) bytes of one device for each message of a merge's adapted layers."""
    sizes = lte_merge_sizes(shape, rank, heads_per_device, quantize, transport, element_bytes)
    return tuple(
        (sum(sizes[i][0] for i in group), sum(sizes[i][1] for i in group))
        for group in pack(lte_buffer_sizes(sizes, devices, transport))
    )


def lte_buffer_sizes(sizes: Sequence[tuple[int, int]], devices: int, transport: Transport) -> list[int]:
    """Bytes that one device must buffer for each layer while it travels: a gather brings everyone's factors."""
    return [sent * (devices if transport == "gather" else 1) + pulled for sent, pulled in sizes]


def replicated_groups(tensors: tuple[int, ...], element_bytes: int) -> list[int]:
    """Bytes of each message in which replicated (or dense) tensors travel."""
    sizes = [count * element_bytes for count in tensors]
    return [sum(sizes[i] for i in group) for group in pack(sizes)]


@lru_cache(maxsize=8192)
def _lte_round(
    shape: ModelShape, devices: int, rank: int, heads_per_device: int, quantize: str, transport: Transport,
    element_bytes: int,
) -> Exchange:  # fmt: skip
    transfers: list[Transfer] = []
    groups = lte_merge_groups(shape, devices, rank, heads_per_device, quantize, transport, element_bytes)
    replicated = replicated_groups(shape.replicated_tensors, element_bytes)
    if transport == "server":
        for push_bytes, pull_bytes in (*groups, *((size, size) for size in replicated)):
            transfers += [Transfer("push", push_bytes), Transfer("pull", pull_bytes)]
        return Exchange(tuple(transfers), devices)
    operation: Operation = "all_gather" if transport == "gather" else "all_reduce"
    adapted = (Transfer(operation, size) for size, _ in groups)
    return Exchange((*adapted, *(Transfer("all_reduce", size) for size in replicated)), devices)


@lru_cache(maxsize=64)
def dense_reduction(shape: ModelShape, devices: int, element_bytes: int) -> Exchange:
    """Return the messages that sum one dense tensor per parameter over all devices."""
    sizes = replicated_groups(shape.dense_tensors, element_bytes)
    return Exchange(tuple(Transfer("all_reduce", size) for size in sizes), devices)


def round_exchange(run: Run, shape: ModelShape) -> Exchange:
    """Return the messages of one round: of a merge for lte, of a step for ddp. One device alone sends nothing."""
    if run.cluster.devices == 1:
        return _NOTHING
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    if isinstance(run.method, DdpOptions):
        return dense_reduction(shape, run.cluster.devices, element_bytes)
    method: LteOptions = run.method
    return _lte_round(
        shape, run.cluster.devices, method.rank, method.heads_per_device, method.quantize, method.merge_transport,
        element_bytes,
    )  # fmt: skip


_NOTHING = Exchange((), 1)


def num_rounds(run: Run) -> int:
    """Return how often a whole run communicates; the last round may be shorter, its merge is still made."""
    merge_every = run.method.merge_every if isinstance(run.method, LteOptions) else 1
    return -(-run.train.steps // merge_every)
