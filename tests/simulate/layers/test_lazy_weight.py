"""Tests of lazy weights: they give the same numbers, and take the memory of one layer at a time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from simulate.comm.virtual import VirtualCommunicator
from simulate.layers.cross_entropy import row_losses
from simulate.layers.lazy_weight import LazyWeight
from simulate.layers.lora import LoraLinear, lora_layers
from simulate.measure.one_device import evaluate_batch
from simulate.methods.base import Method
from simulate.methods.build_network import empty_model
from simulate.methods.registry import build_method
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.training.diagnostics import GradientSums
from tests import tiny
from tests.networks import Convolutional, Encoder

META = torch.device("meta")
MADE = (
    "lora", "relora", "mhlora", "adamix", "lte, nf4", "lte, int8, served", "lte, nf4-double, reduced", "lte", "ddp",
)  # fmt: skip
"""Runs whose weights are folded, fetched from the host, dequantized, or in place."""


def made(weight: Tensor, make: Callable[[], Tensor] | None = None) -> LazyWeight:
    return LazyWeight(make or weight.clone, torch.empty_like(weight, device=META), weight.device)


def test_an_operation_gets_what_is_made_and_lets_it_go() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 5, 4)
    seen: list[weakref.ref[Any]] = []

    def make() -> Tensor:
        seen.append(weakref.ref((fresh := weight.clone()).untyped_storage()))
        return fresh

    lazy = made(weight, make)
    assert (lazy.shape, lazy.dtype, lazy.device) == (weight.shape, weight.dtype, weight.device)
    assert not seen
    assert torch.equal(F.linear(x, lazy), F.linear(x, weight))
    assert torch.equal(x @ lazy.T, x @ weight.T)
    assert len(seen) == 2
    assert all(reference() is None for reference in seen)


def test_what_is_made_may_lie_transposed() -> None:
    weight_OI = torch.randn(3, 4)
    lazy = LazyWeight(lambda: weight_OI.clone().t(), torch.empty(3, 4, device=META).t(), weight_OI.device)
    assert (lazy.shape, lazy.stride()) == ((4, 3), (1, 4))
    assert torch.equal(torch.addmm(torch.ones(3), torch.eye(4), lazy), weight_OI.t() + 1)


def trained(name: str, network: nn.Module | None = None) -> Method:
    run = tiny.variant_run(name, 2, train={"steps": 5, "learning_rate": 1e-2})
    method = build_method(run, VirtualCommunicator(2), tiny.CPU, network)
    if network is None:
        tiny.train(method)
    else:
        for layer in lora_layers(method.model):
            for factor in layer.factors():
                factor.data.normal_(generator=torch.Generator().manual_seed(len(layer.name)))
    return method


def slow_losses(method: Method, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses of a batch with all weights computed beforehand."""
    with torch.no_grad():
        weights = method.merged_state()
        outputs = functional_call(empty_model(method.run), weights, (inputs,), tie_weights=False)
        return row_losses(outputs, targets)


@pytest.mark.parametrize("name", MADE)
def test_losses_are_those_of_weights_that_are_made_beforehand(name: str) -> None:
    method = trained(name)
    batch = tiny.batches(method.run).batch(0, range(1))
    fast = evaluate_batch(method, empty_model(method.run), *batch)
    assert torch.equal(fast, slow_losses(method, *batch))


class Mlp(nn.Sequential):
    """Network that uses one layer twice, and another once."""

    def __init__(self) -> None:
        twice = nn.Linear(6, 6)
        super().__init__(twice, nn.GELU(), twice, nn.Linear(6, 3))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(5, 6), nn.GELU(), Conv1D(3, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attention, tied, fused": (Encoder, torch.arange(10).view(2, 5)),
    "convolutions": (lambda: Convolutional(8, 3, 4), torch.randn(2, 3, 8, 8)),
    "shared": (Mlp, torch.randn(2, 6)),
    "transposed": (conv1d, torch.randn(2, 4, 6)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["lora", "lte, nf4", "lte, int8, served"])
@torch.no_grad()
def test_layers_of_every_kind_compute_alike(network: str, name: str) -> None:
    build, inputs = NETWORKS[network]
    plain = build().double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    method = trained(name, copy.deepcopy(plain))
    for weight in plain.parameters():
        weight.fill_(torch.nan)
    in_use, beforehand = method.weights_in_use(), method.merged_state()
    assert any(isinstance(weight, LazyWeight) for weight in in_use.values())
    fast, slow = (functional_call(plain, w, (inputs,), tie_weights=False) for w in (in_use, beforehand))
    assert torch.equal(fast, slow)
    assert fast.isfinite().all()


def gradients(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a network's outputs at given weights, and the gradients of the outputs' mean square."""
    leaves = {name: w.leaf() if isinstance(w, LazyWeight) else w.requires_grad_() for name, w in weights.items()}
    outputs = functional_call(network, leaves, (inputs,), tie_weights=False)
    outputs.square().mean().backward()
    return outputs, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["lora", "lte, nf4", "lte, int8, served"])
def test_layers_of_every_kind_are_differentiated_alike(network: str, name: str) -> None:
    build, inputs = NETWORKS[network]
    plain = build().double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    method = trained(name, copy.deepcopy(plain))
    in_use, beforehand = method.weights_in_use(), method.merged_state()
    fast, own = gradients(plain, in_use, inputs)
    slow, expected = gradients(plain, beforehand, inputs)
    assert torch.equal(fast, slow)
    assert own.keys() == expected.keys()
    assert any(isinstance(in_use[name], LazyWeight) for name in own)
    for name, gradient in own.items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.any()


def watch_weights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that records, at each computation of a weight, how many computed weights exist."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    plain_weight = LoraLinear.plain_weight

    def watched(layer: LoraLinear, fold: bool) -> Tensor:
        weight = plain_weight(layer, fold)
        alive.append(weakref.ref(weight.untyped_storage()))
        counts.append(sum(reference() is not None for reference in alive))
        return weight

    monkeypatch.setattr(LoraLinear, "plain_weight", watched)
    return counts


@pytest.mark.parametrize("name", ["lora", "adamix", "lte, nf4", "lte, int8, served"])
def test_one_layers_weight_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    method = trained(name)
    batch = tiny.batches(method.run).batch(0, range(1))
    counts, layers = watch_weights(monkeypatch), len(lora_layers(method.model))
    evaluate_batch(method, empty_model(method.run), *batch)
    assert counts == [1] * layers
    counts.clear()
    slow_losses(method, *batch)
    assert counts == list(range(1, layers + 1))  # so the count can be more than one


@pytest.mark.parametrize("name", ["lora", "adamix", "lte, nf4", "lte, int8, served"])
def test_one_layers_weight_is_there_at_a_time_in_the_backward_pass_too(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = trained(name)
    batch = tiny.batches(method.run).batch(0, range(1))
    counts, layers = watch_weights(monkeypatch), len(lora_layers(method.model))
    GradientSums(method.run, method.weights_in_use()).add(*batch)
    assert counts == [1] * 2 * layers


@pytest.mark.parametrize("name", ["lora", "lte, nf4", "lte, int8, served"])
def test_an_evaluation_takes_as_little_of_a_deep_network(name: str) -> None:
    """The peak is that of activations and one layer, so twice the layers do not raise it."""

    def peak_bytes(layers: int) -> int:
        model = {"layers": layers, "width": 64, "attention_heads": 2}
        method = tiny.build(tiny.variant_run(name, 2, model, {"dtype": "fp32"}))
        batch, empty = tiny.batches(method.run).batch(0, range(1)), empty_model(method.run)
        return cpu_peak_bytes(lambda: evaluate_batch(method, empty, *batch))

    assert peak_bytes(8) <= peak_bytes(2) + 1024
