"""What the twins of dense methods are made of: one device with a whole plain model and a whole optimizer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.common import adamw, clip, mean_loss, take_step


class Device:
    """A plain model and its optimizer."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        self.run, self.model = run, copy.deepcopy(start)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.clipped: list[bool] = []
        self.forget_moments()

    def forget_moments(self) -> None:
        """Start the optimizer anew."""
        self.optimizer = adamw(self.run.train, [(self.parameters, self.run.train.learning_rate)])

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss on (B, T) tokens and its gradient, parameter by parameter."""
        loss = mean_loss(self.model(inputs), targets)
        return loss.detach(), [gradient.clone() for gradient in torch.autograd.grad(loss, self.parameters)]

    def apply(self, gradients: list[Tensor], step: int) -> None:
        """Clip a copy of the gradients and take the optimizer's step with it."""
        own = [gradient.clone() for gradient in gradients]
        self.clipped.append(clip(own, self.run.train.clip_norm))
        take_step(self.optimizer, dict(zip(self.parameters, own, strict=True)), self.run.train, step)

    @torch.no_grad()
    def set_weights(self, weights: list[Tensor]) -> None:
        """Overwrite all weights."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)


class DenseTwin:
    """N devices with equal starts; subclasses say what one step does."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        self.run = run
        self.devices = [Device(run, start) for _ in range(run.cluster.devices)]

    def all_gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the devices' mean losses, (N,), on (N*B, T) tokens, and each device's gradients."""
        count = len(self.devices)
        parts = zip(self.devices, inputs.chunk(count), targets.chunk(count), strict=True)
        results = [device.gradients(x, y) for device, x, y in parts]
        return torch.stack([loss for loss, _ in results]), [gradients for _, gradients in results]

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens, merging when due; returns the devices' mean losses before it, (N,)."""
        raise NotImplementedError

    def is_last(self, step: int) -> bool:
        """Whether this is the run's last step."""
        return step == self.run.train.steps - 1

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: when asked all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.devices[0].model.state_dict().items()}


def mean(tensors: list[Tensor]) -> Tensor:
    """Return the plain mean, one summand after the other."""
    return sum(tensors[1:], tensors[0].clone()) / len(tensors)


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all elements in one vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflat(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the given shapes."""
    tensors, first = [], 0
    for tensor in like:
        tensors.append(vector[first : first + tensor.numel()].reshape(tensor.shape))
        first += tensor.numel()
    return tensors
