"""Communicator of the simulation: all devices live in one process, so that exchanges are counted but move nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from simulate.comm.base import Communicator, Nodes, Part
from simulate.comm.transfers import Transfer


class VirtualCommunicator(Communicator):
    """All N devices in this process: local sums are already global, and each tensor holds every device's part."""

    def __init__(
        self,
        num_devices: int,
        on_transfer: Callable[[Transfer, bool], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(num_devices, range(num_devices), on_transfer, on_wait)

    def all_gather_scalars(self, values_LX: Tensor) -> Tensor:
        return values_LX.detach().cpu()

    def _all_reduce(self, sums: Sequence[Tensor]) -> None:
        pass

    def _all_gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def _all_gather_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]]:
        return [
            list(tensor.split([len(p.devices) * p.shapes[i][0] for p in parts])) for i, tensor in enumerate(tensors)
        ]

    def _push_parts(self, tensors: Sequence[Tensor], parts: Sequence[Part]) -> list[list[Tensor]] | None:
        return self._all_gather_parts(tensors, parts)

    def _all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        # Sender and receiver swap places: part [i, j] is what device i has for device j.
        return [tensor.transpose(0, 1) for tensor in tensors]

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        pass

    def _push(self, tensors: Sequence[Tensor], active: Sequence[int] | None) -> list[Tensor] | None:
        return list(tensors)

    def _pull(self, tensors: Sequence[Tensor]) -> None:
        pass

    def leaders(self, nodes: Nodes) -> VirtualCommunicator:
        return VirtualCommunicator(nodes.count)

    def _reduce_in_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        pass

    def _reduce_over_nodes(self, sums: Sequence[Tensor], nodes: Nodes) -> None:
        pass

    def _broadcast_in_nodes(self, tensors: Sequence[Tensor], nodes: Nodes) -> None:
        pass
