"""SAPipe with a whole plain model and a whole optimizer a device; a prediction is a step of a copy of both."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from simulate.methods.sapipe.options import SapipeOptions
from tests.reference.dense import DenseTwin, Device, mean


class SapipeTwin(DenseTwin):
    """w_{t+1} = AdamW(w_t, G_{t−1}); gradients are taken at w_t or, predicting, at AdamW'(w_t, g_{t−1})."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        assert isinstance(run.method, SapipeOptions)
        super().__init__(run, start)
        self.options = run.method
        self.seen = self.devices
        """Devices as gradients see them."""
        self.stale: list[Tensor] = []
        self.stale_weights: list[Tensor] = []
        """Where the stale gradient was taken."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        count = len(self.devices)
        parts = zip(self.seen, inputs.chunk(count), targets.chunk(count), strict=True)
        results = [device.gradients(x, y) for device, x, y in parts]
        weights = [p.detach().clone() for p in self.devices[0].parameters]
        if step > 0:
            stale = self._corrected() if self.options.compensation == "delay" else self.stale
            for device in self.devices:
                device.apply(stale, step)
        gradients = [own for _, own in results]
        self.stale, self.stale_weights = [mean(list(g)) for g in zip(*gradients, strict=True)], weights
        if self.options.compensation == "prediction":
            ahead = min(step + 1, self.run.train.steps - 1)
            self.seen = [predicted(d, own, ahead) for d, own in zip(self.devices, gradients, strict=True)]
        return torch.stack([loss for loss, _ in results])

    def _corrected(self) -> list[Tensor]:
        """G + λ·G⊙G⊙(w_t − w_{t−1})."""
        now = [p.detach() for p in self.devices[0].parameters]
        return [
            g + self.options.delay_factor * g * g * (w - before)
            for g, w, before in zip(self.stale, now, self.stale_weights, strict=True)
        ]


def predicted(device: Device, gradients: list[Tensor], step: int) -> Device:
    """Return a copy of a device after a step with these gradients; the device itself stays as it is."""
    ahead = copy.deepcopy(device)
    ahead.apply(gradients, step)
    return ahead
