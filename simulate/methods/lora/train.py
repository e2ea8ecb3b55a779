"""LoRA (Hu et al. 2021, arXiv 2106.09685) under data parallelism: one pair a layer, never merged.

    y = W·x + s·B·A·x with frozen W;   gradients of A, B and of all that has no adapter are averaged at every step

From scratch, W + s·B·A stays within rank r of the start weights: what the others are measured against. With `quantize`
W is packed once, at the start, and unpacked for each product (QLoRA; Dettmers et al. 2023, arXiv 2305.14314).

mhlora, relora and adamix subclass it. LTE uses its optimizer groups; so an adapter has one learning rate everywhere.

Legend: L local devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from simulate.config.method_options import AdapterOptions
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, LoraLinear, lora_layers
from simulate.layers.per_device import VectorLora
from simulate.methods.base import Method
from simulate.methods.gradient_averaging import GradientMethod, mean_over_devices
from simulate.methods.loss import gradients_of
from simulate.methods.stepper import ParameterGroup, decay_groups

MUON_ADAPTER_FACTOR, MUON_RANK = 3.0, 32
"""With Muon, adapters of this rank learn this much faster than norm-matching says: measured best for LTE on small text
models."""


class Lora(GradientMethod):
    """One adapter, shared by all devices."""

    def spec(self) -> AdapterSpec:
        """Return the adapters' form: one head, the same on all devices."""
        options = adapter_options(self)
        return AdapterSpec(
            rank=options.rank,
            scale=options.scale,
            heads_per_device=1,
            reset_less=False,
            first_device=0,
            seed=self.run.train.seed,
            quantize=options.frozen_format,
            keeps_master=options.keeps_master,
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        return convert(model, 1, ConversionSpec(lora(self.spec(), devices=1)))

    def parameter_groups(self) -> list[ParameterGroup]:
        return adapter_groups(self, adapter_options(self))

    def average_gradients(self) -> None:
        mean_over_devices(gradients_of(self.parameters.values()), self.communicator)

    def extra_state(self) -> dict[str, Tensor]:
        return {**super().extra_state(), **masters(self.model)}

    def merged_state(self) -> dict[str, Tensor]:
        return merged_state(self.model, fold=True)

    def weights_in_use(self) -> dict[str, Tensor]:
        return merged_state(self.model, fold=True, in_use=True)


def masters(model: nn.Module) -> dict[str, Tensor]:
    """Return the full-precision copies of quantised weights that are kept here, by name."""
    return {f"{layer.name}.master": layer.master for layer in lora_layers(model) if layer.master is not None}


def adapter_options(method: Method) -> AdapterOptions:
    """Return the run's options, which belong to an adapter method."""
    options = method.run.method
    assert isinstance(options, AdapterOptions)
    return options


def adapter_groups(method: Method, options: AdapterOptions) -> list[ParameterGroup]:
    """Return the optimizer's groups: adapters at their own learning rate, everything else at the run's."""
    train = method.run.train
    rate, decay = train.learning_rate, train.weight_decay
    # s·B·A moves W s times as far as B moves, so that its rate is divided by s.
    matched = rate / options.scale * (muon_factor(options.rank) if train.optimizer == "muon" else 1.0)
    adapter_rate = options.adapter_learning_rate or matched
    adapters = {id(p) for p in adapter_parameters(method.model)}
    parameters = method.parameters.values()
    return [
        *decay_groups([p for p in parameters if id(p) in adapters], adapter_rate, decay),
        *decay_groups([p for p in parameters if id(p) not in adapters], rate, decay),
    ]


def muon_factor(rank: int) -> float:
    """Return how much faster adapters of a rank learn with Muon than norm-matching says.

    A step of B has singular values of one, and A's are sqrt(I/r): the factor's sqrt(r) gives what a step adds to W,
    s·U·A, the same singular values at lower ranks, so that a learning rate suits all of them. At higher ones heads
    share directions, what they add to W adds up, and training failed with the root (docs/results.md).
    """
    return MUON_ADAPTER_FACTOR * math.sqrt(min(rank, MUON_RANK) / MUON_RANK)


def adapter_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the factors of all adapted layers."""
    for module in model.modules():
        if isinstance(module, LoraLinear | VectorLora):
            yield from module.factors()
