"""LTE as the paper writes it (arXiv 2402.16828, algorithm 1): dense effective weights, one head after another."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from tests.reference.common import adamw, adapted_names, clip, mean_loss, take_step
from tests.reference.lora import Draw, Pairs
from tests.reference.relora import prune_smallest

Item = TypeVar("Item")


class Head(Pairs):
    """One A and B per adapted weight, and what of them is in W since the last merge."""

    def __init__(self, index: int, model: nn.Module, rank: int, draw: Draw) -> None:
        super().__init__(model, rank, lambda name: draw(name, index, 0))
        self.index = index
        self.a0 = {name: a.detach().clone() for name, a in self.a.items()}
        self.b0 = {name: b.detach().clone() for name, b in self.b.items()}

    def remember(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep both factors as they were merged."""
        self.a0[name], self.b0[name] = a.detach().clone(), b.detach().clone()

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
        self.replicated: list[Tensor] = [p for name, p in self.model.named_parameters() if name not in adapted]
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
        for fragment in self.fragments_due(step + 1):
            self.merge(fragment, step + 1)
        return torch.stack(losses)

    def fragments_due(self, steps_done: int) -> list[int]:
        """Return what merges now: the f-th of F fragments T/F·f steps into each round, everything at the run's end."""
        every, fragments = self.options.merge_every, self.options.fragments
        if steps_done == self.run.train.steps:
            return list(range(fragments))
        into_round = (steps_done - 1) % every + 1
        return [f for f in range(fragments) if into_round == every // fragments * (f + 1)]

    @torch.no_grad()
    def merge(self, fragment: int, steps_done: int) -> None:
        """Merge the fragment's layers and average its part of everything else; then its next round starts."""
        names = self.part_of(adapted_names(self.devices[0].model), fragment)
        self.merge_adapted(names)
        columns = zip(*(device.replicated for device in self.devices), strict=True)
        self.average(self.part_of(list(columns), fragment))
        for device in self.devices:
            for head in device.heads:
                for name in names:
                    self._start_round(device, head, name, steps_done)

    def part_of(self, items: list[Item], fragment: int) -> list[Item]:
        """Return the fragment's consecutive share of the items."""
        return [item for i, item in enumerate(items) if i * self.options.fragments // len(items) == fragment]

    def merge_adapted(self, names: list[str]) -> None:
        """W ← W + (s/H)·Σ_h (B_h·A_h − B0_h·A0_h)."""
        for name in names:
            mean = torch.stack([head.change(name) for head in self.heads]).mean(0)
            self.add_to_all(name, self.options.scale * mean)
            for head in self.heads:
                head.remember(name, head.a[name], head.b[name])

    def add_to_all(self, name: str, delta: Tensor) -> None:
        """Add to everyone's W."""
        for device in self.devices:
            device.model.get_parameter(name).add_(delta)

    def average(self, columns: list[tuple[Tensor, ...]]) -> None:
        """Give each device the plain mean of everyone's copies, column by column."""
        for copies in columns:
            mean = sum(copies[1:], copies[0].clone()) / len(copies)
            for parameter in copies:
                parameter.copy_(mean)

    def _start_round(self, device: Device, head: Head, name: str, steps_done: int) -> None:
        a, b = head.a[name], head.b[name]
        if self.options.reset in ("b", "ab"):
            b.zero_()
            head.remember(name, a, b)
        if self.options.reset == "ab":
            a.copy_(self.draw(name, head.index, steps_done))
        for factor in (factor for factor in (a, b) if factor.requires_grad):
            if self.options.merge_optimizer == "prune":
                prune_smallest(device.optimizer, factor, 0.9)
            elif self.options.merge_optimizer == "reset":
                device.optimizer.state.pop(factor)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: right after the last merge all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.devices[0].model.state_dict().items()}
