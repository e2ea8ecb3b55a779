"""The example's method: the majority's sign of every device's momentum, one device and parameter after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.compressed import GradientTwin


class SignMomentumTwin(GradientTwin):
    """m_n ← β·m_n + g_n; each entry of the gradient is +1, −1 or, where votes are equal, 0."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.momenta = [[torch.zeros_like(p) for p in device.parameters] for device in self.devices]

    def agreed(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        votes = [torch.zeros_like(gradient) for gradient in gradients[0]]
        for momenta, own in zip(self.momenta, gradients, strict=True):
            for momentum, gradient, vote in zip(momenta, own, votes, strict=True):
                momentum.mul_(self.run.method.momentum).add_(gradient)  # type: ignore[attr-defined]
                vote.add_(torch.where(momentum >= 0, 1.0, -1.0))
        return [torch.sign(vote) for vote in votes]
