"""DASO with a whole plain model and a whole optimizer a device, also inside nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.daso.options import DasoOptions
from tests.reference.dense import DenseTwin, mean


class DasoTwin(DenseTwin):
    """Nodes of devices that average gradients; between nodes what was sent arrives S steps later."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, DasoOptions)
        super().__init__(run, start)
        self.options = run.method
        size = self.options.devices_per_node
        self.nodes = [self.devices[first : first + size] for first in range(0, len(self.devices), size)]
        self.mail: list[tuple[int, list[list[Tensor]]]] = []
        """(the step after which it arrives, what each node sent)."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses, gradients = self.all_gradients(inputs, targets)
        size = self.options.devices_per_node
        for number, node in enumerate(self.nodes):
            own = gradients[number * size : (number + 1) * size]
            means = [mean(list(parts)) for parts in zip(*own, strict=True)]
            for device in node:
                device.apply(means, step)
        if len(self.nodes) > 1:
            with torch.no_grad():
                self._receive(step)
                self._send(step)
        return losses

    def _receive(self, step: int) -> None:
        for arrives, sent in self.mail:
            if arrives == step or self.is_last(step):
                self._mix(sent)
                self.mail = []

    def _send(self, step: int) -> None:
        if (step + 1) % self.options.merge_every and not self.is_last(step):
            return
        sent = [[p.detach().clone() for p in node[0].parameters] for node in self.nodes]
        if self.options.delay_steps == 0 or self.is_last(step):
            everywhere = [mean(list(copies)) for copies in zip(*sent, strict=True)]
            for device in self.devices:
                device.set_weights(everywhere)
        else:
            self.mail.append((step + self.options.delay_steps, sent))

    def _mix(self, sent: list[list[Tensor]]) -> None:
        """x ← (2S·x + Σ_i x_i) / (2S + M)."""
        weight, nodes = 2 * self.options.delay_steps, len(self.nodes)
        for device in self.devices:
            mixed = [
                (weight * x + sum(copies[1:], copies[0])) / (weight + nodes)
                for x, copies in zip(device.parameters, zip(*sent, strict=True), strict=True)
            ]
            device.set_weights(mixed)
