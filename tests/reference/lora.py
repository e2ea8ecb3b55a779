"""Plain LoRA (Hu et al. 2021, arXiv 2106.09685) under data parallelism: W stays frozen for ever, nothing is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.config.method_options import AdapterOptions
from simulate.config.run import Run
from tests.reference.common import adamw, adapted_names, clip, mean_loss, scheduled_rate

Draw = Callable[[str, int, int], Tensor]
"""(name of the weight, global head, optimizer steps done) → that head's A, (R, I)."""


class Pairs:
    """One A and one B per adapted weight."""

    def __init__(self, model: nn.Module, rank: int, draw: Callable[[str], Tensor]) -> None:
        self.a = {name: draw(name).clone() for name in adapted_names(model)}
        self.b = {name: torch.zeros(len(model.get_parameter(name)), rank, dtype=a.dtype) for name, a in self.a.items()}
        self.parameters = [*self.a.values(), *self.b.values()]
        for parameter in self.parameters:
            parameter.requires_grad_()


class LoraTwin:
    """One plain model whose adapted weights are W + s·B·A; N devices average their gradients one by one."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        assert isinstance(run.method, AdapterOptions)
        self.run, self.draw, self.rank, self.scale = run, draw, run.method.rank, run.method.scale
        self.model = copy.deepcopy(start)
        self.pairs = self.make_pairs()
        adapted = adapted_names(start)
        self.others: list[Tensor] = [p for name, p in self.model.named_parameters() if name not in adapted]
        rate = run.train.learning_rate
        adapters = [p for pairs in self.pairs for p in pairs.parameters]
        self.optimizer = adamw(run.train, [(adapters, rate / self.scale), (self.others, rate)])
        self.clipped: list[bool] = []

    def make_pairs(self) -> list[Pairs]:
        """Return all adapters at their start."""
        return [Pairs(self.model, self.rank, lambda name: self.draw(name, 0, 0))]

    def trained(self) -> list[Tensor]:
        """Return what has a gradient in this step."""
        return [*(p for pairs in self.pairs for p in pairs.parameters), *self.others]

    def frozen(self, name: str) -> Tensor:
        """Return W."""
        return self.model.get_parameter(name).detach()

    def effective(self) -> dict[str, Tensor]:
        """Return the adapted weights as the network sees them in this step."""
        (pair,) = self.pairs
        return {name: self.frozen(name) + self.scale * pair.b[name] @ pair.a[name] for name in pair.a}

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak learning rates."""
        return scheduled_rate(self.run.train, 1.0, step)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (N*B, T) tokens; returns the devices' mean losses, (N,)."""
        devices, trained, losses, gradients = self.run.cluster.devices, self.trained(), [], []
        for x, y in zip(inputs.chunk(devices), targets.chunk(devices), strict=True):
            loss = mean_loss(functional_call(self.model, self.effective(), (x,)), y)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, trained))
        means = [sum(parts[1:], parts[0]) / devices for parts in zip(*gradients, strict=True)]
        self.clipped.append(clip(means, self.run.train.clip_norm))
        self.update(dict(zip(trained, means, strict=True)), step)
        return torch.stack(losses)

    def update(self, gradients: dict[Tensor, Tensor], step: int) -> None:
        """Let Adam step what has a gradient."""
        for group in self.optimizer.param_groups:
            (parameter,) = group["params"]
            group["lr"] = group["peak"] * self.rate_factor(step)
            parameter.grad = gradients.get(parameter)
        self.optimizer.step()

    def merged_state(self) -> dict[str, Tensor]:
        """Return the network's weights with the adapters folded in."""
        state = {**self.model.state_dict(), **self.effective()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}
