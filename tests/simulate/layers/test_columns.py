"""Layers whose heads pick columns, against dense A: values, gradients, biases, packed weights, convolutions, calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simulate.layers import folding
from simulate.layers.columns import Columns, column_function
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear, _LoraLinear
from simulate.layers.quantized import QuantizedWeight, dense
from tests.simulate.layers.test_lora import Calls, random

pytestmark = pytest.mark.numeric

# L = 2 devices with K = 2 heads each, so H = 4; M rows a head; I = 6, O = 4, R = 2.
HEADS, INPUTS, OUTPUTS, RANK, SCALE = 4, 6, 4, 2, 1.5
COLUMNS = Columns(torch.tensor([[5, 0], [3, 1], [2, 4], [0, 3]]), INPUTS)
SLICES = Columns(torch.tensor([[4, 5], [0, 1], [2, 3], [1, 2]]), INPUTS, sliced=True)
PICKED = pytest.mark.parametrize("columns", [pytest.param(COLUMNS, id="columns"), pytest.param(SLICES, id="slices")])
WAYS = pytest.mark.parametrize("way", ["row by row", "written"])
CASES = pytest.mark.parametrize(
    ("heads", "with_bias", "quantize"), list(itertools.product((1, HEADS), (True, False), ("none", "int8", "nf4")))
)


def compute(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have every layer apply B row by row, or write it into copies of W."""
    monkeypatch.setattr(folding, "WRITTEN_WEIGHT_OPERATIONS", 0.0 if way == "written" else float("inf"))


def arguments(heads: int, with_bias: bool, quantize: Any, rows: int = 3) -> tuple[Any, ...]:
    plain = random(OUTPUTS, INPUTS).detach()
    weight = plain if quantize == "none" else QuantizedWeight(plain, quantize)
    bias = random(max(1, heads // 2), OUTPUTS) if with_bias else None
    return random(heads * rows, INPUTS), weight, bias, COLUMNS[slice(heads)], random(heads, OUTPUTS, RANK)


@WAYS
@PICKED
@CASES
def test_values_and_gradients_are_those_of_a_dense_a(
    monkeypatch: pytest.MonkeyPatch, heads: int, with_bias: bool, quantize: str, columns: Columns, way: str
) -> None:
    compute(monkeypatch, way)
    x, weight, bias, _, b = arguments(heads, with_bias, quantize)
    columns = columns[slice(heads)]
    held = dense(weight).clone()
    leaves = [leaf for leaf in (x, bias, b) if leaf is not None]
    got = column_function(x, weight, bias, columns, b, SCALE)
    expected = _LoraLinear.apply(x, weight, bias, columns.dense(b.detach()), b, None, None, SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    given = random(*got.shape).detach()
    pairs = zip(torch.autograd.grad(got, leaves, given), torch.autograd.grad(expected, leaves, given), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert torch.equal(dense(weight), held)  # nothing is left behind in W


@WAYS
def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    compute(monkeypatch, way)
    x, weight, bias, columns, b = arguments(HEADS, True, "none")
    assert torch.autograd.gradcheck(lambda x, c, b: column_function(x, weight, c, columns, b, SCALE), (x, bias, b))


def test_by_hand() -> None:
    # Rank 1 of two inputs: A is sqrt(2) at input 1, so W's second column gets s·sqrt(2)·B.
    x, b = torch.tensor([[3.0, 5.0]]), torch.tensor([[[7.0]]])
    y = column_function(x, torch.tensor([[1.0, 2.0]]), None, Columns(torch.tensor([[1]]), 2), b, 0.5)
    assert y.item() == pytest.approx(3 * 1 + 5 * (2 + 0.5 * 2**0.5 * 7))


@WAYS
def test_a_pass_saves_the_picked_columns_alone(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    compute(monkeypatch, way)
    x, weight, bias, columns, b = arguments(HEADS, True, "none", rows=50)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        column_function(x, weight, bias, columns, b, SCALE)
    assert [shape for shape in kept if 50 in shape] == [(HEADS, 50, RANK)]


@pytest.mark.parametrize(("way", "products", "thin"), [("row by row", 2, 3), ("written", 2 * HEADS, 1)])
def test_calls_of_a_pass_are_counted(monkeypatch: pytest.MonkeyPatch, way: str, products: int, thin: int) -> None:
    """No product by A either way; written, the gradient of B is the only thin one."""
    compute(monkeypatch, way)
    x, weight, bias, columns, b = arguments(HEADS, True, "none")
    with Calls() as calls:
        column_function(x, weight, bias, columns, b, SCALE).sum().backward()
    assert calls.of["addmm_"] == products and calls.of["baddbmm_"] == thin and calls.of["index_select"] == HEADS
    assert calls.of["bmm"] == 1 and not {"mm", "cat", "sum.dim"} & set(
        calls.of
    )  # the bias's gradient: a product with ones
    # The bias, the gradient of a sum, and written a copy of W for each head and direction.
    assert calls.of["copy_"] <= 2 + (2 * HEADS if way == "written" else 0)


@WAYS
def test_slices_need_no_gather(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    compute(monkeypatch, way)
    x, weight, bias, _, b = arguments(HEADS, True, "none")
    with Calls() as calls:
        column_function(x, weight, bias, SLICES, b, SCALE).sum().backward()
    assert not {"index_select", "scatter_add_", "cat"} & set(calls.of)
    # The bias, the picked inputs and the gradient of a sum; written, a copy of W each way, in which heads take turns.
    assert calls.of["copy_"] <= 2 + HEADS + (2 * HEADS if way == "written" else 0)


def test_slices_of_fake_tensors_are_taken_column_by_column() -> None:
    with FakeTensorMode() as mode:
        assert Columns(mode.from_tensor(SLICES.columns_HR), INPUTS, sliced=True).slices() is None
    assert SLICES.slices() == [slice(4, 6), slice(0, 2), slice(2, 4), slice(1, 3)]


def test_few_rows_are_taken_row_by_row_and_many_written() -> None:
    # ViT-S/16 with 32 images, a head's rows x rank over its inputs: 131 for 8 heads of 64, 16 for 32 of 32.
    assert folding.writes_columns(788, 64, 384) and not folding.writes_columns(197, 32, 384)
    assert folding.writes_columns(40, 4, 8) and not folding.writes_columns(39, 4, 8)


def spec(heads: int, rank: int) -> AdapterSpec:
    return AdapterSpec(rank, SCALE, 1, False, 0, 0, draws="columns", num_heads=heads, frozen_a=True)


@WAYS
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_the_plain_one_of_its_heads_weight(
    monkeypatch: pytest.MonkeyPatch, bias: bool, way: str
) -> None:
    compute(monkeypatch, way)
    conv = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=bias, dtype=torch.float64)
    own = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(3, 1))
    layer = LoraConv2d(conv, own, "conv", spec(3, 4), 3)  # 3 heads of rank 4 cover 2·3·2 inputs
    assert layer.draws == "columns"
    with torch.no_grad():
        layer.b.copy_(random(*layer.b.shape))
    x = random(6, 2, 7, 6)
    a_HRI = layer.draw_a(0)
    parts = []
    for head, x_part in enumerate(x.chunk(3)):
        weight = conv.weight + SCALE * (layer.b[head] @ a_HRI[head]).view_as(conv.weight)
        own_bias = None if own is None else own[head]
        parts.append(F.conv2d(x_part, weight, own_bias, conv.stride, conv.padding, conv.dilation))
    expected, got = torch.cat(parts), layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, layer.b, *([] if own is None else [own])]
    given = random(*got.shape).detach()
    pairs = zip(torch.autograd.grad(got, leaves, given), torch.autograd.grad(expected, leaves, given), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@WAYS
@pytest.mark.parametrize("heads", [1, 3])
def test_under_autocast_products_are_cast_and_w_and_b_are_not(
    monkeypatch: pytest.MonkeyPatch, heads: int, way: str
) -> None:
    compute(monkeypatch, way)
    layer = LoraLinear(torch.randn(8, 6), None, "layer", spec(heads, 6), heads)
    with torch.no_grad():
        layer.b.copy_(torch.randn(layer.b.shape))
    before, x = layer.weight.clone(), torch.randn(heads * 4, 6, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.b.grad is not None and layer.b.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", [LoraLinear, LoraConv2d])
def test_a_pass_may_be_of_one_head(kind: Any) -> None:
    """A module that a user wrote runs head by head, by the layer's pass or by its effective weight."""
    if kind is LoraConv2d:
        layer: LoraLinear = LoraConv2d(nn.Conv2d(2, 5, 2, bias=False).double(), None, "conv", spec(2, 8), 2)
        x = random(2, 2, 4, 4)
    else:
        layer, x = LoraLinear(random(5, 8).detach(), None, "layer", spec(2, 4), 2), random(2, 8)
    assert layer.draws == "columns"
    with torch.no_grad():
        layer.b.copy_(random(*layer.b.shape))
    together = layer(x)
    for head, part in enumerate(x.chunk(2)):
        layer.head = head
        weight = layer.weight_of_head()
        by_weight = F.conv2d(part, weight) if kind is LoraConv2d else F.linear(part, weight)
        torch.testing.assert_close(layer(part), together.chunk(2)[head], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(by_weight, together.chunk(2)[head], rtol=1e-13, atol=1e-13)
        layer.head = None
