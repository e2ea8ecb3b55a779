"""Tests of `convert`: replacements under each spec, refusals, and merged weights that fit the plain network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.layers.convert import ConversionSpec, call_with_weights, convert, lora, merged_state, norm_parameters
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear
from simulate.layers.per_device import (
    ReplicatedConv2d,
    ReplicatedEmbedding,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedModule,
    ReplicatedRmsNorm,
    VectorLora,
)
from simulate.methods.lte.train import Lte
from simulate.methods.registry import build_method
from tests import tiny

DEVICES = 2
SPEC = AdapterSpec(2, 1.5, heads_per_device=1, reset_less=False, first_device=0, seed=0)
MAKE = lora(SPEC, DEVICES)


def vectors(vector: Tensor) -> VectorLora:
    return VectorLora(vector, DEVICES, 1.5, remembers=False)


class Zoo(nn.Module):
    """Network with one of each kind of layer; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.same = nn.Conv2d(4, 6, 3, padding="same")
        self.circular = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
        self.embedding = nn.Embedding(5, 4)
        self.padded = nn.Embedding(5, 4, padding_idx=0)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.layer_norm = nn.LayerNorm(4)
        self.biasless = nn.LayerNorm(4, bias=False)
        self.wide_norm = nn.LayerNorm((3, 4))
        self.rms_norm = nn.RMSNorm(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.inside = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 3)})


AVERAGED: dict[str, type] = {
    "linear": ReplicatedLinear,
    "conv": ReplicatedConv2d,
    "grouped": ReplicatedConv2d,
    "same": ReplicatedConv2d,
    "circular": ReplicatedModule,
    "embedding": ReplicatedEmbedding,
    "padded": ReplicatedModule,
    "head": ReplicatedLinear,
    "layer_norm": ReplicatedLayerNorm,
    "biasless": ReplicatedLayerNorm,
    "wide_norm": ReplicatedModule,
    "rms_norm": ReplicatedRmsNorm,
    "group_norm": ReplicatedModule,
    "bare": nn.LayerNorm,
    "inside.attention": ReplicatedModule,
    "inside.linear": ReplicatedLinear,
}
ADAPTED = {**AVERAGED, "linear": LoraLinear, "inside.linear": LoraLinear}


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        pytest.param(ConversionSpec(), AVERAGED, id="everything trained"),
        pytest.param(ConversionSpec(MAKE), {**ADAPTED, "conv": LoraConv2d}, id="adapters"),
        pytest.param(ConversionSpec(MAKE, convolutions="average"), ADAPTED, id="convolutions averaged"),
    ],
)
def test_convert_swaps_each_layer_for_its_kind(treatment: ConversionSpec, expected: dict[str, type]) -> None:
    model = convert(Zoo(), DEVICES, treatment)
    assert {name: type(model.get_submodule(name)) for name in expected} == expected
    assert all(p.shape[0] == DEVICES for p in model.parameters())


# The weight of the linear layer that the biases belong to is a buffer, as all adapted ones.
@pytest.mark.parametrize(
    ("treatment", "kinds"),
    [
        (
            ConversionSpec(MAKE),
            {"linear.bias": "trained", "layer_norm.weight": "trained", "rms_norm.weight": "trained"},
        ),
        (ConversionSpec(MAKE, norms="one"), {"layer_norm.bias": "trained", "rms_norm.weight": "trained"}),
        (
            ConversionSpec(MAKE, norms="none"),
            {
                "layer_norm.bias": "frozen",
                "biasless.weight": "frozen",
                "rms_norm.weight": "frozen",
                "conv.bias": "trained",
            },
        ),
        (
            ConversionSpec(MAKE, vectors, norms="vector-lora"),
            {
                "linear.bias": "trained",
                "layer_norm.bias": "pair",
                "layer_norm.weight": "pair",
                "rms_norm.weight": "pair",
            },
        ),
        (
            ConversionSpec(MAKE, biases="frozen"),
            {"linear.bias": "frozen", "conv.bias": "frozen", "grouped.bias": "frozen", "layer_norm.bias": "trained"},
        ),
    ],
    ids=["average", "one", "none", "vector-lora", "frozen biases"],
)
def test_norms_and_biases_become_what_the_treatment_says(treatment: ConversionSpec, kinds: dict[str, str]) -> None:
    model = convert(Zoo(), DEVICES, treatment)
    parameters, buffers, modules = (
        dict(f()) for f in (model.named_parameters, model.named_buffers, model.named_modules)
    )
    for name, kind in kinds.items():
        held = (name in parameters, name in buffers, isinstance(modules.get(name), VectorLora))
        assert held == (kind == "trained", kind == "frozen", kind == "pair"), name
    frozen = [name for name, kind in kinds.items() if kind == "frozen"]
    assert all(buffers[name].shape[0] == 1 for name in frozen)


def test_only_norms_that_are_trained_as_they_are_count_as_norm_parameters() -> None:
    expected = {"layer_norm.weight", "layer_norm.bias", "biasless.weight", "rms_norm.weight"}
    assert norm_parameters(convert(Zoo(), DEVICES)).keys() == expected
    for norms in ("none", "vector-lora"):
        treatment = ConversionSpec(None, vectors, norms=norms)
        assert not norm_parameters(convert(Zoo(), DEVICES, treatment))


def plain_names() -> list[str]:
    return sorted(Zoo().state_dict())


@pytest.mark.parametrize(
    "treatment",
    [
        ConversionSpec(),
        ConversionSpec(MAKE),
        ConversionSpec(MAKE, convolutions="average", norms="none", biases="frozen"),
        ConversionSpec(MAKE, vectors, norms="vector-lora"),
    ],
    ids=["everything trained", "adapters", "frozen", "vectors"],
)
def test_converting_and_merging_back_gives_the_plain_networks_weights(treatment: ConversionSpec) -> None:
    plain = Zoo()
    state = merged_state(convert(copy.deepcopy(plain), DEVICES, treatment))
    assert sorted(state) == plain_names()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    plain.load_state_dict(state, strict=True)


def test_a_weight_tied_to_an_unknown_module_stays_one_parameter() -> None:
    class Transposed(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    linear = nn.Linear(3, 2, bias=False)
    plain = nn.Sequential(linear, Transposed(linear.weight))
    x = torch.randn(4, 3)
    expected = plain(x)
    model = convert(plain, DEVICES, ConversionSpec(MAKE))
    (weight,) = model.parameters()
    assert weight.shape == (DEVICES, 2, 3)
    torch.testing.assert_close(model(x), expected)
    assert sorted(merged_state(model)) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("treatment", [ConversionSpec(), ConversionSpec(MAKE)], ids=["copies", "adapters"])
def test_a_layer_that_is_used_at_two_places_stays_one_layer(treatment: ConversionSpec) -> None:
    shared = nn.Linear(3, 3)
    plain = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared))
    names = set(plain.state_dict())
    x = torch.randn(4, 3)
    expected = plain(x)
    model = convert(plain, DEVICES, treatment)
    assert model[0] is model[2][0]
    torch.testing.assert_close(model(x), expected)
    assert merged_state(model).keys() == names == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}


class Deep(nn.Module):
    """Network with a given layer two modules down."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), layer)])


class Unknown(nn.Module):
    """Module with a parameter beside a given layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(1)), layer


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1 is a BatchNorm1d"),
        (nn.Sequential(nn.BatchNorm2d(2, affine=False)), "0 is a BatchNorm2d"),
        (nn.Sequential(nn.BatchNorm2d(2, affine=False, track_running_stats=False)), "0 is a BatchNorm2d"),
        (Deep(nn.BatchNorm3d(2)), "blocks.1.1 is a BatchNorm3d"),
        (Deep(Unknown(nn.SyncBatchNorm(2))), "blocks.1.1.layer is a SyncBatchNorm"),
    ],
    ids=["plain", "without parameters", "without statistics", "deep inside", "in an unknown module"],
)
def test_batch_normalisation_is_refused_by_name_with_the_reason(model: nn.Module, named: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(model, DEVICES)
    message = str(caught.value)
    assert message.startswith(f"model: {named}, whose running statistics mix samples")
    assert message.endswith("use LayerNorm, RMSNorm or GroupNorm") and "\n" not in message


class Bare(nn.Linear):
    """A network with parameters of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


@pytest.mark.parametrize("model", [Bare(), nn.Linear(2, 2)], ids=["own", "a layer alone"])
def test_a_network_that_owns_parameters_runs_copy_by_copy(model: nn.Module) -> None:
    plain, x = copy.deepcopy(model), torch.randn(2 * DEVICES, 2)
    converted = convert(model, DEVICES)
    assert isinstance(converted, ReplicatedModule)
    torch.testing.assert_close(converted(x), plain(x))
    state = merged_state(converted)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_what_is_refused_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(InputError):
        convert(model, DEVICES)
    assert type(model[0]) is nn.Linear


class Classifier(nn.Module):
    """Small network of images: a convolution, a norm of an unknown kind, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.flat = nn.Flatten()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.norm(self.conv(x)).relu()))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().double()


def lte_on_images(devices: int = 3, **method: Any) -> Lte:
    train = {"steps": 7, "learning_rate": 1e-2}
    run = tiny.lte_run(devices=devices, merge_every=4, train=train, **method)
    engine = build_method(run, VirtualCommunicator(devices), tiny.CPU, classifier())
    assert isinstance(engine, Lte)
    return engine


def images(devices: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2 * devices, 2, 3, 3, dtype=torch.float64, generator=generator)
    return x, x.mean((1, 2, 3)).mul(6).round().long().clamp(-1, 1) + 1


def test_unknown_modules_run_copy_by_copy_and_are_averaged_at_merges() -> None:
    engine = lte_on_images()
    stacked = engine.model.get_submodule("norm").stacked
    for step in range(7):
        engine.step(*images(3, step), step)
        apart = not torch.equal(stacked[0][0], stacked[0][1])
        assert apart
        if engine.merge_due(step):
            mean = stacked[0].mean(0)
            engine.merge(step)
            torch.testing.assert_close(stacked[0], mean.expand_as(stacked[0]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("convolutions", ["lora", "average"])
@pytest.mark.parametrize("reset", ["none", "b"])
def test_merged_weights_load_into_the_plain_network_and_compute_alike(reset: str, convolutions: str) -> None:
    engine, plain = lte_on_images(reset=reset, convolutions=convolutions), classifier()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    losses = []
    for step in range(7):  # two rounds, the second one shorter
        losses.append(engine.step(*images(3, step), step).mean())
        if engine.merge_due(step):
            engine.merge(step)
    state = engine.merged_state()
    plain.load_state_dict(state, strict=True)
    assert all(not torch.equal(state[name], tensor) for name, tensor in before.items())
    x, _ = images(1, 99)
    # Right after a merge every device computes with the merged weights.
    expected = plain(x)
    for part in engine.model(x.repeat(3, 1, 1, 1)).chunk(3):
        torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10)


def test_the_first_step_on_images_is_each_devices_own() -> None:
    engine, plain = lte_on_images(), classifier()
    x, y = images(3, 0)
    losses = engine.step(x, y, 0)
    parts = zip(x.chunk(3), y.chunk(3), strict=True)
    expected = [nn.functional.cross_entropy(plain(part), target) for part, target in parts]
    torch.testing.assert_close(losses, torch.stack(expected).detach())


@pytest.mark.parametrize("name", ["ddp", "ddp, int8", "powersgd", "topk", "signsgd", "sapipe", "local-sgd", "daso"])
def test_every_kind_of_method_trains_each_devices_copy_of_an_unknown_module(name: str) -> None:
    run = tiny.variant_run(name, devices=4, train={"steps": 4, "learning_rate": 1e-2})
    engine = build_method(run, VirtualCommunicator(4), tiny.CPU, classifier())
    for step in range(4):
        engine.step(*images(4, step), step)
        if engine.merge_due(step):
            engine.merge(step)
    plain = classifier()
    start = plain.state_dict()["norm.weight"].clone()
    plain.load_state_dict(engine.merged_state(), strict=True)
    assert not torch.equal(plain.state_dict()["norm.weight"], start)


def test_an_unknown_modules_gradients_are_kept_apart_where_each_device_compresses_its_own() -> None:
    run = tiny.variant_run("topk", devices=2)
    engine = build_method(run, VirtualCommunicator(2), tiny.CPU, classifier())
    x, y = images(2, 0)
    engine.loss.group_losses(x, y, 2).sum().backward()
    norm = engine.model.get_submodule("norm")
    for device, (part, target) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        plain = classifier()
        nn.functional.cross_entropy(plain(part), target).backward()
        for stacked, parameter in zip(norm.stacked, plain.norm.parameters(), strict=True):
            torch.testing.assert_close(stacked.grad[device], parameter.grad)


def test_a_module_under_two_names_is_called_with_given_weights_and_keeps_its_own() -> None:
    norm = nn.LayerNorm(4)
    network = nn.Sequential(norm, nn.Linear(4, 4), norm)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in own.items()}
    inputs = torch.arange(8.0).view(2, 4)
    first, again = (call_with_weights(network, given, inputs) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0.0, atol=0.0)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, own[name])
    network.load_state_dict(given)
    torch.testing.assert_close(first, network(inputs))


def test_a_quantized_layers_dtype_and_device_are_read_from_its_weight() -> None:
    network = nn.Sequential(nn.Linear(64, 64))
    layer = convert(network, DEVICES, ConversionSpec(lora(replace(SPEC, quantize="nf4"), DEVICES)))[0]  # type: ignore[index]
    assert (layer.weight.dtype, layer.weight.device.type, layer.weight.shape) == (torch.float32, "cpu", (64, 64))
