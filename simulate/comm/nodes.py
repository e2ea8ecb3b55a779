"""Exchanges between nodes, each of which takes part as one device does; methods whose nodes train as one merge by them.

The first device of each node exchanges with the others' first devices, over the links between nodes; what it receives
it copies to its node's other devices, over the node's own links. All devices of a node hold equal tensors before and
after. Bytes of both are counted by the communicator between all devices, as if each device were a process.

Legend: L local nodes, M nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simulate.comm.base import Communicator, Exchanges, Nodes
from simulate.comm.transfers import Operation
from simulate.comm.virtual import VirtualCommunicator


class NodeExchanges(Exchanges):
    """Collectives between M nodes; with one node there is nobody to exchange with, and nothing is sent."""

    def __init__(self, inner: Communicator, nodes: Nodes) -> None:
        local, size = inner.local_devices, nodes.size
        self.inner, self.nodes, self.num_devices = inner, nodes, nodes.count
        self.local_devices = range(local.start // size, -(-local.stop // size))
        inner.arrange(nodes)
        # A lone node has all that there is: what it exchanges comes back as it is.
        self.leaders = inner.leaders(nodes) if nodes.count > 1 else VirtualCommunicator(1)

    def on_complete(self, compute: Callable[[], None]) -> None:
        self.inner.on_complete(compute)

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        if self.leaders is not None:
            self.leaders._all_reduce(sums)
        self._copy_in_nodes(sums, _num_bytes(sums))

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        nodes = self.num_devices // len(self.local_devices)
        if self.leaders is None:
            gathered = [tensor.new_empty(nodes * tensor.shape[0], *tensor.shape[1:]) for tensor in tensors]
        else:
            gathered = self.leaders._all_gather(tensors)  # in the background it is filled on arrival
        self._copy_in_nodes(gathered, nodes * _num_bytes(tensors))
        return gathered

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        received = [torch.empty_like(t) for t in tensors] if self.leaders is None else self.leaders._all_to_all(tensors)
        self._copy_in_nodes(received, _num_bytes(tensors) // len(self.local_devices))
        return received

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        if self.leaders is not None:
            self.leaders._broadcast(tensors, source)
        self._copy_in_nodes(tensors, _num_bytes(tensors))

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None:
        return None if self.leaders is None else self.leaders._push(tensors, active)

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        if self.leaders is not None:
            self.leaders._pull(tensors)
        self._copy_in_nodes(tensors, _num_bytes(tensors))

    def _copy_in_nodes(self, tensors: Sequence[Tensor], payload_bytes: int) -> None:
        """Copy what a node's first device has, or will have received, to the node's other devices."""
        if self.nodes.count == 1:
            return
        crossings = self.nodes.count * (self.nodes.size - 1) * payload_bytes
        self.inner._count("broadcast", payload_bytes, crossings, crossings, self.nodes.size, self.nodes.count)
        self.inner._broadcast_in_nodes(tensors, self.nodes)

    def _count(
        self, operation: Operation, payload_bytes: int, sent_bytes: int, received_bytes: int,
        devices: int | None = None, teams: int = 1,
    ) -> None:  # fmt: skip
        if self.nodes.count > 1:
            others = self.num_devices if devices is None else devices
            self.inner._count(operation, payload_bytes, sent_bytes, received_bytes, others, teams)


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
