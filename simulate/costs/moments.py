"""Bytes of the optimizer's moments on one device; torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from simulate.config.method_options import AdapterOptions, MethodOptions
from simulate.config.run import Run
from simulate.costs.state import frozen_kinds, holding
from simulate.layers.formats import ELEMENT_BYTES
from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.lte.options import LteOptions
from simulate.methods.relora.options import ReloraOptions
from simulate.models.shapes import ModelShape
from simulate.rules.optimizer import BLOCK_ELEMENTS, CPU_CHUNK_BYTES, CPU_CHUNK_ELEMENTS, is_eight_bit


def moment_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes of all moments of one device."""
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    if run.train.optimizer_state == "fp32":
        return holding(run, shape).moments * element_bytes
    return _eight_bit_bytes(run.method, shape, run.cluster.devices, run.train.optimizer == "muon", element_bytes)


def moment_bytes_beside_adapters(run: Run, method: AdapterOptions, shape: ModelShape) -> int:
    """Return the bytes of the moments of what is trained beside adapters, which AdamW steps."""
    element_bytes, kinds = ELEMENT_BYTES[run.train.dtype], frozen_kinds(method)
    trained = [tensor.elements for tensor in shape.replicated if tensor.kind not in kinds]
    if run.train.optimizer_state == "fp32":
        return 2 * sum(trained) * element_bytes
    return sum(_eight_bit_pair(elements, False, element_bytes) for elements in trained)


def largest_step_bytes(run: Run, shape: ModelShape) -> int:
    """Return the working memory of a step with 8 bits, on a CPU."""
    if run.train.optimizer_state == "fp32":
        return 0
    muon = run.train.optimizer == "muon"
    sizes = (rows * elements for rows, elements, has_one in _trained(run.method, shape, run.cluster.devices, muon)
             if is_eight_bit(elements) and not has_one)  # fmt: skip
    return min(max(sizes, default=0), CPU_CHUNK_ELEMENTS) * CPU_CHUNK_BYTES


@lru_cache(maxsize=4096)
def _eight_bit_bytes(method: MethodOptions, shape: ModelShape, devices: int, muon: bool, element_bytes: int) -> int:
    trained = _trained(method, shape, devices, muon)
    return sum(rows * _eight_bit_pair(elements, has_one, element_bytes) for rows, elements, has_one in trained)


def _eight_bit_pair(elements: int, has_one: bool, element_bytes: int) -> int:
    """Return the bytes of a parameter's moments where large ones are kept in 8 bits; Muon's one is not."""
    if has_one:
        return elements * element_bytes
    if is_eight_bit(elements):
        return 2 * (elements + -(-elements // BLOCK_ELEMENTS) * 4)
    return 2 * elements * element_bytes


def _trained(
    method: MethodOptions, shape: ModelShape, devices: int, muon: bool
) -> Iterator[tuple[int, int, bool]]:  # fmt: skip
    """Yield (rows, elements of one, whether Muon steps it) of every parameter that one device trains."""
    if not isinstance(method, AdapterOptions) or (isinstance(method, ReloraOptions) and method.warm_start_steps):
        for tensor in shape.tensors:
            yield 1, tensor.elements, muon and tensor.kind == "adapted"
        return
    held = method.held_rank(devices)
    pairs = method.experts if isinstance(method, AdamixOptions) else getattr(method, "heads_per_device", 1)
    rows = pairs if isinstance(method, LteOptions | AdamixOptions) else 1  # mhlora's heads are one pair of their rank
    frozen_a = isinstance(method, LteOptions) and method.frozen_a
    for linear in shape.adapted:
        for side in (linear.out_features,) if frozen_a else (linear.out_features, linear.in_features):
            for _ in range(linear.count):
                yield rows, side * held // rows, muon
    kinds = frozen_kinds(method)
    for tensor in shape.replicated:
        if tensor.kind not in kinds:
            yield 1, tensor.elements, False
