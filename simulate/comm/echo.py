"""Communicator of one device without peers, for measuring a device's memory and time in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulate.comm.base import Communicator, Nodes, Part


class EchoCommunicator(Communicator):
    """One device of N, whose peers send its own data back: buffers have their real sizes, sums are wrong."""

    def __init__(self, num_devices: int, device: int = 0) -> None:
        super().__init__(num_devices, range(device, device + 1))

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        return values_LX.detach().cpu().expand(self.num_devices, -1)

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._fill_buffer(sums)

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.num_devices == 1:
            return list(tensors)
        # The device's own part stands for every peer's: only sizes matter here.
        return [tensor.repeat(self.num_devices, *(1,) * (tensor.ndim - 1)) for tensor in tensors]

    def _all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
        self._fill_buffer(tensors)
        rows = [[(len(p.devices) * p.shapes[i][0], *p.shapes[i][1:]) for p in parts] for i in range(len(tensors))]
        return [[t.new_zeros(shape) for shape in shapes] for t, shapes in zip(tensors, rows, strict=True)]

    def _push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> None:
        self._fill_buffer(tensors)

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        self._fill_buffer(tensors)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> None:
        self._fill_buffer(tensors)  # the server's own memory belongs to another device

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._fill_buffer(tensors)

    def leaders(self, nodes: Nodes) -> EchoCommunicator:
        return EchoCommunicator(nodes.count)

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._fill_buffer(sums)

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._fill_buffer(sums)

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        self._fill_buffer(tensors)

    def _fill_buffer(self, tensors: Sequence[Tensor]) -> None:
        """Pack the tensors into a message buffer and free it, as a real exchange does."""
        if self.num_devices > 1:
            mixed = len({tensor.dtype for tensor in tensors}) > 1
            torch.cat([tensor.flatten().view(torch.uint8) if mixed else tensor.flatten() for tensor in tensors])
