"""Tests of layers with a copies axis, adapted convolutions and vectors, against plain layers in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from simulate.layers.convert import convert
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear
from simulate.layers.per_device import (
    ReplicatedConv2d,
    ReplicatedLayerNorm,
    ReplicatedLinear,
    ReplicatedModule,
    ReplicatedRmsNorm,
    VectorLora,
    replicate,
)

pytestmark = pytest.mark.numeric

SAMPLES = 6  # of all copies together
SCALE = 1.5


class Shifted(nn.Module):
    """Module of an unknown kind: a bare parameter, a linear layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 3)
        self.register_buffer("factor", torch.tensor([1.0, -2.0, 0.5]))

    factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.shift).tanh() * self.factor


def drawn(*shape: int) -> Tensor:
    """Return random numbers from a new generator, seeded by the shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def stacked_of(plain: nn.Module, copies: int) -> dict[str, nn.Parameter]:
    """Return different copies of a layer's parameters, by name."""
    stacked = {name: replicate(p, copies) for name, p in plain.named_parameters()}
    for parameter in stacked.values():
        parameter.data += 0.3 * drawn(*parameter.shape)
    return stacked


def assert_copies_are_plain(fast: nn.Module, plain: nn.Module, stacked: dict[str, nn.Parameter], x: Tensor) -> None:
    """Compare outputs and all gradients of a layer with copies with those of one plain layer a copy."""
    copies = next(iter(stacked.values())).shape[0]
    x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fast(x_fast)
    weighting = drawn(*y.shape)
    (y * weighting).sum().backward()
    leaves = [{n: p[c].detach().clone().requires_grad_() for n, p in stacked.items()} for c in range(copies)]
    parts = zip(leaves, x_slow.chunk(copies), strict=True)
    expected = torch.cat([functional_call(plain, own, (part,)) for own, part in parts])
    (expected * weighting).sum().backward()
    assert_equal(y, expected)
    assert x_fast.grad is not None and x_slow.grad is not None
    assert_equal(x_fast.grad, x_slow.grad)
    for name, parameter in stacked.items():
        assert parameter.grad is not None
        assert_equal(parameter.grad, torch.stack([gradient_of(own[name]) for own in leaves]))


def gradient_of(leaf: Tensor) -> Tensor:
    """Return a tensor's gradient, which must exist."""
    assert leaf.grad is not None
    return leaf.grad


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": (2, 1)},
    "padding": {"kernel_size": (3, 2), "padding": (2, 1)},
    "dilation": {"kernel_size": (2, 3), "dilation": (3, 2)},
    "all": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
    "pointwise": {"kernel_size": 1},
    "no bias": {"kernel_size": 3, "bias": False},
}
GROUPED: dict[str, dict[str, Any]] = {
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
}


def convolution(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, dtype=torch.float64, **settings)


IMAGES = drawn(SAMPLES, 4, 9, 8)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *GROUPED])
def test_each_copy_of_a_convolution_is_a_plain_one(name: str, copies: int) -> None:
    plain = convolution(**{**CONVOLUTIONS, **GROUPED}[name])
    stacked = stacked_of(plain, copies)
    fast = ReplicatedConv2d(plain, stacked["weight"], stacked.get("bias"))
    assert_copies_are_plain(fast, plain, stacked, IMAGES)
    assert_copies_are_plain(fast, plain, clear(stacked), IMAGES.transpose(2, 3))


def clear(stacked: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Clear gradients."""
    for parameter in stacked.values():
        parameter.grad = None
    return stacked


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_each_copy_of_an_rms_norm_is_a_plain_one(epsilon: float | None, copies: int) -> None:
    plain = nn.RMSNorm(5, eps=epsilon, dtype=torch.float64)
    stacked = stacked_of(plain, copies)
    fast = ReplicatedRmsNorm(plain.eps, stacked["weight"])
    assert_copies_are_plain(fast, plain, stacked, drawn(SAMPLES, 2, 5))
    assert_copies_are_plain(fast, plain, clear(stacked), drawn(SAMPLES, 5, 2).transpose(1, 2))


@pytest.mark.parametrize("copies", [1, 3])
def test_each_copy_of_a_layer_norm_without_bias_is_a_plain_one(copies: int) -> None:
    plain = nn.LayerNorm(5, bias=False, dtype=torch.float64)
    stacked = stacked_of(plain, copies)
    fast = ReplicatedLayerNorm(plain, stacked["weight"], None)
    assert_copies_are_plain(fast, plain, stacked, drawn(SAMPLES, 2, 5))
    assert [name for name, _ in fast.plain_tensors()] == ["weight"]


def test_an_rms_norm_by_hand() -> None:
    # The mean of squares of (3, 4) is 12.5; with an epsilon of 12.5 its root is 5.
    norm = ReplicatedRmsNorm(12.5, nn.Parameter(torch.tensor([[1.0, 1.0], [10.0, 0.0]])))
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]] * 2)), torch.tensor([[0.6, 0.8], [6.0, 0.0]]))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: nn.GroupNorm(2, 4), (SAMPLES, 4, 3, 2), id="group norm"),
        pytest.param(Shifted, (SAMPLES, 4), id="bare parameter, linear layer and buffer"),
        pytest.param(lambda: nn.LayerNorm((4, 3)), (SAMPLES, 4, 3), id="layer norm over two dimensions"),
        pytest.param(lambda: nn.ConvTranspose2d(4, 2, 3), (SAMPLES, 4, 3, 2), id="transposed convolution"),
    ],
)
def test_each_copy_of_an_unknown_module_is_a_plain_one(
    make: Callable[[], nn.Module], shape: tuple[int, ...], copies: int
) -> None:
    torch.manual_seed(0)
    plain = make().double()
    stacked = stacked_of(plain, copies)
    fast = ReplicatedModule(plain, stacked)
    assert_copies_are_plain(fast, plain, stacked, drawn(*shape))
    assert dict(fast.named_parameters()).keys() == {f"stacked.{i}" for i in range(len(stacked))}
    assert [name for name, _ in fast.plain_tensors()] == list(stacked)


def test_an_unknown_module_trains_and_rests_with_the_network() -> None:
    plain, x = nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0)), torch.ones(2, 2)
    expected = plain[0](x)
    fast = ReplicatedModule(plain, {n: replicate(p, 2) for n, p in plain.named_parameters()})
    assert not fast.train()(x).any()
    assert torch.equal(fast.eval()(x), expected)


def test_buffers_of_an_unknown_module_follow_the_network() -> None:
    plain = Shifted()
    fast = ReplicatedModule(plain, {n: replicate(p, 2) for n, p in plain.named_parameters()}).double()
    assert plain.factor.dtype == torch.float64
    assert fast(drawn(2, 4)).dtype == torch.float64


def test_a_parameter_that_an_unknown_module_has_twice_stays_one_and_keeps_both_names() -> None:
    plain = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    plain[1].weight = plain[0].weight
    stacked = nn.Parameter(drawn(2, 2, 2))
    fast, x = ReplicatedModule(plain, {"0.weight": stacked}), drawn(2, 2)
    expected = torch.cat([x[c : c + 1] @ stacked[c].T @ stacked[c].T for c in range(2)])
    assert_equal(fast(x), expected)
    assert [name for name, _ in fast.plain_tensors()] == ["0.weight", "1.weight"]


SPEC = AdapterSpec(2, SCALE, heads_per_device=1, reset_less=True, first_device=0, seed=0)


def adapted(plain: nn.Conv2d, with_old_product: bool) -> LoraConv2d:
    """Return a plain convolution with three heads, whose factors are random rather than zero."""
    bias = None if plain.bias is None else replicate(plain.bias, 3)
    layer = LoraConv2d(plain, bias, "conv", SPEC, devices=3)
    with torch.no_grad():
        layer.b.copy_(drawn(*layer.b.shape))
        if with_old_product:
            layer.remember_product(drawn(*layer.a.shape) + 1, drawn(*layer.b.shape) - 1)
        if bias is not None:
            bias += drawn(*bias.shape)
    return layer


def two_convolutions(layer: LoraConv2d, plain: nn.Conv2d, head: int, x: Tensor) -> Tensor:
    """Return W∘x + s·B∘(A∘x) − s·B0∘(A0∘x), where A is a convolution like the plain one and B a 1x1 convolution."""
    settings: dict[str, Any] = {"stride": plain.stride, "padding": plain.padding, "dilation": plain.dilation}
    y = F.conv2d(x, plain.weight.detach(), None if layer.bias is None else layer.bias[head], **settings)
    pairs = [(layer.a, layer.b, 1.0)] + ([] if layer.a0 is None else [(layer.a0, layer.b0, -1.0)])
    for a_HRI, b_HOR, sign in pairs:
        a_RCYX = a_HRI[head].view(-1, *plain.weight.shape[1:])
        y = y + sign * SCALE * F.conv2d(F.conv2d(x, a_RCYX, **settings), b_HOR[head][..., None, None])
    return y


@pytest.mark.parametrize("with_old_product", [False, True])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_an_adapted_convolution_is_three_convolutions(name: str, with_old_product: bool) -> None:
    plain = convolution(**CONVOLUTIONS[name])
    layer = adapted(plain, with_old_product)
    trained = list(layer.parameters())
    x = IMAGES.clone().requires_grad_()
    y = layer(x)
    expected = torch.cat([two_convolutions(layer, plain, head, part) for head, part in enumerate(x.chunk(3))])
    assert_equal(y, expected)
    weighting = drawn(*y.shape)
    got = torch.autograd.grad((y * weighting).sum(), [x, *trained])
    for gradient, wanted in zip(got, torch.autograd.grad((expected * weighting).sum(), [x, *trained]), strict=True):
        assert_equal(gradient, wanted)


def test_the_effective_weight_of_an_adapted_convolution_has_the_plain_shape() -> None:
    plain = convolution(kernel_size=3, padding=1)
    layer = adapted(plain, with_old_product=False)
    assert torch.equal(layer.plain_weight(fold=False), plain.weight)
    products = [SCALE * (layer.b[h] @ layer.a[h]).view(plain.weight.shape) for h in range(3)]
    assert_equal(layer.plain_weight(fold=True), plain.weight + sum(products) / 3)
    for head, part in enumerate(IMAGES.chunk(3)):
        assert_equal(
            F.conv2d(part, plain.weight + products[head], layer.bias[head], padding=1),
            two_convolutions(layer, plain, head, part),
        )


def test_a_convolution_by_hand() -> None:
    # W = (1, 2) over neighbours, A = (1, 0) picks the left one, B = 3, s = 1.5: effectively (5.5, 2).
    plain = nn.Conv2d(1, 1, (1, 2), bias=False, dtype=torch.float64)
    plain.weight.data = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)
    layer = LoraConv2d(plain, None, "conv", AdapterSpec(1, SCALE, 1, False, 0, 0), devices=1)
    with torch.no_grad():
        layer.a.copy_(torch.tensor([[[1.0, 0.0]]]))
        layer.b.fill_(3)
    assert layer(torch.tensor([[[[1.0, 10.0, 100.0]]]], dtype=torch.float64)).tolist() == [[[[25.5, 255.0]]]]


def vector() -> VectorLora:
    """Return (1, 2) with pairs of two devices: s·b·a of 2·(1, 0)·3 and 2·(0.5, 1)·1."""
    lora = VectorLora(torch.tensor([1.0, 2.0]), devices=2, scale=2.0, remembers=True)
    with torch.no_grad():
        lora.a.copy_(torch.tensor([[3.0], [1.0]]))
        lora.b.copy_(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    return lora


def test_an_effective_vector_by_hand() -> None:
    lora = vector()
    assert lora().tolist() == [[7, 2], [2, 4]]
    assert lora.a0 is not None and lora.b0 is not None
    lora.b0.copy_(torch.tensor([[0.5, 0.0], [0.0, 1.0]]))  # with a0 = 1: 2·(0.5, 0) and 2·(0, 1) less
    assert lora().tolist() == [[6, 2], [2, 2]]


def test_gradients_of_a_vectors_pair_by_hand() -> None:
    lora = vector()
    (lora() * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert lora.a.grad is not None and lora.b.grad is not None
    assert lora.a.grad.tolist() == [[2], [2100]]  # s·Σ b·g: 2·(1 + 0) and 2·(50 + 1000)
    assert lora.b.grad.tolist() == [[6, 60], [200, 2000]]  # s·a·g


def test_a_vector_starts_as_it_is_and_moves_with_b_alone_at_first() -> None:
    lora = VectorLora(torch.tensor([1.0, 2.0]), devices=2, scale=2.0, remembers=False)
    assert lora().tolist() == lora.merged.tolist() == [[1, 2], [1, 2]]
    lora().sum().backward()
    assert lora.a.grad is not None and not lora.a.grad.any()
    assert lora.b.grad is not None and lora.b.grad.all()


@pytest.mark.parametrize(
    ("layer", "frozen"),
    [
        (lambda v: ReplicatedLayerNorm(nn.LayerNorm(3), v(3), v(3)), ["weight", "bias"]),
        (lambda v: ReplicatedRmsNorm(None, v(3)), ["weight"]),
        (lambda v: ReplicatedLinear(nn.Parameter(torch.ones(2, 4, 3)), v(4)), ["bias"]),
        (lambda v: LoraLinear(torch.ones(4, 3), v(4), "linear", SPEC, 2), ["weight", "bias"]),
    ],
    ids=["layer norm", "rms norm", "linear", "adapted linear"],
)
def test_what_nobody_trains_is_a_buffer_without_gradient(
    layer: Callable[[Callable[[int], Tensor]], nn.Module], frozen: list[str]
) -> None:
    built = layer(lambda size: torch.full((1, size), 2.0))
    x = torch.ones(4, 3, requires_grad=True)
    built(x).sum().backward()
    parameters, buffers = dict(built.named_parameters()), dict(built.named_buffers())
    for name in frozen:
        assert name not in parameters
        assert not buffers[name].requires_grad and buffers[name].grad is None
    assert x.grad is not None
    assert "bias" not in frozen or dict(built.plain_tensors())["bias"] is buffers["bias"]


def test_frozen_norms_of_copies_compute_like_trained_ones() -> None:
    weight, bias, x = drawn(5), drawn(5) + 1, drawn(SAMPLES, 2, 5)
    for copies in (1, 3):
        norm = ReplicatedLayerNorm(nn.LayerNorm(5), weight.expand(copies, 5), bias.expand(copies, 5))
        assert_equal(norm(x), F.layer_norm(x, [5], weight, bias))


def test_a_network_with_copies_of_everything_starts_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.RMSNorm(168), Wrapped()).double()
    expected = plain(IMAGES)
    assert_equal(convert(plain, 3)(IMAGES), expected)


class Wrapped(nn.Module):
    """Linear layer inside a module that has no other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(168, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)
