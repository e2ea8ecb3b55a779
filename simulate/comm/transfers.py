"""Payload bytes and messages of collectives, in closed form; which of them a method makes is in costs/schedule.py.

Bytes are summed over all devices, so that they are whole numbers; divide by N for one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Operation = Literal["all_reduce", "all_gather", "all_to_all", "broadcast", "push", "pull"]

MESSAGE_BYTES = 16 * 2**20
"""Tensors travel packed into messages of at most this many bytes (or one tensor): few latencies, small buffers."""
WIRE_BLOCK = 128
"""Elements that share one fp32 scale in int8 and int4 messages."""


@dataclass(frozen=True)
class Transfer:
    """One message of a collective in each of `teams` groups of `devices`; `payload_bytes` is what one device
    contributes (broadcast: the first one; pull: what one device gets)."""

    operation: Operation
    payload_bytes: int
    devices: int
    teams: int = 1

    @property
    def sent_bytes(self) -> int:
        """Bytes that all devices together send.

        Ring all-reduce: 2(N−1)/N of the buffer each. Ring all-gather: N−1 contributions each. All-to-all: all parts but
        one's own. Broadcast: each link of a chain once. Push: the contribution. Pull: nothing, the server sends it.
        """
        others = self.devices - 1
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


@dataclass(frozen=True, eq=False)
class Exchange:
    """Messages that are made one after the other, and what they add up to over all devices."""

    transfers: tuple[Transfer, ...]

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that all devices together send."""
        return sum(transfer.sent_bytes for transfer in self.transfers)

    @cached_property
    def received_bytes(self) -> int:
        """Bytes that all devices together receive."""
        return sum(transfer.received_bytes for transfer in self.transfers)


def bucket(sizes_bytes: Sequence[int], cap_bytes: int = MESSAGE_BYTES) -> list[range]:
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


def bucket_bytes(sizes_bytes: Sequence[int]) -> list[int]:
    """Return the bytes of each message that items are packed into."""
    return [sum(sizes_bytes[i] for i in group) for group in bucket(sizes_bytes)]


def wire_bytes(elements: int, wire: str, element_bytes: int) -> int:
    """Bytes of `elements` numbers in a message: an fp32 scale for each block of int8 and int4, two int4 in a byte."""
    if wire == "full":
        return elements * element_bytes
    if wire in ("fp16", "bf16"):
        return 2 * elements
    scales = 4 * -(-elements // WIRE_BLOCK)
    return scales + (elements if wire == "int8" else (elements + 1) // 2)


def chunk_elements(elements: int, devices: int) -> int:
    """Elements of the part of a compressed mean that one device works out: an Nth, in whole blocks."""
    return WIRE_BLOCK * -(-elements // (devices * WIRE_BLOCK))


def residual_elements(elements: int, devices: int) -> int:
    """Return the error feedback of a compressed mean on one device: of what it sends, and of the part it averages."""
    return (devices + 1) * chunk_elements(elements, devices)


def mean_transfers(elements: int, devices: int, wire: str, element_bytes: int) -> tuple[Transfer, ...]:
    """Return the messages that average `elements` numbers over N devices.

    In full precision one all-reduce. Otherwise everyone sends each device the compressed part that it averages, and
    then gathers the compressed means (the two phases of 1-bit Adam's all-reduce, arXiv 2102.02888, section 4.3).
    """
    if wire == "full":
        return (Transfer("all_reduce", elements * element_bytes, devices),)
    part_bytes = wire_bytes(chunk_elements(elements, devices), wire, element_bytes)
    return (Transfer("all_to_all", devices * part_bytes, devices), Transfer("all_gather", part_bytes, devices))


def averages(tensors: Iterable[int], devices: int, wire: str, element_bytes: int) -> tuple[Transfer, ...]:
    """Return the messages that average tensors of the given element counts over all devices."""
    counts = list(tensors)
    groups = bucket([count * element_bytes for count in counts])
    sums = (sum(counts[i] for i in group) for group in groups)
    return tuple(t for elements in sums for t in mean_transfers(elements, devices, wire, element_bytes))


def fragment(items: int, fragments: int, index: int) -> range:
    """Return the consecutive items that the index-th of `fragments` nearly equal groups has."""
    return range(-(-items * index // fragments), -(-items * (index + 1) // fragments))


Transport = Literal["gather", "reduce", "server"]
Wire = Literal["full", "fp16", "bf16", "int8", "int4"]
"""How values travel; full: as they are. All others carry what they lost to the next message (error feedback)."""
SMALL_PART_BYTES = 128 * 1024
"""Up to here the delays of a ring's hops weigh more than what pairs lose."""


def sums_by_pairs(part_bytes: float) -> bool:
    """Whether gloo's devices reduce a buffer by pairs, an Nth of which has so many bytes."""
    return part_bytes <= SMALL_PART_BYTES


def gathers_by_pairs(part_bytes: float, devices: int) -> bool:
    """Whether gloo's devices gather equal contributions of so many bytes by pairs."""
    return devices == 2 or part_bytes <= SMALL_PART_BYTES
