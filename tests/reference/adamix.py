"""AdaMix (Wang et al. 2022, arXiv 2205.12410): explicit lists of experts, one A and one B of them in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from simulate.common.seeding import generator
from simulate.methods.adamix.options import AdamixOptions
from tests.reference.common import adapted_names
from tests.reference.lora import LoraTwin, Pairs


class AdamixTwin(LoraTwin):
    """The network sees W + s·B_j·A_i; merged, W + s·mean(B)·mean(A)."""

    def make_pairs(self) -> list[Pairs]:
        assert isinstance(self.run.method, AdamixOptions)
        return [super(AdamixTwin, self).make_pairs()[0] for _ in range(self.run.method.experts)]

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Draw i and j of each layer, then step as LoRA does."""
        self.routes: dict[str, tuple[int, int]] = {}
        for name in adapted_names(self.model):
            layer = name.removesuffix(".weight")
            i, j = generator(self.run.train.seed, "routing", layer, step).integers(0, len(self.pairs), 2)
            self.routes[name] = int(i), int(j)
        return super().step(inputs, targets, step)

    def trained(self) -> list[Tensor]:
        chosen: list[Tensor] = []
        for name, (i, j) in self.routes.items():
            chosen += [self.pairs[i].a[name], self.pairs[j].b[name]]
        return [*chosen, *self.others]

    def effective(self) -> dict[str, Tensor]:
        return {
            name: self.frozen(name) + self.scale * self.pairs[j].b[name] @ self.pairs[i].a[name]
            for name, (i, j) in self.routes.items()
        }

    def merged_state(self) -> dict[str, Tensor]:
        state = dict(self.model.state_dict())
        for name in adapted_names(self.model):
            mean_a = torch.stack([pairs.a[name] for pairs in self.pairs]).mean(0)
            mean_b = torch.stack([pairs.b[name] for pairs in self.pairs]).mean(0)
            state[name] = self.frozen(name) + self.scale * mean_b @ mean_a
        return {name: tensor.detach().clone() for name, tensor in state.items()}
