"""How devices exchange tensors, and what that costs in payload bytes.

Tensors of several devices carry a leading axis in global device order. The counter here works from the tensors that
really travel; simulate.costs.traffic works from the model's shape. A test holds one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from simulate.costs.traffic import Operation


@dataclass
class ByteCounter:
    """Payload bytes so far, summed over all devices."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0

    def add(self, sent_bytes: int, received_bytes: int) -> None:
        """Count one message of a collective."""
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes
        self.messages += 1


class Communicator(Protocol):
    """What a method may do between devices; every call packs its tensors into one message."""

    num_devices: int
    local_devices: range
    counter: ByteCounter

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Turn sums over the local devices into sums over all devices, in place."""

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor, (local devices or heads, ...), with every device's part in global order."""

    def push(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send the local devices' tensors to the server; it gets every device's part in global order."""

    def pull(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor, (...) without a device axis, with the server's."""


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class VirtualCommunicator:
    """All N devices live in this process: nothing moves, everything is counted as if it had.

    `on_transfer(operation, payload_bytes)` is told of each message, payload of one device: the clock listens there.
    """

    def __init__(self, num_devices: int, on_transfer: Callable[[Operation, int], None] | None = None) -> None:
        self.num_devices = num_devices
        self.local_devices = range(num_devices)
        self.counter = ByteCounter()
        self.on_transfer = on_transfer

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        payload = _bytes(sums)
        # A ring reduces and then gathers: every byte of the buffer crosses N−1 links twice.
        crossings = 2 * (self.num_devices - 1) * payload
        self._count("all_reduce", payload, crossings, crossings)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total = _bytes(tensors)  # of all devices: each device's share crosses N−1 links
        crossings = (self.num_devices - 1) * total
        self._count("all_gather", total // self.num_devices, crossings, crossings)
        return list(tensors)

    def push(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total = _bytes(tensors)
        self._count("push", total // self.num_devices, total, 0)
        return list(tensors)

    def pull(self, tensors: Sequence[Tensor]) -> None:
        payload = _bytes(tensors)
        self._count("pull", payload, 0, self.num_devices * payload)

    def _count(self, operation: Operation, payload_bytes: int, sent_bytes: int, received_bytes: int) -> None:
        if self.num_devices == 1:
            return
        self.counter.add(sent_bytes, received_bytes)
        if self.on_transfer is not None:
            self.on_transfer(operation, payload_bytes)
