"""LTE as the paper writes it (arXiv 2402.16828, algorithm 1): dense effective weights, one head after another."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.config import Run
from simulate.options import LteOptions
from tests.reference.common import adamw, adapted_names, clip, mean_loss, take_step

Draw = Callable[[str, int, int], Tensor]
"""(name of the weight, global head, optimizer steps done) → that head's A, (R, I)."""


class Head:
    """One A and B per adapted weight, and their values at the last merge."""

    def __init__(self, index: int, model: nn.Module, rank: int, draw: Draw) -> None:
        self.index = index
        self.a = {name: draw(name, index, 0).clone() for name in adapted_names(model)}
        self.b = {name: torch.zeros(len(model.get_parameter(name)), rank, dtype=a.dtype) for name, a in self.a.items()}
        self.parameters = [*self.a.values(), *self.b.values()]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.remember()

    def remember(self) -> None:
        """Keep both factors as they are now."""
        self.a0 = {name: a.detach().clone() for name, a in self.a.items()}
        self.b0 = {name: b.detach().clone() for name, b in self.b.items()}

    def change(self, name: str) -> Tensor:
        """Return B·A − B0·A0, dense."""
        return self.b[name] @ self.a[name] - self.b0[name] @ self.a0[name]


class Device:
    """A whole plain model, its heads and its own optimizer."""

    def __init__(self, run: Run, start: nn.Module, heads: list[Head]) -> None:
        assert isinstance(run.method, LteOptions)
        self.run, self.scale = run, run.method.scale
        self.model, self.heads = copy.deepcopy(start), heads
        adapted = adapted_names(start)
        self.replicated = [p for name, p in self.model.named_parameters() if name not in adapted]
        for name in adapted:
            self.model.get_parameter(name).requires_grad_(False)
        rate = run.train.learning_rate
        adapters = [p for head in heads for p in head.parameters]
        self.optimizer = adamw(run.train, [(adapters, rate / self.scale), (self.replicated, rate)])
        self.clipped: list[bool] = []

    def head_loss(self, head: Head, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the network as this head sees it: W − s·B0·A0 + s·B·A."""
        seen = {name: self.model.get_parameter(name) + self.scale * head.change(name) for name in head.a}
        return mean_loss(functional_call(self.model, seen, (inputs,)), targets)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on the device's (B, T) tokens, an equal part for each head; returns its mean loss."""
        gradients: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in self.replicated}
        losses = []
        num_heads = len(self.heads)
        for head, x, y in zip(self.heads, inputs.chunk(num_heads), targets.chunk(num_heads), strict=True):
            loss = self.head_loss(head, x, y)
            losses.append(loss.detach())
            of_head = torch.autograd.grad(loss, head.parameters + self.replicated)
            gradients.update(zip(head.parameters, of_head, strict=False))
            for parameter, gradient in zip(self.replicated, of_head[len(head.parameters) :], strict=True):
                gradients[parameter] += gradient / num_heads
        self.clipped.append(clip(list(gradients.values()), self.run.train.clip_norm))
        take_step(self.optimizer, gradients, self.run.train, step)
        return torch.stack(losses).mean()


class LteTwin:
    """N devices, each with its own plain model."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        assert isinstance(run.method, LteOptions)
        self.run, self.options, self.draw = run, run.method, draw
        self.heads = [Head(h, start, self.options.rank, draw) for h in range(run.heads)]
        per_device = self.options.heads_per_device
        self.devices = [
            Device(run, start, self.heads[n * per_device : (n + 1) * per_device]) for n in range(run.cluster.devices)
        ]

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens; returns the devices' mean losses, (N,)."""
        parts = zip(self.devices, inputs.chunk(len(self.devices)), targets.chunk(len(self.devices)), strict=True)
        losses = [device.step(x, y, step) for device, x, y in parts]
        if (step + 1) % self.options.merge_every == 0 or step + 1 == self.run.train.steps:
            self.merge(step)
        return torch.stack(losses)

    @torch.no_grad()
    def merge(self, step: int) -> None:
        """W ← W + (s/H)·Σ_h (B_h·A_h − B0_h·A0_h); plain means for everything else; then start the next round."""
        for name in adapted_names(self.devices[0].model):
            delta = sum(head.change(name) for head in self.heads) * self.options.scale / len(self.heads)
            for device in self.devices:
                device.model.get_parameter(name).add_(delta)
        for copies in zip(*(device.replicated for device in self.devices), strict=True):
            mean = sum(copies[1:], copies[0].clone()) / len(copies)
            for parameter in copies:
                parameter.copy_(mean)
        for head in self.heads:
            self._reset(head, step + 1)

    def _reset(self, head: Head, steps_done: int) -> None:
        if self.options.reset in ("b", "ab"):
            for b in head.b.values():
                b.zero_()
        if self.options.reset == "ab":
            for name, a in head.a.items():
                a.copy_(self.draw(name, head.index, steps_done))
        head.remember()

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: right after a merge all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.devices[0].model.state_dict().items()}
