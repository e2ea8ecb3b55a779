"""AdaMix (Wang et al. 2022, arXiv 2205.12410): a mixture of adapters, routed at random, merged by averaging.

In every step each layer draws one A and one B of its M, independently (section 3.1), the same for the whole batch and
on all devices:

    y = W·x + s·B_j·A_i·x;      as one model: W + s·mean_j(B_j)·mean_i(A_i)   (section 3.3)

All A start from one draw, so that any B fits any A. Only the chosen pair has a gradient, which is averaged over
devices; the optimizer leaves the others alone. Without the authors' consistency loss, which takes a second pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from simulate.common.seeding import generator
from simulate.layers.convert import ConversionSpec, convert
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear
from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.lora.train import Lora


class MixtureLinear(LoraLinear):
    """A linear layer with M pairs, of which one A and one B take part in a pass."""

    def __init__(self, weight_OI: Tensor, bias_LO: Tensor | None, name: str, spec: AdapterSpec, experts: int) -> None:
        super().__init__(weight_OI, bias_LO, name, spec, devices=1)
        a, b = self.a.detach(), self.b.detach()  # one draw for all experts, so that any B fits any A
        del self.a, self.b
        self.all_a = nn.ParameterList([nn.Parameter(a.clone()) for _ in range(experts)])
        self.all_b = nn.ParameterList([nn.Parameter(b.clone()) for _ in range(experts)])
        self.chosen = (0, 0)

    def route(self, step: int) -> None:
        """Draw this step's pair."""
        # Addressed by layer and step alone: all devices must choose the same pair, or their gradients would not meet.
        draw = generator(self.spec.seed, "routing", self.name, step)
        first, second = draw.integers(0, len(self.all_a), 2)
        self.chosen = int(first), int(second)

    def factors(self) -> Iterator[nn.Parameter]:
        yield from self.all_a
        yield from self.all_b

    def factors_in_use(self) -> tuple[Tensor, Tensor]:
        return self.all_a[self.chosen[0]], self.all_b[self.chosen[1]]

    def folded_weight(self) -> Tensor:
        # A mean of factors, unlike LTE's merge: section 3.3 averages each side.
        a_RI = torch.stack([a.detach()[0] for a in self.all_a]).mean(0)
        b_OR = torch.stack([b.detach()[0] for b in self.all_b]).mean(0)
        return torch.addmm(self.weight, b_OR, a_RI, alpha=self.spec.scale)


class MixtureConv2d(LoraConv2d, MixtureLinear):
    """A convolution with M pairs: patches of LoraConv2d, through the pair that MixtureLinear chooses."""


class Adamix(Lora):
    """Random routing among M adapters."""

    def prepare(self, model: nn.Module) -> nn.Module:
        assert isinstance(self.run.method, AdamixOptions)
        spec, experts = self.spec(), self.run.method.experts

        def make(layer: nn.Linear | nn.Conv2d, name: str, bias_LO: Tensor | None) -> nn.Module:
            if isinstance(layer, nn.Conv2d):
                return MixtureConv2d(layer, bias_LO, name, spec, experts)
            return MixtureLinear(layer.weight, bias_LO, name, spec, experts)

        return convert(model, 1, ConversionSpec(make))

    def parameters_in_use(self) -> Iterator[nn.Parameter]:
        """Yield all parameters but those of experts that this step does not route through."""
        idle = {
            id(factor)
            for module in self.model.modules()
            if isinstance(module, MixtureLinear)
            for factors, chosen in zip((module.all_a, module.all_b), module.chosen, strict=True)
            for index, factor in enumerate(factors)
            if index != chosen
        }
        return (parameter for parameter in self.model.parameters() if id(parameter) not in idle)

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        for module in self.model.modules():
            if isinstance(module, MixtureLinear):
                module.route(step)
        return super().step(inputs, targets, step)
