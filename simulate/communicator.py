"""How devices exchange tensors, and what that costs in payload bytes.

Tensors of several devices carry a leading axis in global device order. The counter here works from the tensors that
really travel; simulate.costs works from the model's shape. A test holds one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from simulate.costs.traffic import Operation, Transfer


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


@dataclass(frozen=True)
class Nodes:
    """Devices grouped into nodes of equal size, in global device order."""

    size: int
    count: int


class Communicator(Protocol):
    """What a method may do between devices; every call packs its tensors into one message."""

    num_devices: int
    local_devices: range
    counter: ByteCounter

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        """Turn sums over the local devices into sums over all devices, in place."""

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor, (local devices or heads, ...), with every device's part in global order."""

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Turn (L, N, ...), a part for each receiver, into (L, N, ...), a part from each sender."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor, (...) without a device axis, with the first device's."""

    def push(self, tensors: Sequence[Tensor], devices: int | None = None) -> list[Tensor]:
        """Send the local devices' tensors to the server; it gets every device's part in global order.

        Where only some take part, `devices` is their number over all processes.
        """

    def pull(self, tensors: Sequence[Tensor], devices: int | None = None) -> None:
        """Overwrite each tensor, (...) without a device axis, with the server's."""

    def reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn (local nodes, ...), sums over a node's local devices, into sums over all of its devices, in place."""

    def reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        """Turn sums over the local nodes into sums over all nodes, in place: one device of each node takes part."""

    def broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        """Give all devices of a node what its first one got from `reduce_over_nodes`."""

    @contextmanager
    def background(self) -> Iterator[None]:
        """Messages made inside travel while training goes on, until `wait`."""
        yield

    def wait(self) -> None:
        """Wait for what travels in the background."""


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class VirtualCommunicator:
    """All N devices live in this process: nothing moves, everything is counted as if it had.

    `on_transfer(transfer, background)` is told of each message and `on_wait()` of each wait: the clock listens there.
    """

    def __init__(
        self,
        num_devices: int,
        on_transfer: Callable[[Transfer, bool], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.num_devices = num_devices
        self.local_devices = range(num_devices)
        self.counter = ByteCounter()
        self.on_transfer, self.on_wait = on_transfer, on_wait
        self._background = False

    def all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._count_reduction(_bytes(sums), self.num_devices)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total = _bytes(tensors)  # of all devices: each device's share crosses N−1 links
        crossings = (self.num_devices - 1) * total
        self._count("all_gather", total // self.num_devices, crossings, crossings)
        return list(tensors)

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total = _bytes(tensors)  # of all devices: an Nth of it stays where it is
        crossings = total // self.num_devices * (self.num_devices - 1)
        self._count("all_to_all", total // self.num_devices, crossings, crossings)
        return [tensor.transpose(0, 1) for tensor in tensors]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        payload = _bytes(tensors)
        crossings = (self.num_devices - 1) * payload
        self._count("broadcast", payload, crossings, crossings)

    def push(self, tensors: Sequence[Tensor], devices: int | None = None) -> list[Tensor]:
        devices, total = devices or self.num_devices, _bytes(tensors)
        self._count("push", total // devices, total, 0, devices)
        return list(tensors)

    def pull(self, tensors: Sequence[Tensor], devices: int | None = None) -> None:
        devices, payload = devices or self.num_devices, _bytes(tensors)
        self._count("pull", payload, 0, devices * payload, devices)

    def reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._count_reduction(_bytes(sums) // nodes.count, nodes.size, nodes.count)

    def reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._count_reduction(_bytes(sums), nodes.count)

    def broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        payload = _bytes(tensors)
        crossings = nodes.count * (nodes.size - 1) * payload
        self._count("broadcast", payload, crossings, crossings, nodes.size, nodes.count)

    @contextmanager
    def background(self) -> Iterator[None]:
        """Let messages made inside travel while training goes on."""
        self._background = True
        try:
            yield
        finally:
            self._background = False

    def wait(self) -> None:
        """Wait for what travels in the background."""
        if self.on_wait is not None:
            self.on_wait()

    def _count_reduction(self, payload_bytes: int, devices: int, teams: int = 1) -> None:
        # A ring reduces and then gathers: every byte of the buffer crosses N−1 links twice.
        crossings = teams * 2 * (devices - 1) * payload_bytes
        self._count("all_reduce", payload_bytes, crossings, crossings, devices, teams)

    def _count(
        self,
        operation: Operation,
        payload_bytes: int,
        sent_bytes: int,
        received_bytes: int,
        devices: int | None = None,
        teams: int = 1,
    ) -> None:
        if devices is None:
            devices = self.num_devices
        if self.num_devices == 1 or (devices == 1 and operation not in ("push", "pull")):
            return
        self.counter.add(sent_bytes, received_bytes)
        if self.on_transfer is not None:
            self.on_transfer(Transfer(operation, payload_bytes, devices, teams), self._background)
