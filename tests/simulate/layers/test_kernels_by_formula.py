"""Kernels of libraries whose results are relied on, held to their plain formulas over a grid of sizes.

Kernels are chosen by processor and size, so a mistake can show on one machine and at some widths only. Each check takes
the kernel that it looks at; a broken one must make it fail.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulate.layers import quantized as quantize
from simulate.layers.attention import PerDeviceAttention
from simulate.layers.cross_entropy import soft_losses, token_losses
from simulate.layers.lora import AdapterSpec, LoraConv2d
from simulate.layers.per_device import ReplicatedConv2d
from simulate.layers.quantized import QuantizedWeight
from simulate.optim.adamw8bit import CODES, MOMENTS, SCALES, AdamW8bit, moment_of, moment_values
from simulate.rules.optimizer import BLOCK_ELEMENTS
from tests.reference.quantised import LEVELS
from tests.reference.quantiser import as_bf16

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

WIDTHS = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    72,
    80,
    96,
    112,
    127,
    128,
    144,
    160,
    192,
    240,
    257,
    288,
)
"""Odd ones, and multiples of 8, 16, 32, 48 and 96, of which 64 divides few."""
GRID = tuple(itertools.product((1, 2, 3, 5, 16, 63, 65), WIDTHS))
SAMPLE = ((1, 1), (1, 2), (1, 48), (1, 65), (2, 80), (3, 16), (5, 33), (5, 48), (16, 96), (63, 7), (64, 64), (65, 144))
Shapes = Sequence[tuple[int, int]]
ON_SHAPES = pytest.mark.parametrize(
    "shapes", [pytest.param(SAMPLE, id="sample"), pytest.param(GRID, id="grid", marks=pytest.mark.slow)]
)
TERMS_MARGIN = 4
"""Times the bound of n roundings of a sum of n terms."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_same(result: Tensor, formula: Tensor, *about: object) -> None:
    assert result.shape == formula.shape, about
    assert torch.equal(result, formula), about


def assert_sum(result: Tensor, formula: Tensor, magnitudes: Tensor, terms: int, *about: object) -> None:
    """Hold sums to those in float64, within what rounding of each term and of the result can do."""
    assert result.shape == formula.shape, about
    kind = torch.finfo(result.dtype)
    inside = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32)
    bound = kind.eps * formula.abs() + TERMS_MARGIN * (terms + 1) * inside.eps * magnitudes + 2 * kind.tiny
    assert ((result.double() - formula).abs() <= bound).all(), about


# Weights in fewer bits

Unpack = Callable[[Tensor, Tensor, torch.Size], Tensor]


def check_nf4(unpack: Unpack, shapes: Shapes) -> None:
    draws, levels = torch.Generator().manual_seed(0), torch.tensor(LEVELS)
    for rows, width in shapes:
        elements = rows * width
        values = torch.randint(0, 256, ((elements + 1) // 2,), dtype=torch.uint8, generator=draws)
        scales = torch.rand(-(-elements // 64), generator=draws)
        codes = torch.stack([values >> 4, values & 15], dim=1).view(-1)[:elements].long()
        of_blocks = scales[torch.arange(elements) // 64]
        result = unpack(values, scales, torch.Size((rows, width)))
        assert_same(result, (levels[codes] * of_blocks).view(rows, width), rows, width)


@needs_bitsandbytes
@ON_SHAPES
def test_nf4_is_levels_times_scales_to_the_bit(shapes: Shapes) -> None:
    check_nf4(quantize._unpacked_nf4, shapes)


def scales_by_rows(values: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """Unpack as if every row began with a block of its own, which bitsandbytes 0.49 to 0.50.2 does with AVX-512."""
    rows, width = shape
    codes = torch.stack([values >> 4, values & 15], dim=1).view(-1)[: rows * width].long().view(rows, width)
    block = torch.arange(rows)[:, None] * (width // 64) + torch.arange(width) // 64
    return torch.tensor(LEVELS)[codes] * scales[block.clamp(max=len(scales) - 1)]


def check_int8(dense: Callable[[QuantizedWeight], Tensor], shapes: Shapes) -> None:
    for (rows, width), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        weight = QuantizedWeight(draw(rows, width, dtype=dtype), "int8")
        # Exact in float64: 7 bits times 24.
        formula = (weight.values.double() * weight.scales.double()).to(dtype)
        assert_same(dense(weight), formula, rows, width, dtype)


@ON_SHAPES
def test_int8_is_values_times_scales_to_the_bit(shapes: Shapes) -> None:
    check_int8(QuantizedWeight.dense, shapes)


AWKWARD = (
    0.0,
    -0.0,
    1.00390625,
    1.01171875,
    -1.00390625,
    65504.0,
    65520.0,
    1e-7,
    5.96e-8,
    2.98e-8,
    3e38,
    1e-40,
    -1e-40,
)
"""Halves that go to even, the ends of what fp16 holds, and numbers below the smallest normal one."""


def check_halves(to_bf16: Callable[[Tensor], Tensor], to_fp16: Callable[[Tensor], Tensor], shapes: Shapes) -> None:
    for (rows, width), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        x = draw(rows, width, dtype=dtype)
        some = torch.tensor(AWKWARD, dtype=dtype)[: x.numel()]
        x.view(-1)[: len(some)] = some
        for form in (x, x.t()):
            assert_same(to_bf16(form).to(dtype), as_bf16(form), rows, width, dtype)
            with np.errstate(over="ignore"):
                # Torch goes from float64 by way of float32.
                formula = torch.from_numpy(form.float().numpy().astype(np.float16))
            assert_same(to_fp16(form), formula, rows, width, dtype)


@ON_SHAPES
def test_halves_are_the_nearest_to_the_bit(shapes: Shapes) -> None:
    check_halves(Tensor.bfloat16, Tensor.half, [*shapes, (0, 7), (3, 0)])


# AdamW in 8 bits

BETAS, RATE, DECAY, EPSILON = (0.9, 0.99), 0.01, 0.1, 1e-8
BETWEEN = 2.0**-15 + 1e-6
"""Of a block's scale. On a CPU the library looks the nearest value up in steps of 2^-15, so that a number between two
values goes to either of them where they are about as near, and all numbers smaller than a step to the same value."""


def library_steps(start: Tensor, gradients: Sequence[Tensor]) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
    parameter = nn.Parameter(start.clone())
    group = {"params": [parameter], "lr": RATE, "weight_decay": DECAY}
    optimizer = AdamW8bit([group], betas=BETAS, eps=EPSILON)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        yield parameter.detach().clone(), {key: value.clone() for key, value in optimizer.state[parameter].items()}


Steps = Callable[[Tensor, Sequence[Tensor]], Iterable[tuple[Tensor, dict[str, Tensor]]]]


def check_eight_bit(steps: Steps, shapes: Shapes) -> None:
    """Hold each step to the formula from the moments before it, and the moments after it to the nearest values."""
    for rows, width in shapes:
        start, *gradients = (draw(rows, width) * 10.0**-index for index in range(4))
        moments = [torch.zeros(rows, width, dtype=torch.float64)] * 2
        weights = start.double()
        for t, (after, state) in enumerate(steps(start, gradients), 1):
            g = gradients[t - 1].double()
            exact = [BETAS[0] * moments[0] + (1 - BETAS[0]) * g, BETAS[1] * moments[1] + (1 - BETAS[1]) * g * g]
            root = (exact[1] / (1 - BETAS[1] ** t)).sqrt() + EPSILON
            weights = weights * (1 - RATE * DECAY) - RATE * exact[0] / (1 - BETAS[0] ** t) / root
            torch.testing.assert_close(after.double(), weights, rtol=1e-5, atol=1e-7, msg=f"{rows} x {width}")
            for moment, values, key in zip(exact, moment_values(CPU), MOMENTS, strict=True):
                assert_nearest(moment, values, state[key + CODES], state[key + SCALES], rows, width)
            moments, weights = [moment_of(state, key).double() for key in MOMENTS], after.double()


def assert_nearest(moment_CX: Tensor, values: Tensor, codes_CX: Tensor, scales_CB: Tensor, *about: object) -> None:
    blocks = F.pad(moment_CX, (0, -moment_CX.shape[1] % BLOCK_ELEMENTS)).unflatten(1, (-1, BLOCK_ELEMENTS))
    torch.testing.assert_close(scales_CB.double(), blocks.abs().amax(2), rtol=1e-6, atol=0)
    scales_CX = scales_CB.double().repeat_interleave(BLOCK_ELEMENTS, dim=1)[:, : moment_CX.shape[1]]
    relative = (moment_CX / scales_CX.clamp(min=1e-300)).unsqueeze(2)
    apart = (relative - values.double()).abs()
    chosen = apart.gather(2, codes_CX.long().unsqueeze(2)).squeeze(2)
    assert (chosen <= apart.amin(2) + BETWEEN).all(), about


EIGHT_BIT_SAMPLE = ((1, 1), (1, 255), (2, 257), (3, 48), (3, 300), (1, 4112), (2, 512))
EIGHT_BIT_GRID = tuple(itertools.product((1, 2, 3), (*WIDTHS, 255, 256, 300, 480, 511, 513, 768, 4096, 4112, 5000)))


@needs_bitsandbytes
@pytest.mark.parametrize(
    "shapes",
    [pytest.param(EIGHT_BIT_SAMPLE, id="sample"), pytest.param(EIGHT_BIT_GRID, id="grid", marks=pytest.mark.slow)],
)
def test_adamw_in_8_bits_steps_by_its_formula(shapes: Shapes) -> None:
    before = [values.clone() for values in moment_values(CPU)]
    check_eight_bit(library_steps, shapes)
    assert all(torch.equal(x, y) for x, y in zip(before, moment_values(CPU), strict=True)), "what codes stand for"


def steps_in_blocks_over_rows(start: Tensor, gradients: Sequence[Tensor]) -> Any:
    """Step as if all rows were one, so that blocks reach over their ends; scales as rows would have them."""
    for weights, state in library_steps(start.view(1, -1), [gradient.view(1, -1) for gradient in gradients]):
        blocks = -(-start.shape[1] // BLOCK_ELEMENTS)
        for key in MOMENTS:
            state[key + CODES] = state[key + CODES].view_as(start)
            flat = state[key + SCALES].view(-1)
            state[key + SCALES] = flat[torch.arange(len(start) * blocks).clamp(max=len(flat) - 1)].view(len(start), -1)
        yield weights.view_as(start), state


# Products and convolutions

Product = Callable[[Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_products(product: Product, shapes: Shapes) -> None:
    """Hold products of two stacks to float64, (C, M, I) by (C, I, O), one of them transposed in memory."""
    for (rows, inputs), outputs, dtype in itertools.product(shapes, (1, 48, 65), DTYPES):
        x, w = draw(2, rows, inputs, dtype=dtype), draw(2, outputs, inputs, dtype=dtype).transpose(1, 2)
        exact = torch.einsum("cmi,cio->cmo", x.double(), w.double())
        size = torch.einsum("cmi,cio->cmo", x.double().abs(), w.double().abs())
        assert_sum(product(x, w), exact, size, inputs, rows, inputs, outputs, dtype)


def linear_copies(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(one, weight.t()) for one, weight in zip(x, w, strict=True)])


def added_in_place(x: Tensor, w: Tensor) -> Tensor:
    return torch.full((len(x), x.shape[1], w.shape[2]), torch.nan, dtype=x.dtype).baddbmm_(x, w, beta=0)


@pytest.mark.parametrize("product", [torch.bmm, linear_copies, added_in_place], ids=["bmm", "linear", "baddbmm"])
@ON_SHAPES
def test_products_are_sums_of_products(product: Product, shapes: Shapes) -> None:
    check_products(product, [*shapes, (0, 48)])


Convolve = Callable[[Tensor, Tensor, int, int], Tensor]


def by_positions(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Return a convolution as one product for each position of the kernel, in the order of the sum."""
    x = F.pad(x, (padding,) * 4)
    height, width = ((x.shape[axis] - w.shape[axis]) // stride + 1 for axis in (2, 3))
    parts = []
    for i, j in itertools.product(range(w.shape[2]), range(w.shape[3])):
        seen = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
        parts.append(torch.einsum("scyx,oc->soyx", seen, w[:, :, i, j]))
    return sum(parts[1:], parts[0])


def check_convolution(convolve: Convolve, channels: Iterable[tuple[int, int]]) -> None:
    """Hold outputs and gradients to the formula in float64."""
    kernels = ((1, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 1, 0))
    for (inputs, outputs), (side, stride, padding), dtype in itertools.product(
        channels, kernels, (torch.float32, torch.float64)
    ):
        x = draw(2, inputs, 7, 9, dtype=dtype).requires_grad_()
        w = draw(outputs, inputs, side, side, dtype=dtype).requires_grad_()
        result, about = convolve(x, w, stride, padding), (inputs, outputs, side, stride, padding, dtype)
        g = draw(*result.shape, dtype=dtype)
        exact = _with_gradients(by_positions, x.detach().double(), w.detach().double(), stride, padding, g.double())
        sizes = (t.detach().double().abs() for t in (x, w))
        bounds = _with_gradients(by_positions, *sizes, stride, padding, g.double().abs())
        terms = max(inputs, outputs) * side**2, inputs * side**2, 2 * result[0, 0].numel()
        got = (result.detach(), *torch.autograd.grad(result, (x, w), g))
        for ours, formula, bound in zip(got, exact, bounds, strict=True):
            assert_sum(ours, formula, bound, max(terms), *about)


def _with_gradients(
    convolve: Convolve, x: Tensor, w: Tensor, stride: int, padding: int, g: Tensor
) -> tuple[Tensor, ...]:
    result = convolve(x.requires_grad_(), w.requires_grad_(), stride, padding)
    return (result.detach(), *torch.autograd.grad(result, (x, w), g))


def as_copies(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve as two copies, each with a sample."""
    conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], stride, padding, bias=False)
    layer = ReplicatedConv2d(conv, nn.Parameter(torch.stack([w, w]).detach()), None)
    del layer._parameters["weight"]
    layer.weight = torch.stack([w, w])
    return layer(x)


def over_patches(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], stride, padding, bias=False, dtype=w.dtype)
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    y = w.flatten(1) @ patches
    return y.unflatten(2, ((x.shape[2] + 2 * padding - w.shape[2]) // stride + 1, -1))


FEW_CHANNELS, CHANNELS = ((1, 1), (3, 5), (16, 48)), tuple(itertools.product((1, 3, 8, 16, 48, 65), (1, 5, 16, 48, 96)))


@pytest.mark.parametrize("convolve", [as_copies, over_patches])
@pytest.mark.parametrize(
    "channels",
    [pytest.param(FEW_CHANNELS, id="sample"), pytest.param(CHANNELS, id="grid", marks=pytest.mark.slow)],
)
def test_convolutions_are_sums_over_the_kernel(convolve: Convolve, channels: Sequence[tuple[int, int]]) -> None:
    check_convolution(convolve, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapted_convolutions_compute_over_patches(dtype: torch.dtype) -> None:
    """The layer itself, whose B begins as zeros; with another stride along each axis, and dilated."""
    conv = nn.Conv2d(3, 5, (2, 3), (1, 2), (0, 1), (2, 1), bias=False, dtype=dtype)
    spec = AdapterSpec(2, 1.0, 1, reset_less=False, first_device=0, seed=0)
    x, w = draw(2, 3, 8, 9, dtype=dtype), conv.weight.detach()
    padded = F.pad(x, (1, 1)).double()
    exact = torch.stack(
        [
            (padded[:, None, :, y : y + 3 : 2, 2 * z : 2 * z + 3] * w.double()).sum((2, 3, 4))
            for y, z in itertools.product(range(6), range(5))
        ],
        dim=2,
    )
    result = LoraConv2d(conv, None, "conv", spec, 1)(x).detach().flatten(2)
    assert_sum(result, exact, exact.abs() + 18 * w.abs().max() * x.abs().max(), 18)


# Attention and losses

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def by_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("saqe,sake->saqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("saqk,sake->saqe", powers / powers.sum(-1, keepdim=True), v)


def causal(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, tokens), -math.inf, dtype=dtype).triu(1)


def check_attention(attend: Attend, shapes: Shapes, masked: bool = True) -> None:
    """Hold outputs and gradients to the formula in float64; shapes are (tokens, numbers of a head)."""
    masks = (False, True) if masked else (False,)
    for (tokens, head), dtype, is_causal in itertools.product(shapes, (torch.float32, torch.float64), masks):
        q, k, v = (draw(2, 3, tokens, head, dtype=dtype).roll(i, 1).requires_grad_() for i in range(3))
        mask = causal(tokens, dtype) if is_causal else None
        result = attend(q, k, v, mask)
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        formula = by_softmax(*wide, None if mask is None else mask.double())
        g = draw(*result.shape, dtype=dtype)
        ours = (result, *torch.autograd.grad(result, (q, k, v), g))
        theirs = (formula, *torch.autograd.grad(formula, wide, g.double()))
        for one, exact in zip(ours, theirs, strict=True):
            limit = 100 * torch.finfo(dtype).eps * (exact.abs().max() + 1)
            assert ((one.double() - exact).abs() <= limit).all(), (tokens, head, dtype, is_causal)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None)


def fused_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def of_layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by the layer with copies, around projections that do nothing but hand q, k and v on."""
    heads, head = q.shape[1], q.shape[3]
    plain = nn.MultiheadAttention(heads * head, heads, batch_first=True)
    x = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    layer = PerDeviceAttention(plain, _Handed(x), nn.Identity())
    return layer(x[0], x[0], x[0], attn_mask=mask)[0].unflatten(2, (heads, head)).transpose(1, 2)


class _Handed(nn.Module):
    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.parts), dim=-1)


ATTENTION_SAMPLE = ((1, 1), (3, 5), (17, 16), (48, 24), (65, 64))
ATTENTION_GRID = tuple(itertools.product((1, 2, 3, 8, 17, 33, 48, 64, 65, 96, 130), (1, 5, 8, 16, 24, 48, 64, 96)))


@pytest.mark.parametrize("attend", [fused, fused_with_mask, of_layer])
@pytest.mark.parametrize(
    "shapes",
    [pytest.param(ATTENTION_SAMPLE, id="sample"), pytest.param(ATTENTION_GRID, id="grid", marks=pytest.mark.slow)],
)
def test_attention_is_a_softmax_of_scores(attend: Attend, shapes: Shapes) -> None:
    check_attention(attend, shapes)


Losses = Callable[[Tensor, Tensor], Tensor]


def check_losses(losses: Losses, shapes: Shapes, soft: bool) -> None:
    for (rows, classes), dtype in itertools.product(shapes, DTYPES):
        kept = draw(rows, classes, dtype=dtype) * 3
        targets = draw(rows, classes).softmax(1) if soft else torch.arange(rows) % max(1, classes)
        given = targets.to(torch.promote_types(dtype, torch.float32)) if soft else targets
        logits = kept.clone().requires_grad_()
        result, exact = losses(logits * 1, given), kept.double()
        log_sum = (exact - exact.amax(1, keepdim=True)).exp().sum(1).log() + exact.amax(1)
        shares = given.double() if soft else F.one_hot(targets, classes).double()
        formula = shares.sum(1) * log_sum - (shares * exact).sum(1)
        (gradient,) = torch.autograd.grad(result.sum(), logits)
        softmax = shares.sum(1, keepdim=True) * (exact - log_sum[:, None]).exp() - shares
        eps = torch.finfo(dtype).eps
        for one, formula_of in ((result, formula), (gradient, softmax)):
            limit = 32 * eps * (1 + exact.abs().max() if rows else 1)
            assert one.shape == formula_of.shape
            assert ((one.double() - formula_of).abs() <= limit).all(), (rows, classes, dtype)


@pytest.mark.parametrize(("losses", "soft"), [(token_losses, False), (soft_losses, True)], ids=["whole", "shares"])
@ON_SHAPES
def test_losses_are_log_sums_of_exponentials(losses: Losses, soft: bool, shapes: Shapes) -> None:
    check_losses(losses, shapes, soft)


@pytest.mark.parametrize(
    "shapes", [pytest.param(SAMPLE, id="sample"), pytest.param(GRID, id="grid", marks=pytest.mark.slow)]
)
def test_layer_norms_have_no_mean_and_unit_variance(shapes: Shapes) -> None:
    for (rows, width), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        x, weight, bias = draw(rows, width, dtype=dtype), draw(width, dtype=dtype), draw(width, dtype=dtype)
        wide = x.double() - x.double().mean(1, keepdim=True)
        formula = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
        result = torch.native_layer_norm(x, [width], weight, bias, 1e-5)[0]
        limit = 100 * torch.finfo(dtype).eps * (1 + formula.abs().max())
        assert ((result.double() - formula).abs() <= limit).all(), (rows, width, dtype)


# Proof that the checks can fail


def slightly_more(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: kernel(*arguments) * (1 + 2.0**-18)


BROKEN: dict[str, Callable[[], None]] = {
    "int8": lambda: check_int8(lambda weight: weight.dense().nextafter(torch.ones(())), SAMPLE),
    "bf16": lambda: check_halves(
        lambda x: (x.float().view(torch.int32) & -65536).view(torch.float32), Tensor.half, SAMPLE
    ),
    "fp16": lambda: check_halves(Tensor.bfloat16, lambda x: x.bfloat16().half(), SAMPLE),
    "products": lambda: check_products(slightly_more(torch.bmm), SAMPLE),
    "convolutions": lambda: check_convolution(slightly_more(over_patches), FEW_CHANNELS),
    "kernel the wrong way round": lambda: check_convolution(
        lambda x, w, stride, padding: over_patches(x, w.flip(3), stride, padding), FEW_CHANNELS
    ),
    "attention": lambda: check_attention(lambda q, k, v, mask: fused(q, k, v, None), ATTENTION_SAMPLE),
    "attention, slightly": lambda: check_attention(slightly_more(fused), ATTENTION_SAMPLE),
    "losses": lambda: check_losses(slightly_more(token_losses), SAMPLE, soft=False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        BROKEN[name]()


def test_scales_of_other_blocks_are_noticed() -> None:
    check_nf4(scales_by_rows, [(5, 64), (3, 128)])  # where rows are whole blocks it is the formula
    for shape in ((5, 48), (2, 80), (3, 16 * 3), (65, 144)):
        with pytest.raises(AssertionError):
            check_nf4(scales_by_rows, [shape])


@needs_bitsandbytes
def test_blocks_over_the_ends_of_rows_are_noticed() -> None:
    check_eight_bit(steps_in_blocks_over_rows, [(2, 512)])  # where rows are whole blocks it is the formula
    with pytest.raises(AssertionError):
        check_eight_bit(steps_in_blocks_over_rows, [(3, 300)])
