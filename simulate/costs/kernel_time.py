"""Seconds of forward and backward passes from measured rates of kernels, each at its own size; torch-free.

One efficiency for all products would make low ranks look far faster than they are. So a step is divided into matrix
products, attention, elementwise kernels and the start of each layer's kernels. A product's rate depends on its
operations per element of its three matrices: small and thin products, such as those with an adapter's factors, have
few and reach little of the peak (Williams et al. 2009, the roofline model). simulate.costs.step_time and
simulate.costs.eval_and_save_time use these seconds where a profile has measured rates.

Letters: M rows, I inputs and O outputs of a layer, Y inputs and X outputs of a pass through it, R rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from simulate.config.hardware import Device, Dtype, Points
from simulate.config.run import Run
from simulate.layers.folding import folded_products, writes_columns
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import LinearShape, ModelShape
from simulate.rules.method_plan import AdapterLayout, plan_of

ACTIVATION_MOVES = 4
"""Times that an activation is moved: written and read in the forward pass, its gradient in the backward pass."""
FORWARD_MOVES = 2
"""Times that it is moved in a forward pass alone, or in one that recomputes it."""


@dataclass(frozen=True)
class Curve:
    """Rates by size, interpolated on logarithmic axes: monotone between two points, constant beyond the ends."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, points: Points, factor: float = 1.0) -> Curve:
        """Return the curve through a profile's points, all rates times `factor`."""
        return cls(tuple(size for size, _ in points), tuple(rate * factor for _, rate in points))

    def rate(self, size: float) -> float:
        """Return the rate at a size."""
        index = bisect_right(self.sizes, size)
        if index == 0 or index == len(self.sizes):
            return self.rates[min(index, len(self.sizes) - 1)]
        low, high = self.sizes[index - 1 : index + 1]
        # Rates grow as powers of the size over a limited range, which are straight lines on logarithmic axes.
        share = math.log(size / low) / math.log(high / low)
        return self.rates[index - 1] ** (1 - share) * self.rates[index] ** share

    def seconds(self, size: float, amount: float) -> float:
        """Return the seconds of an amount of work in kernels of a size."""
        return amount / self.rate(size)


@dataclass(frozen=True)
class KernelRates:
    """Rates of a device's kernels in a run's number formats."""

    products: Curve
    attention: Curve
    elementwise: Curve
    optimizer: Curve
    step_s: float
    layer_s: float
    adapter_s: float
    full_attention: Curve | None = None
    """Rates of attention without a causal mask; None: as causal attention."""
    elementwise_of: tuple[tuple[str, Curve], ...] = ()
    """Elementwise rates by family of networks, where they differ from GPT's."""
    unpack: tuple[tuple[str, Curve], ...] = ()
    """Rates of unpacking frozen weights, by format."""
    pack: tuple[tuple[str, Curve], ...] = ()
    """Rates of packing merged weights, by format."""

    @classmethod
    def of(cls, passes: Dtype, device: Device) -> KernelRates | None:
        """Return a device's rates for passes in a format; None where its kernels were not measured."""
        if device.kernels is None:
            return None
        # Rates are in fp32: products and attention scale with a format's peak, elementwise kernels are bound by memory.
        factor, kernels = device.flop_per_s.of(passes) / device.flop_per_s.fp32, device.kernels
        full = kernels.full_attention
        return cls(
            Curve.of(kernels.products, factor), Curve.of(kernels.attention, factor), Curve.of(kernels.elementwise),
            Curve.of(kernels.optimizer), kernels.step_s, kernels.layer_s, kernels.adapter_s,
            None if full is None else Curve.of(full, factor), _by_name(kernels.elementwise_of),
            _by_name(kernels.unpack), _by_name(kernels.pack),
        )  # fmt: skip


def _by_name(points: Mapping[Any, Points]) -> tuple[tuple[str, Curve], ...]:
    return tuple((name, Curve.of(of_name)) for name, of_name in points.items())


def layers_s(shape: ModelShape, quantize: str, rates: tuple[tuple[str, Curve], ...]) -> float | None:
    """Return the seconds of unpacking or packing each adapted layer once; None where that was not measured."""
    curve = dict(rates).get(quantize)
    if curve is None:
        return None
    return sum(x.count * curve.seconds(x.weights, x.weights) for x in shape.adapted)


@dataclass(frozen=True)
class Product:
    """`count` products of an (m, k) and a (k, n) matrix."""

    m: float
    k: float
    n: float
    count: float = 1

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return 2 * self.count * self.m * self.k * self.n

    @property
    def intensity(self) -> float:
        """Operations per element of the three matrices; two thirds of n for three n x n matrices."""
        return 2 * self.m * self.k * self.n / (self.m * self.k + self.k * self.n + self.m * self.n)


def products_s(products: Sequence[Product], rates: KernelRates) -> float:
    """Return the seconds of products that run one after the other."""
    return sum(rates.products.seconds(product.intensity, product.flops) for product in products)


def pass_s(run: Run, shape: ModelShape, rates: KernelRates) -> float:
    """Return the seconds of one forward and backward pass, and of starting its kernels; a step has train.accumulate."""
    plan = plan_of(run.method)  # a dense warm start counts with its share of the steps
    share = 1.0 if plan.adapters(run.cluster.devices) is None else plan.dense_share(run.train.steps)
    return share * _pass_s(run, shape, rates, False) + (1 - share) * _pass_s(run, shape, rates, True)


def _pass_s(run: Run, shape: ModelShape, rates: KernelRates, adapted: bool) -> float:
    layers = sum(linear.count for linear in shape.adapted)
    # A network of many small layers is bound by starting kernels, not by the kernels themselves.
    starting_s = rates.step_s + layers * (rates.layer_s + (rates.adapter_s if adapted else 0))
    products = block_products(run, shape, adapted)
    seconds = products_s((*products, outer_product(shape, run.train.micro_batch)), rates)
    return starting_s + seconds + attention_s(run, shape, rates) + elementwise_s(run, shape, rates, products)


def forward_s(shape: ModelShape, samples: int, element_bytes: int, rates: KernelRates) -> float:
    """Return the seconds of a forward pass of plain layers: a third of a step's products and starts, half its moves."""
    layers = sum(linear.count for linear in shape.adapted)
    products = (*_dense_products(shape, samples, False), outer_product(shape, samples))
    attention = _attention_s(shape, samples, 1, rates)
    moved_s = _elementwise_s(shape, samples, FORWARD_MOVES, FORWARD_MOVES, element_bytes, rates)
    return (rates.step_s + layers * rates.layer_s + products_s(products, rates)) / 3 + attention + moved_s


def attention_s(run: Run, shape: ModelShape, rates: KernelRates) -> float:
    """Return the seconds of the products that mix tokens without weights."""
    return _attention_s(shape, run.train.micro_batch, 4 if run.train.activation_checkpointing else 3, rates)


def _attention_s(shape: ModelShape, samples: int, passes: int, rates: KernelRates) -> float:
    head_width = shape.width / max(1, shape.attention_heads)
    # Rates of attention were measured by the size of one head's Q·K product.
    size = Product(shape.tokens, head_width, shape.tokens).intensity
    curve = rates.full_attention if shape.family == "vit" and rates.full_attention else rates.attention
    return curve.seconds(size, passes * samples * shape.mixing_flops)


def elementwise_s(run: Run, shape: ModelShape, rates: KernelRates, products: Sequence[Product] = ()) -> float:
    """Return the seconds of all elementwise kernels: norms, GELUs, sums, the loss; and copies of folded weights."""
    moves = ACTIVATION_MOVES + (FORWARD_MOVES if run.train.activation_checkpointing else 0)
    # Folding reads the weight and writes a copy.
    folded = sum(2 * product.count * product.m * product.n for product in products if isinstance(product, Folded))
    return _elementwise_s(
        shape, run.train.micro_batch, moves, ACTIVATION_MOVES, ELEMENT_BYTES[run.train.dtype], rates, folded
    )  # fmt: skip


def _elementwise_s(
    shape: ModelShape, samples: int, moves: int, outer_moves: int, element_bytes: int, rates: KernelRates,
    others: float = 0.0,
) -> float:  # fmt: skip
    """Return the seconds of moving activations so many times inside and outside blocks, and `others` elements."""
    # Elementwise kernels read and write what layers read and write; the loss does so with the logits.
    inside = sum(x.rows * (x.in_features + x.out_features) * x.count for x in shape.adapted)
    elements = samples * (moves * inside + outer_moves * shape.predictions * shape.outputs) + others
    curve = dict(rates.elementwise_of).get(shape.family, rates.elementwise)
    return curve.seconds(samples * shape.tokens * shape.width * element_bytes, elements * element_bytes)


@dataclass(frozen=True)
class Folded(Product):
    """A product of factors that is added to a copy of the frozen weights, which moves memory as well."""


def outer_product(shape: ModelShape, samples: int) -> Product:
    """Return the layers outside blocks as products of one shape: the output layer's, or for images the patches'."""
    rows, k, n = shape.predictions, shape.width, shape.outputs
    if shape.inputs:
        rows, k, n = shape.tokens, max(1, shape.inputs // shape.tokens), shape.width
    rows *= samples
    # The count makes the operations those of all layers outside blocks, which the shape counts exactly.
    return Product(rows, k, n, samples * shape.outer_flops / (2 * rows * k * n))


def block_products(run: Run, shape: ModelShape, adapted: bool) -> tuple[Product, ...]:
    """Return the products inside blocks, of dense or of adapted layers; recomputed ones count twice."""
    layout, checkpointing = plan_of(run.method).adapters(run.cluster.devices), run.train.activation_checkpointing
    if not adapted or layout is None:
        return _dense_products(shape, run.train.micro_batch, checkpointing)
    return _adapted_products(shape, run.train.micro_batch, layout, checkpointing)


@lru_cache(maxsize=1024)
def _dense_products(shape: ModelShape, samples: int, checkpointing: bool) -> tuple[Product, ...]:
    """Return each layer's products: forward, gradient of the input, gradient of the weights, all of the same size."""
    times = 4 if checkpointing else 3
    return tuple(Product(samples * x.rows, x.in_features, x.out_features, times * x.count) for x in shape.adapted)


@lru_cache(maxsize=4096)
def _adapted_products(
    shape: ModelShape, samples: int, layout: AdapterLayout, checkpointing: bool
) -> tuple[Product, ...]:
    heads, rank, reset_less, products = layout.heads, layout.row_rank, layout.subtracts, list[Product]()
    for linear in shape.adapted:
        # Each head gets an equal part of the rows.
        m, i, o = samples * linear.rows / heads, linear.in_features, linear.out_features
        count = heads * linear.count
        times = 2 if checkpointing else 1
        if layout.picks_columns(i):
            products += _through_columns(linear, m, rank, heads, times, forward=True)
            products += _through_columns(linear, m, rank, heads, 1, forward=False)
        else:
            reads_small = not layout.frozen_a
            products += _through_layer(linear, m, rank, reset_less, heads, times, forward=True, reads_small=True)
            products += _through_layer(linear, m, rank, reset_less, heads, 1, forward=False, reads_small=reads_small)
        products.append(Product(o, m, rank, count))  # the gradient of B, then that of A
        if not layout.frozen_a:
            products.append(Product(rank, m, i, count))
    return tuple(products)


def _through_layer(
    linear: LinearShape, rows: float, rank: int, reset_less: bool, heads: int, times: int, forward: bool,
    reads_small: bool,
) -> Iterator[Product]:  # fmt: skip
    """Yield the products of rows with each head's weight, as simulate.layers.lora computes them.

    `reads_small`: whether a gradient reads the product of the rows and the first factor, even if that is folded.
    """
    y, x = linear.in_features, linear.out_features  # the backward pass goes from outputs to inputs
    if not forward:
        y, x = x, y
    folds = folded_products(rows, y, x, reset_less)
    count = heads * linear.count * times
    if folds.any:
        yield Product(rows, y, x, count)
    else:  # all heads share W, so their rows go through it in one product
        yield Product(rows * heads, y, x, linear.count * times)
    if reads_small or not folds.new:
        yield Product(rows, y, rank, count)
    yield Folded(y, rank, x, count) if folds.new else Product(rows, rank, x, count)
    if folds.old:
        yield Folded(y, rank, x, count)
    elif reset_less:
        yield Product(rows, y, rank, count)
        yield Product(rows, rank, x, count)


def _through_columns(
    linear: LinearShape, rows: float, rank: int, heads: int, times: int, forward: bool
) -> Iterator[Product]:
    """Yield the products of rows with each head's weight where A picks columns (simulate.layers.columns)."""
    i, o, count = linear.in_features, linear.out_features, heads * linear.count * times
    y, x = (i, o) if forward else (o, i)
    if writes_columns(rows, rank, i):
        yield Product(rows, y, x, count)
        yield Folded(y, 0, x, count)  # a copy of W, without a product
    else:
        yield Product(rows * heads, y, x, linear.count * times)
        yield Product(rows, rank, o, count) if forward else Product(rows, o, rank, count)


def sum_of_products(run: Run, shape: ModelShape) -> tuple[Product, ...]:
    """Return the products B·A of one head in every layer; a merge computes them for each of its heads."""
    layout = plan_of(run.method).adapters(run.cluster.devices)
    rank = layout.rank if layout else 1
    return tuple(Product(x.out_features, rank, x.in_features, x.count) for x in shape.adapted)
