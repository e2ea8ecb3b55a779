"""Payload bytes and messages of collectives, in closed form; torch-free.

The planner prices messages that nobody has sent yet: the methods' plan.py and simulate.costs.message_schedule list them
with these functions, and communicators report each one that they send as a Transfer. Sent and received bytes are summed
over all devices, so that they are whole numbers; payload_bytes are one device's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

Operation = Literal["all_reduce", "all_gather", "all_to_all", "broadcast", "push", "pull"]

MESSAGE_BYTES = 16 * 2**20
"""Largest message into which several tensors are packed: large enough for few latencies, small enough for buffers."""
WIRE_BLOCK = 128
"""Elements that share one scale in int8, int4 and int2 messages."""
SPARSE_RUN, INDEX_BITS = 4096, 12
"""Entries of which a sparse mean takes its share of the largest, and bits of a position among them."""
WIRE_BITS = {"int8": 8, "int4": 4, "int2": 2}
"""Bits of a number in messages of whole numbers."""


@dataclass(frozen=True)
class Transfer:
    """One message of a collective, made in each of `teams` groups at once."""

    operation: Operation
    payload_bytes: int
    """Bytes that one device contributes (broadcast: the first device; pull: bytes that one device receives)."""
    devices: int
    """Devices of one group."""
    teams: int = 1
    """Number of groups."""
    uneven: tuple[tuple[int, int], ...] = ()
    """Where devices contribute unequal bytes: numbers of devices, and the bytes of each; payload_bytes are the most."""
    averaged: tuple[int, str] | None = field(default=None, compare=False)
    """Numbers of a compressed mean and their format, where this is one of its two messages: chunks are for each of the
    devices that take part."""

    @classmethod
    def of_parts(cls, operation: Literal["all_gather", "push"], parts: Sequence[tuple[int, int]]) -> Transfer:
        """Return a message of parts: so many devices that contribute so many bytes each."""
        most, is_even = max(size for _, size in parts), len({size for _, size in parts}) == 1
        return cls(operation, most, sum(count for count, _ in parts), uneven=() if is_even else tuple(parts))

    def among(self, present_N: Sequence[bool]) -> Transfer:
        """Return a message of all devices, in one group, as it is among those that are present, at least one."""
        devices = sum(present_N)
        if self.uneven:
            parts, first = [], 0
            for count, size in self.uneven:
                parts.append((sum(present_N[first : first + count]), size))
                first += count
            assert self.operation in ("all_gather", "push")
            return Transfer.of_parts(self.operation, [part for part in parts if part[0]])
        if self.averaged is None:
            return replace(self, devices=devices)
        transfers = mean_transfers(self.averaged[0], devices, self.averaged[1], 0)
        return next(transfer for transfer in transfers if transfer.operation == self.operation)

    @property
    def together_bytes(self) -> int:
        """Bytes that all devices of a group contribute together."""
        if self.uneven:
            return sum(count * size for count, size in self.uneven)
        return self.devices * self.payload_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes that all devices together send.

        Ring all-reduce: each device sends 2(N−1)/N of the buffer. Ring all-gather: N−1 contributions. All-to-all: all
        parts but its own. Broadcast: N−1 links of a chain, once each. Push: its contribution. Pull: nothing, since the
        server sends.
        """
        others = self.devices - 1
        if self.uneven:
            return (others if self.operation == "all_gather" else 1) * self.together_bytes
        crossings = {
            "all_reduce": 2 * others,
            "all_gather": self.devices * others,
            "all_to_all": others,
            "broadcast": others,
            "push": self.devices,
            "pull": 0,
        }[self.operation]
        return self.teams * crossings * self.payload_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes that all devices together receive."""
        if self.operation == "push":
            return 0
        return self.devices * self.payload_bytes if self.operation == "pull" else self.sent_bytes


def copied_in_nodes(transfers: Iterable[Transfer], size: int) -> tuple[Transfer, ...]:
    """Return messages between nodes, each followed by the copy of its result to the others of a node's devices."""
    if size == 1:
        return tuple(transfers)
    messages: list[Transfer] = []
    for transfer in transfers:
        messages.append(transfer)
        if transfer.operation != "push":  # which the server alone receives
            gathered = transfer.devices if transfer.operation == "all_gather" else 1
            messages.append(Transfer("broadcast", gathered * transfer.payload_bytes, size, transfer.devices))
    return tuple(messages)


@dataclass(frozen=True, eq=False)
class Exchange:
    """Messages that are made one after the other, and their sums of bytes over all devices."""

    transfers: tuple[Transfer, ...]

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that all devices together send."""
        return sum([transfer.sent_bytes for transfer in self.transfers])

    @cached_property
    def received_bytes(self) -> int:
        """Bytes that all devices together receive."""
        return sum([transfer.received_bytes for transfer in self.transfers])


def bucket(sizes_bytes: Sequence[int], cap_bytes: int = MESSAGE_BYTES) -> list[range]:
    """Group consecutive items into messages of at most `cap_bytes`; a larger item is a message of its own."""
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


def bucket_bytes(sizes_bytes: Sequence[int]) -> list[int]:
    """Return the bytes of each message that items are packed into."""
    return [sum(sizes_bytes[group.start : group.stop]) for group in bucket(sizes_bytes)]


@lru_cache(maxsize=8192)
def wire_bytes(elements: int, wire: str, element_bytes: int) -> int:
    """Return the bytes of numbers in a message.

    int8 and int4 add an fp32 scale a block, int2 a bf16 one; int4 packs two numbers in a byte, int2 four.
    """
    if wire == "full":
        return elements * element_bytes
    if wire in ("fp16", "bf16"):
        return 2 * elements
    return scales_bytes(elements, wire) + -(-elements * WIRE_BITS[wire] // 8)


def scales_bytes(elements: int, wire: str) -> int:
    """Return the bytes of the scales of a message of whole numbers: one a block, the last block rounded up."""
    return (2 if wire == "int2" else 4) * -(-elements // WIRE_BLOCK)


def chunk_elements(elements: int, devices: int) -> int:
    """Return the elements of the chunk of a compressed mean that one device averages: an Nth, rounded up to blocks."""
    return WIRE_BLOCK * -(-elements // (devices * WIRE_BLOCK))


def residual_elements(elements: int, devices: int) -> int:
    """Return the elements of error feedback that one device keeps: N chunks that it sends, one that it averages."""
    return (devices + 1) * chunk_elements(elements, devices)


def filled_elements(elements: int, devices: int, fewest: int) -> int:
    """Return the elements of error feedback that one device keeps where merges may lack devices: its vector's, with the
    most that whole chunks of `fewest` to all devices add to it.
    """
    return max(count * chunk_elements(elements, count) for count in range(fewest, devices + 1))


def mean_transfers(elements: int, devices: int, wire: str, element_bytes: int) -> tuple[Transfer, ...]:
    """Return the messages that average `elements` numbers over N devices.

    In full precision this is one all-reduce. Otherwise each device sends every other the compressed chunk that the
    other averages, and then gathers the compressed means (the two phases of 1-bit Adam's all-reduce, arXiv 2102.02888,
    section 4.3).
    """
    if wire == "full":
        return (Transfer("all_reduce", elements * element_bytes, devices),)
    # Each chunk is compressed by itself, so scales are counted per chunk.
    part_bytes = wire_bytes(chunk_elements(elements, devices), wire, element_bytes)
    averaged = (elements, wire)
    return (
        Transfer("all_to_all", devices * part_bytes, devices, averaged=averaged),
        Transfer("all_gather", part_bytes, devices, averaged=averaged),
    )


@dataclass(frozen=True)
class Sparsity:
    """The entries of a vector that travel in a sparse mean."""

    density: float
    """Share of the entries of every SPARSE_RUN, rounded up."""
    decay: float
    """Factor, at each mean, of what has not travelled yet."""

    def kept(self, elements: int) -> int:
        """Return how many of a vector's entries travel."""
        whole, rest = divmod(elements, SPARSE_RUN)
        return whole * math.ceil(self.density * SPARSE_RUN) + math.ceil(self.density * rest)


def positions_bytes(kept: int) -> int:
    """Return the bytes of the positions of entries in a sparse mean's message."""
    return -(-kept * INDEX_BITS // 8)


def sparse_mean_transfer(elements: int, devices: int, sparsity: Sparsity, wire: str, element_bytes: int) -> Transfer:
    """Return the message that averages the largest of `elements` numbers over N devices."""
    kept = sparsity.kept(elements)
    return Transfer("all_gather", positions_bytes(kept) + wire_bytes(kept, wire, element_bytes), devices)


def averages(tensors: Iterable[int], devices: int, wire: str, element_bytes: int) -> tuple[Transfer, ...]:
    """Return the messages that average tensors of the given element counts over all devices."""
    # Methods average bucket by bucket, so bytes are planned in the same buckets.
    counts = list(tensors)
    groups = bucket([count * element_bytes for count in counts])
    sums = [sum(counts[group.start : group.stop]) for group in groups]
    return tuple(t for elements in sums for t in mean_transfers(elements, devices, wire, element_bytes))


def fragment(items: int, fragments: int, index: int) -> range:
    """Return the consecutive items of group `index` of `fragments` nearly equal groups."""
    return range(-(-items * index // fragments), -(-items * (index + 1) // fragments))


def devices_of(process: int, processes: int, devices: int) -> range:
    """Return the consecutive devices that a process holds; sizes differ by at most one between processes."""
    return range(devices * process // processes, devices * (process + 1) // processes)


Transport = Literal["gather", "reduce", "server"]
Wire = Literal["full", "fp16", "bf16", "int8", "int4", "int2"]
"""Format of values in messages; "full" keeps the run's dtype, and all others need error feedback."""
SMALL_PART_BYTES = 128 * 1024
"""Largest part that gloo's devices send faster by pairs: above it, parts disturb each other more than hops delay."""


def sums_by_pairs(part_bytes: float) -> bool:
    """Whether gloo's devices reduce a buffer by pairs; `part_bytes` is an Nth of the buffer."""
    return part_bytes <= SMALL_PART_BYTES


def gathers_by_pairs(part_bytes: float, devices: int) -> bool:
    """Whether gloo's devices gather equal contributions of `part_bytes` by pairs."""
    return devices == 2 or part_bytes <= SMALL_PART_BYTES
