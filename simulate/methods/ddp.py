"""Dense data parallelism: the yardstick. Every device holds all weights; gradients are averaged at every step.

    g = (1/N)·Σ_n ∇ mean-loss_n(w),   w ← AdamW(w, clip(g))      (Li et al. 2020, arXiv 2006.15704)

All devices hold equal weights at all times, so the local devices share one copy and train on their joined batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.adapters import convert, merged_state
from simulate.costs.traffic import pack
from simulate.methods.base import Method, clip_per_device


class Ddp(Method):
    """Dense training; communicates in every step and never needs a merge."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, copies=1)

    def parameter_groups(self) -> list[dict[str, object]]:
        return self.decay_groups(self.model.named_parameters(), self.run.train.learning_rate)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses_L = self.group_losses(inputs, targets, self.local_devices)
        losses_L.sum().backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        for group in pack([g.numel() * g.element_size() for g in gradients]):
            self.communicator.all_reduce([gradients[i] for i in group])
        torch._foreach_div_(gradients, float(self.communicator.num_devices))
        clip_per_device(gradients, 1, self.run.train.clip_norm)
        self.apply_gradients(step)
        return losses_L.detach()

    @property
    def round_steps(self) -> int:
        return 1

    def merge(self, step: int) -> None:
        """Nothing to do: the weights are one model after every step."""

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model)
