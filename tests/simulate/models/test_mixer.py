"""Tests of the MLP-Mixer: published counts, its block against loops, and the axes along which it mixes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, lora_layers
from simulate.models.families.mixer import MixerModel
from simulate.models.mixer import NORM_EPSILON, Mixer, MixerBlock

SMALL = MixerModel(layers=2, width=6, tokens_width=5, channels_width=8, image=8, patch=4, colours=3, classes=7)
ADAPTERS = ConversionSpec(lora(AdapterSpec(2, 1.5, 1, False, 0, 0), 3))


def small() -> Mixer:
    torch.manual_seed(0)
    return Mixer(SMALL).double()


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # S and B at patch 16 as counted in the published checkpoints; at patch 32 the LTE paper's 8.8M, 19.1M and 60.3M.
    [
        ("mixer_s16", 18_528_264),
        ("mixer_b16", 59_880_472),
        ("mixer_t16", 8_233_600),
        ("mixer_t32", 8_778_766),
        ("mixer_s32", 19_104_624),
        ("mixer_b32", 60_293_428),
    ],
)
def test_a_mixer_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    options = MixerModel(name=name)
    with torch.device("meta"):
        model = Mixer(options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == options.shape().parameters


def test_the_shape_counts_the_tensors_and_rows_of_the_network() -> None:
    shape = SMALL.shape()
    assert [t.shape for t in shape.tensors] == [tuple(p.shape) for p in small().parameters()]
    assert [linear.rows for linear in shape.adapted] == [6, 6, 4, 4]


def test_a_block_is_what_the_loops_compute() -> None:
    """Tolstikhin et al. 2021, equation 1: a network on every column, then one on every row."""
    torch.manual_seed(0)
    block, x_SPD = MixerBlock(SMALL).double(), torch.randn(2, 4, 6, dtype=torch.float64)

    def network(mlp: nn.Module, vector: Tensor) -> Tensor:
        inner = mlp.up.weight @ vector + mlp.up.bias
        return mlp.down.weight @ (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) + mlp.down.bias

    def norm(layer: nn.LayerNorm, vector: Tensor) -> Tensor:
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + NORM_EPSILON).sqrt() * layer.weight + layer.bias

    expected = x_SPD.clone()
    for sample in range(2):
        rows = torch.stack([norm(block.norm1, row) for row in x_SPD[sample]])
        for channel in range(6):
            expected[sample, :, channel] += network(block.over_tokens, rows[:, channel])
        for patch, row in enumerate(expected[sample].clone()):
            expected[sample, patch] += network(block.over_channels, norm(block.norm2, row))
    torch.testing.assert_close(block(x_SPD), expected, rtol=1e-12, atol=1e-12)


def test_samples_do_not_mix_and_every_patch_counts() -> None:
    model, x = small(), images(3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)
    one = images(1).requires_grad_()
    model(one).square().sum().backward()
    assert one.grad is not None
    assert (F.max_pool2d(one.grad.abs().sum(1), 4) > 0).all()


@pytest.mark.parametrize("treatment", [ConversionSpec(), ADAPTERS], ids=["copies", "adapters"])
def test_a_converted_mixer_starts_as_the_plain_one(treatment: ConversionSpec) -> None:
    plain, x = small(), images(6)
    converted = convert(small(), 3, treatment)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(weight, merged_state(converted)[name]) for name, weight in plain.state_dict().items())


def test_every_linear_layer_but_those_at_the_ends_is_adapted() -> None:
    names = [layer.name for layer in lora_layers(convert(small(), 3, ADAPTERS))]
    assert len(names) == 2 * 4
    assert not {"patch", "head"} & set(names)


def test_recomputing_blocks_changes_no_number() -> None:
    torch.manual_seed(0)
    plain, frugal = small(), Mixer(SMALL, activation_checkpointing=True).double()
    frugal.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, frugal):
        model.train()(images(2)).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))  # type: ignore[arg-type]
