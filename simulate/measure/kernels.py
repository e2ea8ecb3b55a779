"""Measure the rates of a device's kernels by size: products, attention, AdamW, and the rest of whole steps.

Products, attention and the optimizer are timed alone. Steps of the smallest networks give the seconds of starting a
layer's kernels, and elementwise work is the rest of a larger network's step. `lte profile measure` stores the figures
in a profile (simulate.measure.machine), and simulate.costs.kernel_time plans steps with them.

Legend: M rows, I inputs, O outputs, R rank; S samples, A heads, T tokens, E numbers of a head.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from simulate.comm.echo import EchoCommunicator
from simulate.config.hardware import Kernels, OtherFamily, PackedFormat, Points
from simulate.config.method_table import BASELINE, DEFAULT_METHOD
from simulate.config.run import Run, build_run
from simulate.costs.kernel_time import (
    Curve,
    KernelRates,
    Product,
    attention_s,
    block_products,
    elementwise_s,
    outer_product,
    products_s,
)
from simulate.costs.state import persistent_state
from simulate.costs.step_time import ADAM_ELEMENTS_MOVED, ADAM_MOMENTS_MOVED, CLIP_ELEMENTS_MOVED
from simulate.layers.quantized import NF4_LIBRARY, QuantizedWeight
from simulate.measure.timer import Stopwatch
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch

FLOAT_BYTES = 4
BIN = 1.25
"""Products whose sizes differ by less than this factor are merged to one point, the median of their rates."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Sizes at which kernels and steps are measured."""

    products: Sequence[tuple[int, int, int]]
    """(rows, inputs, outputs) of a layer."""
    attention: Sequence[tuple[int, int]]
    """(tokens, numbers of a head)."""
    optimizer: Sequence[int]
    """Elements of a parameter."""
    steps: Sequence[tuple[int, int, int]]
    """(layers, width, samples) of GPT."""
    family_steps: Sequence[tuple[int, int, int]] = ()
    """(layers, width, samples) of each other family."""
    packing: Sequence[int] = ()
    """Sides of the matrices that are quantised and dequantised."""


FULL = Sizes(
    products=[
        *((rows, width, width) for rows in (64, 512, 4096) for width in (32, 96, 256, 768)),
        *((rows, width, 4 * width) for rows in (256, 2048) for width in (64, 384)),
        *((rows, width, rank) for rows in (256, 2048) for width in (64, 256, 1024) for rank in (2, 8, 32)),
        *((width, rank, 4 * width) for width in (64, 256) for rank in (2, 8, 32)),
    ],
    attention=[(16, 16), (64, 32), (128, 32), (256, 64), (512, 64)],
    optimizer=[2**15, 2**18, 2**21, 2**24],
    steps=[(2, 32, 4), (2, 64, 8), (2, 128, 4), (2, 128, 16), (2, 256, 8), (2, 384, 16)],
    family_steps=[(2, 64, 4), (2, 128, 8), (2, 256, 16)],
    packing=[64, 256, 1024],
)
QUICK = Sizes(
    products=[
        *((rows, width, width) for rows in (64, 1024) for width in (32, 96, 256, 512)),
        *((rows, width, rank) for rows in (256, 2048) for width in (64, 256) for rank in (4, 16)),
    ],
    attention=[(64, 32), (256, 64)],
    optimizer=[2**15, 2**18, 2**22],
    steps=[(2, 48, 4), (2, 96, 8), (2, 256, 8)],
    family_steps=[(2, 64, 4), (2, 192, 8)],
    packing=[96, 512],
)
CALIBRATION = Sizes(
    products=[
        *((rows, width, width) for rows in (64, 1024) for width in (32, 96, 384)),
        *((rows, 128, rank) for rows in (256, 2048) for rank in (4, 16)),
    ],
    attention=[(64, 32)],
    optimizer=[2**15, 2**21],
    steps=[(2, 64, 4), (2, 192, 8)],
    family_steps=[(2, 96, 6)],
)
"""Sizes of a measurement of a few seconds, which must not be noticed beside a training run."""
TINY_WIDTH, TINY_LAYERS = 16, (1, 5)
"""Width and layers of the networks whose steps are nothing but the starting of kernels."""
DENSE: dict[str, Any] = {"name": BASELINE}
ADAPTED: dict[str, Any] = {"name": DEFAULT_METHOD, "rank": 4, "reset": "b", "frozen_a": False}
"""Methods of the timed steps: without adapters, and with a pair on each layer that trains both factors."""


def measure_kernels(watch: Stopwatch, sizes: Sizes, log: Log) -> Kernels:
    """Measure a device's kernels in fp32."""
    log("matrix products")
    products = measure_products(watch, sizes.products)
    log("attention")
    attention, full_attention = (
        sorted(_attention(watch, tokens, width, is_causal) for tokens, width in sizes.attention)
        for is_causal in (True, False)
    )
    log("AdamW")
    call_s = _adam_s(watch, 1)  # the start of the call, which is part of the seconds of starting a step
    optimizer = sorted(_optimizer(watch, elements, call_s) for elements in sizes.optimizer)
    log("steps of the smallest networks")
    step_s, layer_s, adapter_s = _starting(watch)
    log("steps of larger networks")
    rates = KernelRates(
        Curve.of(products), Curve.of(attention), Curve((1.0,), (1.0,)), Curve.of(optimizer), step_s, layer_s, adapter_s,
        Curve.of(full_attention),
    )  # fmt: skip
    elementwise = merged(_elementwise(watch, rates, text_run(*size)) for size in sizes.steps)
    elementwise_of: dict[OtherFamily, Points] = {}
    try:
        for family in get_args(OtherFamily) if sizes.family_steps else ():
            runs = (family_run(family, *size) for size in sizes.family_steps)
            elementwise_of[family] = merged(_elementwise(watch, rates, run) for run in runs)
    except TimeoutError:  # families without points of their own use GPT's
        pass
    log("packed weights")
    unpack, pack = measure_packing(watch, sizes.packing)
    return Kernels(
        products=products, attention=attention, full_attention=full_attention, elementwise=elementwise,
        elementwise_of=elementwise_of, optimizer=optimizer, step_s=step_s, layer_s=layer_s, adapter_s=adapter_s,
        unpack=unpack, pack=pack,
    )  # fmt: skip


def measure_products(watch: Stopwatch, shapes: Sequence[tuple[int, int, int]]) -> Points:
    """Return [FLOP per element, FLOP/s] of a layer's three products, and of W + B·A where `inputs` is a rank."""
    points = []
    for rows, inputs, outputs in shapes:
        x_MI, w_OI = (torch.randn(n, inputs, device=watch.device) for n in (rows, outputs))
        g_MO = torch.randn(rows, outputs, device=watch.device)
        name, product = f"product {rows} x {inputs} x {outputs}", Product(rows, inputs, outputs, 3)
        seconds = watch.seconds(name, lambda x=x_MI, w=w_OI, g=g_MO: (x @ w.T, g @ w, g.T @ x))  # type: ignore[misc]
        points.append([product.intensity, product.flops / seconds])
        if inputs <= min(rows, outputs) // 2:  # the factors of a merge
            seconds = watch.seconds(
                f"merge {rows} x {inputs} x {outputs}",
                lambda w=g_MO[None], b=x_MI[None], a=w_OI.T[None]: w.baddbmm_(b, a, alpha=1e-3),  # type: ignore[misc]
            )
            points.append([product.intensity, product.flops / 3 / seconds])
    return merged(points)


def packed_formats() -> tuple[PackedFormat, ...]:
    """Return the formats that can be dequantised here; NF4 needs a library that may be missing."""
    known: tuple[PackedFormat, ...] = get_args(PackedFormat)
    has_nf4 = importlib.util.find_spec(NF4_LIBRARY) is not None
    return tuple(name for name in known if has_nf4 or not name.startswith("nf4"))


def measure_packing(
    watch: Stopwatch, sides: Sequence[int]
) -> tuple[dict[PackedFormat, Points], dict[PackedFormat, Points]]:
    """Return [weights, weights/s] of dequantising square matrices, and of quantising them, by format."""
    unpack: dict[PackedFormat, Points] = {}
    pack: dict[PackedFormat, Points] = {}
    for name in packed_formats() if sides else ():
        for side in sides:
            weight = torch.randn(side, side, device=watch.device)
            packed, elements = QuantizedWeight(weight, name), float(side * side)
            unpacked_s = watch.seconds(f"unpacking {side} x {side} from {name}", packed.dense)
            packed_s = watch.seconds(f"packing {side} x {side} to {name}", partial(packed.quantize, weight), most=20)
            unpack.setdefault(name, []).append([elements, elements / unpacked_s])
            pack.setdefault(name, []).append([elements, elements / packed_s])
    return unpack, pack


def _attention(watch: Stopwatch, tokens: int, width: int, is_causal: bool) -> list[float]:
    """Return [FLOP per element, FLOP/s] of attention, forward and backward.

    Causal attention counts half of all pairs of tokens, as simulate.models.shapes does.
    """
    # About 1024 tokens in each call, so that short sequences, too, fill the device.
    rows = max(1, 1024 // tokens)
    q, k, v = (torch.randn(rows, 4, tokens, width, device=watch.device, requires_grad=True) for _ in range(3))

    def both() -> None:
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    seconds = watch.seconds(f"{'causal' if is_causal else 'full'} attention {tokens} x {width}", both)
    flops = 3 * (2 if is_causal else 4) * rows * 4 * tokens * tokens * width
    return [Product(tokens, width, tokens).intensity, flops / seconds]


def _optimizer(watch: Stopwatch, elements: int, call_s: float) -> list[float]:
    moved_bytes = (ADAM_ELEMENTS_MOVED + ADAM_MOMENTS_MOVED) * elements * FLOAT_BYTES
    taken_s = _adam_s(watch, elements)
    # Noise may make a small update hardly longer than an empty call; its rate must stay finite.
    return [float(moved_bytes), moved_bytes / max(taken_s - call_s, 0.1 * taken_s)]


def _adam_s(watch: Stopwatch, elements: int) -> float:
    weight = torch.nn.Parameter(torch.zeros(elements, device=watch.device))
    weight.grad = torch.full_like(weight, 1e-3)
    return watch.seconds(f"AdamW of {elements}", torch.optim.AdamW([weight], lr=1e-6, fused=True).step)


def _starting(watch: Stopwatch) -> tuple[float, float, float]:
    """Return the seconds of starting a step, a layer and an adapter, from two depths of the smallest network."""
    # At this size the seconds are step + layer · layers: two depths give both; adapted layers have a pair on top.
    figures = []
    for method in (DENSE, ADAPTED):
        few_s, many_s = (step_s(watch, text_run(layers, TINY_WIDTH, 1, method, context=8)) for layers in TINY_LAYERS)
        layer_s = max(0.0, (many_s - few_s) / (4 * (TINY_LAYERS[1] - TINY_LAYERS[0])))
        figures.append((max(0.0, few_s - 4 * TINY_LAYERS[0] * layer_s), layer_s))
    # Each of GPT's layers has four linear ones, by which the seconds are divided above.
    (dense_step_s, dense_s), (_, adapted_s) = figures
    return dense_step_s, dense_s, max(0.0, adapted_s - dense_s)


def _elementwise(watch: Stopwatch, rates: KernelRates, run: Run) -> list[float]:
    """Return [bytes of an activation, bytes/s] of a dense step's work beside products, attention and AdamW."""
    shape = run.shape()
    taken_s = step_s(watch, run)
    moved = persistent_state(run, shape).trained * FLOAT_BYTES
    adam, clip = (ADAM_ELEMENTS_MOVED + ADAM_MOMENTS_MOVED) * moved, CLIP_ELEMENTS_MOVED * moved
    known_s = products_s((*block_products(run, shape, False), outer_product(shape, run.train.micro_batch)), rates)
    known_s += attention_s(run, shape, rates) + rates.optimizer.seconds(adam, adam + clip)
    known_s += rates.step_s + rates.layer_s * sum(linear.count for linear in shape.adapted)
    moved_bytes = elementwise_s(run, shape, rates)  # `rates` has one byte a second for it: seconds are bytes
    # A product alone may take longer than within a step, so that nothing would be left for elementwise work.
    activation_bytes = float(run.train.micro_batch * shape.tokens * shape.width * FLOAT_BYTES)
    return [activation_bytes, moved_bytes / max(taken_s - known_s, 0.05 * taken_s)]


def family_run(family: OtherFamily, layers: int, width: int, samples: int) -> Run:
    """Return a dense run of a small network of a family on one device, at 64 tokens or patches a sample."""
    sizes: dict[str, Any] = {"layers": layers, "width": width}
    if family == "llama":
        sizes |= {"attention_heads": width // 32, "mlp_width": 3 * width, "context": 64, "vocab": 64}
    else:
        sizes |= {"image": 32, "patch": 4, "colours": 3, "classes": 10}
        inner = {"tokens_width": width // 2, "channels_width": 4 * width}
        sizes |= {"attention_heads": width // 32} if family == "vit" else inner
    name = {"llama": "llama", "vit": "vit", "mixer": "mixer_s16"}[family]
    return timed_run({"name": name, **sizes}, DENSE, samples)


def text_run(layers: int, width: int, samples: int, method: dict[str, Any] = DENSE, context: int = 64) -> Run:
    """Return a run of a small GPT on one device."""
    heads = max(1, width // 32)
    model = {"name": "gpt", "layers": layers, "width": width, "attention_heads": heads, "context": context, "vocab": 64}
    return timed_run(model, method, samples)


def timed_run(model: dict[str, Any], method: dict[str, Any], samples: int, devices: int = 1) -> Run:
    """Return a run whose steps are timed, with data of the kind that the model reads."""
    data = "stdlib" if model["name"] in ("gpt", "llama") else "digits"
    return build_run(
        {
            "model": model, "data": {"name": data}, "method": method,
            "train": {"steps": 10_000, "micro_batch": samples}, "cluster": {"devices": devices},
        }
    )  # fmt: skip


def step_s(watch: Stopwatch, run: Run, least: int = 7) -> float:
    """Return the seconds of one device's step of a run, without exchanges."""
    method = build_method(run, EchoCommunicator(run.cluster.devices), watch.device)
    inputs, targets = (tensor.to(watch.device) for tensor in example_batch(run.model, run.train.micro_batch))
    name = f"step of {run.model.name} {run.method.name} {run.shape().width} wide, batch {run.train.micro_batch}"
    return watch.seconds(name, lambda: method.step(inputs, targets, 0), least, most=40)


def merged(points: Any) -> Points:
    """Return points sorted by size; neighbours within the factor BIN are merged to their median."""
    groups: list[list[list[float]]] = []
    for point in sorted(points):
        if groups and point[0] < groups[-1][0][0] * BIN:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [[float(statistics.median(column)) for column in zip(*group, strict=True)] for group in groups]
