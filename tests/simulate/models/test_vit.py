"""Tests of the Vision Transformer: published counts, patches against a convolution, inputs that change its output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, lora_layers
from simulate.models.families.vit import VitModel
from simulate.models.vit import Vit, patches_of

SMALL = VitModel(layers=2, width=12, attention_heads=3, patch=4, image=8, classes=5)


def small() -> Vit:
    torch.manual_seed(0)
    return Vit(SMALL).double()


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As counted in the published checkpoints at 224 pixels and 1000 classes.
    [
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_l16", 304_326_632),
        ("vit_s32", 22_878_952),
        ("vit_b32", 88_224_232),
        ("vit_l32", 306_535_400),
    ],
)
def test_a_vit_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Vit(VitModel(name=name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert VitModel(name=name).shape().parameters == parameters


def test_a_linear_layer_over_patches_is_a_convolution_with_its_stride() -> None:
    kernel, x = torch.randn(12, 3, 4, 4, dtype=torch.float64), images(2)
    expected = F.conv2d(x, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches_of(x, 4) @ kernel.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


def test_samples_do_not_mix() -> None:
    model, x = small(), images(3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_every_patch_reaches_the_class_token() -> None:
    x = images(1).requires_grad_()
    small()(x).square().sum().backward()
    assert x.grad is not None
    assert (patches_of(x.grad, 4).abs().sum(2) > 0).all()


def test_patches_count_by_where_they_are() -> None:
    model, x = small(), images(1)
    assert not torch.allclose(model(x), model(x.flip(3).contiguous()))


@pytest.mark.parametrize("treatment", [ConversionSpec(), ConversionSpec(lora(AdapterSpec(2, 1.5, 1, False, 0, 0), 3))])
def test_a_converted_vit_starts_as_the_plain_one(treatment: ConversionSpec) -> None:
    plain, x = small(), images(6)
    converted = convert(small(), 3, treatment)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(weight, merged_state(converted)[name]) for name, weight in plain.state_dict().items())


def test_every_linear_layer_but_those_at_the_ends_is_adapted() -> None:
    linears = [name for name, module in small().named_modules() if isinstance(module, nn.Linear)]
    converted = convert(small(), 3, ConversionSpec(lora(AdapterSpec(2, 1.5, 1, False, 0, 0), 3)))
    assert [layer.name for layer in lora_layers(converted)] == [n for n in linears if n not in ("patch", "head")]
    assert len(linears) == 2 + 4 * 2


def test_heads_with_many_rows_train_as_plain_networks_with_their_effective_weights() -> None:
    """4 samples of 5 tokens a head at width 12: most old products are cheaper in the weight than row by row."""
    devices, scale, x = 3, 1.5, images(12)
    model = convert(small(), devices, ConversionSpec(lora(AdapterSpec(2, scale, 1, True, 0, 0), devices)))
    draw = torch.Generator().manual_seed(1)
    for layer in lora_layers(model):
        layer.remember_product(layer.a.detach(), layer.b.detach())
        for factor in (layer.a, layer.b, layer.a0, layer.b0):
            assert factor is not None
            factor.data.normal_(std=0.1, generator=draw)
    output = model(x)
    output.square().sum().backward()
    for device in range(devices):
        state: dict[str, Tensor] = dict(small().state_dict())
        factors = {}
        for layer in lora_layers(model):
            assert layer.a0 is not None and layer.b0 is not None
            a, b = (factor[device].detach().requires_grad_() for factor in (layer.a, layer.b))
            state[f"{layer.name}.weight"] = layer.weight + scale * (b @ a - layer.b0[device] @ layer.a0[device])
            factors[layer.name] = (a, b)
        expected = torch.func.functional_call(small(), state, (x[device * 4 : device * 4 + 4],))
        torch.testing.assert_close(output[device * 4 : device * 4 + 4], expected, rtol=1e-10, atol=1e-12)
        expected.square().sum().backward()
        for layer in lora_layers(model):
            for got, wanted in zip((layer.a.grad, layer.b.grad), factors[layer.name], strict=True):
                assert got is not None
                torch.testing.assert_close(got[device], wanted.grad, rtol=1e-9, atol=1e-12)
