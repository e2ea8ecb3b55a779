"""LTE whose nodes train as one: a node is one device with the batches of its devices, put together."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from tests.reference.late import LateLteTwin
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.lte_layers import LteLayerTwin
from tests.reference.lte_wire import LteWireTwin
from tests.reference.quantised import QuantisedTwin


class LteNodesTwin:
    """A twin of as many lone devices as there are nodes."""

    of_lone_devices: ClassVar[type[LteTwin]] = LteTwin

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        assert isinstance(run.method, LteOptions)
        self.size, self.heads = run.method.devices_per_node, run.method.heads_per_device
        self.nodes = run.cluster.devices // self.size
        cluster = run.cluster.model_copy(update={"devices": self.nodes})
        method = run.method.model_copy(update={"devices_per_node": 1})
        self.twin = self.of_lone_devices(run.model_copy(update={"cluster": cluster, "method": method}), start, draw)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens; returns the devices' mean losses, (N,)."""
        losses = [
            self._device_loss(device, x, y)
            for device, (x, y) in enumerate(
                zip(inputs.chunk(self.nodes * self.size), targets.chunk(self.nodes * self.size), strict=True)
            )
        ]
        self.twin.step(self._joined(inputs), self._joined(targets), step)
        return torch.stack(losses)

    def _joined(self, samples: Tensor) -> Tensor:
        """Return the nodes' batches: each head's parts of all devices of the node, head after head."""
        parts = []
        for of_node in samples.chunk(self.nodes):
            of_devices = [of_device.chunk(self.heads) for of_device in of_node.chunk(self.size)]
            parts += [part for of_head in zip(*of_devices, strict=True) for part in of_head]
        return torch.cat(parts)

    @torch.no_grad()
    def _device_loss(self, device: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of one device's own samples, with its node's weights."""
        node = self.twin.devices[device // self.size]
        parts = zip(node.heads, inputs.chunk(self.heads), targets.chunk(self.heads), strict=True)
        return torch.stack([node.head_loss(head, x, y) for head, x, y in parts]).mean()

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first node's weights."""
        return self.twin.merged_state()


class LteNodesFrozenATwin(LteNodesTwin):
    """Nodes that train B alone."""

    of_lone_devices = LteFrozenATwin


class LteNodesWireTwin(LteNodesTwin):
    """Nodes whose messages are rounded."""

    of_lone_devices = LteWireTwin


class LteNodesLateTwin(LteNodesTwin):
    """Nodes whose merges arrive late."""

    of_lone_devices = LateLteTwin


class LteNodesQuantisedTwin(LteNodesTwin):
    """Nodes whose frozen weights are rounded."""

    of_lone_devices = QuantisedTwin


class LteNodesLayerTwin(LteNodesTwin):
    """Nodes whose norms are trained in other ways."""

    of_lone_devices = LteLayerTwin
