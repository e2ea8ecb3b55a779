"""Dense data parallelism with a whole plain model and a whole optimizer a device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.common import adamw, clip, mean_loss, take_step


class DdpTwin:
    """N plain models that start equal and average their gradients one by one."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        self.run = run
        self.models = [copy.deepcopy(start) for _ in range(run.cluster.devices)]
        self.optimizers = [adamw(run.train, [(list(m.parameters()), run.train.learning_rate)]) for m in self.models]

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens; returns the devices' mean losses, (N,)."""
        devices, losses, gradients = len(self.models), [], []
        for model, x, y in zip(self.models, inputs.chunk(devices), targets.chunk(devices), strict=True):
            loss = mean_loss(model(x), y)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            means = [sum(parts[1:], parts[0]) / devices for parts in zip(*gradients, strict=True)]
            clip(means, self.run.train.clip_norm)
            take_step(optimizer, dict(zip(model.parameters(), means, strict=True)), self.run.train, step)
        return torch.stack(losses)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.models[0].state_dict().items()}
