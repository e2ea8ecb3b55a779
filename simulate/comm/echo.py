"""One device of N whose peers echo it: exchanges take their real room without a peer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulate.comm.base import Communicator, Nodes


class EchoCommunicator(Communicator):
    """One device of N, whose peers are echoes of itself: buffers have their real sizes, the numbers mean nothing."""

    def __init__(self, num_devices: int) -> None:
        super().__init__(num_devices, range(1))

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        return values_LX.detach().cpu().expand(self.num_devices, -1)

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        self._pack(sums)

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.num_devices == 1:
            return list(tensors)
        return [tensor.repeat(self.num_devices, *(1,) * (tensor.ndim - 1)) for tensor in tensors]

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        self._pack(tensors)

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> None:
        self._pack(tensors)  # the server, and its memory, are elsewhere

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        self._pack(tensors)

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(sums)

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(sums)

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        self._pack(tensors)

    def _pack(self, tensors: Sequence[Tensor]) -> None:
        """Allocate and free the message that the tensors would travel in."""
        if self.num_devices > 1:
            mixed = len({tensor.dtype for tensor in tensors}) > 1
            torch.cat([tensor.flatten().view(torch.uint8) if mixed else tensor.flatten() for tensor in tensors])
