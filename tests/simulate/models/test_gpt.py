"""Tests of the GPT: its attention against loops, its counts against the torch-free shapes and published ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simulate.layers.lora import lora_layers
from simulate.methods.build_network import build_model, empty_model
from simulate.methods.lte.train import Lte
from simulate.models.blocks import Attention
from simulate.models.families.gpt import GptModel
from simulate.models.gpt import Gpt
from tests import tiny


def slow_attention(attention: Attention, x_STD: Tensor) -> Tensor:
    """Return causal self-attention, one query after another (Vaswani et al. 2017, equation 1)."""
    samples, tokens, width = x_STD.shape
    size = width // attention.heads
    mixed = torch.zeros_like(x_STD)
    for sample in range(samples):
        q, k, v = (attention.qkv.weight @ x_STD[sample].T + attention.qkv.bias[:, None]).T.chunk(3, dim=1)
        for head in range(attention.heads):
            part = slice(head * size, (head + 1) * size)
            for now in range(tokens):
                scores = torch.stack([q[now, part] @ k[past, part] for past in range(now + 1)]) / math.sqrt(size)
                shares = scores.exp() / scores.exp().sum()
                mixed[sample, now, part] = sum(share * v[past, part] for past, share in enumerate(shares))
    return attention.project(mixed)


def test_attention_is_what_the_loops_compute() -> None:
    torch.manual_seed(0)
    attention, x = Attention(width=12, heads=3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), slow_attention(attention, x), rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    run = tiny.lte_run()
    model = build_model(run)
    inputs, _ = tiny.batches(run).batch(0, range(1))
    changed = inputs.clone()
    changed[:, 5] = 65
    torch.testing.assert_close(model(inputs)[:, :5], model(changed)[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(inputs)[:, 5:], model(changed)[:, 5:])


def test_activation_checkpointing_changes_no_number() -> None:
    run = tiny.lte_run(train={"steps": 6})
    frugal = tiny.lte_run(train={"steps": 6, "activation_checkpointing": True})
    tiny.assert_parity(tiny.train(tiny.build(frugal)), tiny.train(tiny.build(run)), tolerance=0)


def test_the_head_is_tied_to_the_token_embedding() -> None:
    model = build_model(tiny.lte_run())
    assert isinstance(model, Gpt)
    assert model.head.weight is model.token.weight


def test_a_seed_names_the_start_weights_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_model(tiny.lte_run(train={"seed": seed})) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(w, same.state_dict()[name]) for name, w in one.state_dict().items())
    assert not torch.equal(one.state_dict()["token.weight"], other.state_dict()["token.weight"])


def test_double_precision_starts_from_the_same_numbers() -> None:
    single = build_model(tiny.lte_run(train={"dtype": "fp32"})).state_dict()
    double = build_model(tiny.lte_run(train={"dtype": "fp64"})).state_dict()
    assert all(torch.equal(w.double(), double[name]) for name, w in single.items())


def test_layers_into_the_residual_stream_start_smaller() -> None:
    model = Gpt(GptModel(layers=8, width=128))
    ratio = model.blocks[0].mlp.down.weight.std() / model.blocks[0].mlp.up.weight.std()
    assert ratio.item() == pytest.approx(1 / math.sqrt(2 * 8), rel=0.05)


def meta_model(**sizes: Any) -> Gpt:
    with torch.device("meta"):
        return Gpt(GptModel(**sizes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As counted in the published checkpoints (Radford et al. 2019), head tied.
    [
        ("minigpt", 10_844_160),
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_gpt_2_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    assert GptModel(name=name).shape().parameters == parameters
    assert sum(parameter.numel() for parameter in meta_model(name=name).parameters()) == parameters


def sizes_of_tensors(model: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in model.parameters())


@given(
    layers=st.integers(1, 4),
    attention_heads=st.integers(1, 3),
    size=st.integers(1, 4),
    context=st.integers(1, 9),
    vocab=st.integers(1, 300),
)
def test_the_shape_counts_the_tensors_of_the_network(
    layers: int, attention_heads: int, size: int, context: int, vocab: int
) -> None:
    sizes = {"layers": layers, "width": attention_heads * size, "context": context, "vocab": vocab}
    shape = GptModel(attention_heads=attention_heads, **sizes).shape()
    model = meta_model(attention_heads=attention_heads, **sizes)
    assert tuple(t.elements for t in shape.tensors) == sizes_of_tensors(model)
    assert shape.parameters == sum(t.elements for t in shape.tensors)
    assert shape.adapted_parameters + shape.replicated_parameters == shape.parameters


def test_the_shape_names_what_the_engine_adapts_and_replicates() -> None:
    run = tiny.lte_run(devices=3)
    shape, engine = run.model.shape(), tiny.build(run)
    assert isinstance(engine, Lte)
    assert [t.shape for t in shape.replicated] == [tuple(p[0].shape) for p in engine.replicated_parameters]
    planned = [(linear.name.split("*.")[1], linear.out_features, linear.in_features) for linear in shape.in_order()]
    built = [(layer.name.split(".", 2)[2], *layer.weight.shape) for layer in lora_layers(engine.model)]
    assert planned == built
    factors = sum(p.numel() for layer in lora_layers(engine.model) for p in (layer.a, layer.b))
    assert factors == 3 * shape.factors(rank=2)


def test_an_empty_model_has_names_and_no_storage() -> None:
    run = tiny.lte_run()
    empty = empty_model(run)
    assert empty.state_dict().keys() == build_model(run).state_dict().keys()
    assert all(parameter.is_meta for parameter in empty.parameters())
