"""Tests of device-batched layers against plain ones, copy by copy, of draws of A, and of `convert` on a GPT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simulate.common.errors import InputError
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, LoraLinear, _LoraLinear, lora_layers
from simulate.layers.per_device import ReplicatedEmbedding, ReplicatedLayerNorm, ReplicatedLinear, _ReplicatedLayerNorm
from simulate.methods.build_network import build_model
from tests import tiny

pytestmark = pytest.mark.numeric

# L = 2 devices with K = 2 heads each, so H = 4; M = 3 rows a head; I = 5, O = 4, R = 2.
HEADS, ROWS, INPUTS, OUTPUTS, RANK, SCALE = 4, 3, 5, 4, 2, 1.5
# Rows from which the old product goes into a head's weight, 2·O·I < M·(I + O); the new one on the way back, 2·O <= M;
# and both ways, 2·I <= M. With an old product that did, the new one follows on the way back, O < M; both ways, I < M.
FOLDING_ROWS = pytest.mark.parametrize("rows", [ROWS, 5, 6, 8, 10])


def spec(rank: int = RANK, heads_per_device: int = 1, first_device: int = 0, seed: int = 0) -> AdapterSpec:
    return AdapterSpec(rank, SCALE, heads_per_device, reset_less=True, first_device=first_device, seed=seed)


def random(*shape: int) -> Tensor:
    """Return a float64 leaf, seeded by its size, so that no test depends on another's draws."""
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))
    return numbers.requires_grad_()


LORA_CASES = pytest.mark.parametrize(
    ("with_bias", "with_old_product"), [(True, True), (True, False), (False, True), (False, False)]
)


def lora_arguments(
    with_bias: bool, with_old_product: bool, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, ...]:
    old = (random(HEADS, RANK, INPUTS).detach() + 1, random(HEADS, OUTPUTS, RANK).detach() - 1)
    return (
        random(HEADS * rows, INPUTS),
        random(OUTPUTS, INPUTS).detach(),
        random(HEADS // 2, OUTPUTS) if with_bias else None,
        random(HEADS, RANK, INPUTS),
        random(HEADS, OUTPUTS, RANK),
        *(old if with_old_product else (None, None)),
    )


@LORA_CASES
@FOLDING_ROWS
def test_lora_computes_with_its_effective_weight(with_bias: bool, with_old_product: bool, rows: int) -> None:
    x, weight, bias, a, b, a0, b0 = lora_arguments(with_bias, with_old_product, rows)
    got = _LoraLinear.apply(x, weight, bias, a, b, a0, b0, SCALE).view(HEADS, rows, OUTPUTS)
    for head in range(HEADS):
        effective = weight + SCALE * b[head] @ a[head]
        if a0 is not None:
            effective = effective - SCALE * b0[head] @ a0[head]
        expected = F.linear(x.view(HEADS, rows, INPUTS)[head], effective, None if bias is None else bias[head // 2])
        torch.testing.assert_close(got[head], expected, rtol=1e-12, atol=1e-12)


@LORA_CASES
@FOLDING_ROWS
def test_lora_gradients_are_those_of_finite_differences(with_bias: bool, with_old_product: bool, rows: int) -> None:
    arguments = lora_arguments(with_bias, with_old_product, rows)
    assert torch.autograd.gradcheck(lambda *tensors: _LoraLinear.apply(*tensors, SCALE), arguments)


@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_heads_folds_its_products(heads: int) -> None:
    x, weight, _, a, b, a0, b0 = lora_arguments(False, True, 10)
    x, a, b, a0, b0 = x[: heads * 10].detach(), a[:heads], b[:heads], a0[:heads], b0[:heads]
    for old in ((None, None), (a0, b0)):
        got = _LoraLinear.apply(x, weight, None, a, b, *old, SCALE).view(heads, 10, OUTPUTS)
        for head in range(heads):
            change = b[head] @ a[head] - (0.0 if old[0] is None else b0[head] @ a0[head])
            expected = x.view(heads, 10, INPUTS)[head] @ (weight + SCALE * change).T
            torch.testing.assert_close(got[head], expected, rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


# Forward s·x·Aᵀ, and where nothing is folded the product by B; back s·g·B and the product by A, then B's gradient. A
# folded product takes one call for each half of the heads, to fold it, and one to multiply by it. The bias's gradient
# is a product with ones.
@pytest.mark.parametrize(
    ("rows", "frozen", "baddbmm", "bmm"),
    [
        pytest.param(ROWS, True, 2 + 2, 1 + 1, id="row by row"),
        pytest.param(10, True, (1 + 4) + 4, 1 + 1, id="folded both ways, frozen A: nobody reads s·g·B"),
        pytest.param(10, False, (1 + 4) + (1 + 4), 2 + 1, id="folded both ways, trained A: its gradient reads s·g·B"),
        pytest.param(8, True, 2 + 4, 1 + 1, id="folded on the way back alone"),
    ],
)
def test_products_of_a_pass_are_counted(rows: int, frozen: bool, baddbmm: int, bmm: int) -> None:
    x, weight, bias, a, b, *_ = lora_arguments(True, False, rows)
    with Calls() as calls:
        _LoraLinear.apply(x, weight, bias, a.detach() if frozen else a, b, None, None, SCALE).sum().backward()
    assert (calls.of["baddbmm_"], calls.of["bmm"]) == (baddbmm, bmm)


def test_lora_gradients_do_not_need_a_gradient_of_the_input() -> None:
    x, *rest = lora_arguments(True, True)
    assert torch.autograd.gradcheck(lambda *tensors: _LoraLinear.apply(x.detach(), *tensors, SCALE), rest)


def test_lora_takes_samples_and_tokens_and_a_gradient_without_strides() -> None:
    x, *rest = lora_arguments(True, True)
    flat = _LoraLinear.apply(x, *rest, SCALE)
    deep = _LoraLinear.apply(x.view(2, HEADS // 2 * ROWS, INPUTS), *rest, SCALE)
    assert torch.equal(deep.flatten(0, 1), flat)
    (expected,) = torch.autograd.grad(flat, x, torch.ones_like(flat))
    (got,) = torch.autograd.grad(deep.sum(), x)  # the gradient of a sum is one number with strides of zero
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_gradients_are_those_of_finite_differences() -> None:
    arguments = (random(6, 5), random(2, 5), random(2, 5))
    assert torch.autograd.gradcheck(lambda *tensors: _ReplicatedLayerNorm.apply(*tensors, 1e-5), arguments)


@pytest.mark.parametrize("copies", [1, 3])
def test_each_copy_of_a_layer_norm_is_a_plain_one(copies: int) -> None:
    weight, bias, x = random(copies, 5), random(copies, 5), random(6, 2, 5)
    layer = ReplicatedLayerNorm(nn.LayerNorm(5), nn.Parameter(weight), nn.Parameter(bias))
    expected = [F.layer_norm(part, [5], w, c) for part, w, c in zip(x.chunk(copies), weight, bias, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_each_copy_of_a_linear_layer_is_a_plain_one(copies: int, with_bias: bool) -> None:
    weight, bias, x = random(copies, 4, 5), random(copies, 4), random(6, 2, 5)
    layer = ReplicatedLinear(nn.Parameter(weight), nn.Parameter(bias) if with_bias else None)
    expected = [
        F.linear(part, w, c if with_bias else None) for part, w, c in zip(x.chunk(copies), weight, bias, strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copies", [1, 3])
def test_each_copy_of_an_embedding_is_a_plain_one(copies: int) -> None:
    weight, index = random(copies, 7, 5), torch.arange(24).view(6, 4) % 7
    expected = [F.embedding(part, w) for part, w in zip(index.chunk(copies), weight, strict=True)]
    assert torch.equal(ReplicatedEmbedding(nn.Parameter(weight))(index), torch.cat(expected))


def layer(devices: int = 3, name: str = "blocks.0.mlp.up", **changes: int) -> LoraLinear:
    return LoraLinear(nn.Linear(8, 6, dtype=torch.float64).weight, None, name, spec(**changes), devices)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_rows_of_a_start_orthogonal_with_the_norm_that_the_paper_gives(rank: int) -> None:
    for a_RI in layer(rank=rank).a.detach():
        expected = torch.eye(rank, dtype=torch.float64) * 8 / rank
        torch.testing.assert_close(a_RI @ a_RI.T, expected, rtol=1e-12, atol=1e-12)


def test_b_starts_at_zero() -> None:
    assert not layer().b.any()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: layer().a[1], id="another head"),
        pytest.param(lambda: layer(name="blocks.1.mlp.up").a[0], id="another layer of the same shape"),
        pytest.param(lambda: layer(seed=1).a[0], id="another seed"),
        pytest.param(lambda: layer().draw_a(1)[0], id="another merge"),
    ],
)
def test_no_two_addresses_draw_the_same_a(other: Callable[[], Tensor]) -> None:
    assert not torch.equal(layer().a[0], other())


@pytest.mark.parametrize("heads_per_device", [1, 2])
def test_a_head_draws_the_same_whoever_else_is_local(heads_per_device: int) -> None:
    all_heads = layer(devices=4, heads_per_device=heads_per_device)
    for first, devices in ((0, 1), (2, 2), (3, 1)):
        local = layer(devices=devices, heads_per_device=heads_per_device, first_device=first)
        heads = slice(first * heads_per_device, (first + devices) * heads_per_device)
        assert torch.equal(local.a, all_heads.a[heads])
        assert torch.equal(local.draw_a(7), all_heads.draw_a(7)[heads])


def test_the_method_addresses_draws_by_the_first_local_device() -> None:
    run = tiny.lte_run(devices=4, heads_per_device=2)
    together, alone = tiny.build(run), tiny.build(run, local_devices=range(2, 3))
    for of_all, of_one in zip(lora_layers(together.model), lora_layers(alone.model), strict=True):
        assert torch.equal(of_all.a[4:6], of_one.a)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny.build(tiny.lte_run())
    assert torch.equal(torch.get_rng_state(), before)


def test_convert_adapts_every_linear_layer_but_the_tied_head() -> None:
    plain = build_model(tiny.lte_run())
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    adapted = [module.name for module in lora_layers(convert(plain, 2, ConversionSpec(lora(spec(), 2))))]
    assert adapted == [name for name in linears if name != "head"]


def test_a_tied_parameter_stays_one_parameter() -> None:
    model = convert(build_model(tiny.lte_run()), 3, ConversionSpec(lora(spec(), 3)))
    assert model.get_submodule("head").weight is model.get_submodule("token").weight


@pytest.mark.parametrize("treatment", [ConversionSpec(), ConversionSpec(lora(spec(), 2))])
def test_a_converted_network_starts_as_the_plain_one(treatment: ConversionSpec) -> None:
    run = tiny.lte_run()
    inputs, _ = tiny.batches(run).batch(0, range(2))
    plain = build_model(run)
    converted = convert(build_model(run), 2, treatment)
    torch.testing.assert_close(converted(inputs), plain(inputs), rtol=1e-12, atol=1e-12)


def test_converting_and_merging_back_loses_nothing() -> None:
    plain = build_model(tiny.lte_run())
    merged = merged_state(convert(build_model(tiny.lte_run()), 2, ConversionSpec(lora(spec(), 2))))
    assert merged.keys() == plain.state_dict().keys()
    assert all(torch.equal(weight, merged[name]) for name, weight in plain.state_dict().items())


def test_batch_normalisation_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(1))
    with pytest.raises(InputError, match="1 is a BatchNorm2d") as caught:
        convert(model, 2)
    assert "\n" not in str(caught.value)


def test_inputs_need_not_be_contiguous() -> None:
    x = torch.randn(3, 4, 4, dtype=torch.float64).transpose(0, 1)
    norm = ReplicatedLayerNorm(
        nn.LayerNorm(4), *(nn.Parameter(torch.rand(2, 4, dtype=torch.float64)) for _ in range(2))
    )
    strided, packed = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.contiguous().requires_grad_()
    for value in (strided, packed):
        norm(value).square().sum().backward()
    assert strided.grad is not None and packed.grad is not None
    torch.testing.assert_close(strided.grad, packed.grad)
