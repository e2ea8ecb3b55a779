"""Plain LoRA (Hu et al. 2021, arXiv 2106.09685) on one device: W stays frozen for ever, nothing is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simulate.config import Run
from simulate.options import LteOptions
from tests.reference.common import adamw, adapted_names, clip, mean_loss, take_step


class LoraTwin:
    """One plain model whose adapted weights are W + s·B·A."""

    def __init__(self, run: Run, start: nn.Module, draw: Callable[[str], Tensor]) -> None:
        assert isinstance(run.method, LteOptions)
        self.run, self.scale, self.model = run, run.method.scale, copy.deepcopy(start)
        adapted = adapted_names(start)
        self.a = {name: draw(name).clone().requires_grad_() for name in adapted}
        self.b: dict[str, Tensor] = {}
        for name in adapted:
            weight = start.get_parameter(name)
            self.b[name] = weight.new_zeros(len(weight), run.method.rank, requires_grad=True)
        self.others = [p for name, p in self.model.named_parameters() if name not in adapted]
        rate = run.train.learning_rate
        adapters = [*self.a.values(), *self.b.values()]
        self.optimizer = adamw(run.train, [(adapters, rate / self.scale), (self.others, rate)])
        self.trained = [*adapters, *self.others]

    def effective(self) -> dict[str, Tensor]:
        """Return the adapted weights as the network sees them."""
        return {n: self.model.get_parameter(n).detach() + self.scale * self.b[n] @ self.a[n] for n in self.a}

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Take a step on (B, T) tokens; returns the mean loss, (1,)."""
        loss = mean_loss(functional_call(self.model, self.effective(), (inputs,)), targets)
        gradients = list(torch.autograd.grad(loss, self.trained))
        clip(gradients, self.run.train.clip_norm)
        take_step(self.optimizer, dict(zip(self.trained, gradients, strict=True)), self.run.train, step)
        return loss.detach().view(1)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the network's weights with the adapters folded in."""
        state = {**self.model.state_dict(), **self.effective()}
        return {name: tensor.detach().clone() for name, tensor in state.items()}
