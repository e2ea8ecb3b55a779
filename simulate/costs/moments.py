"""Count the bytes of the optimizer's moments on one device; torch-free.

The same rules (simulate.rules.optimizer) decide in simulate.optim which parameters get 8-bit moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from simulate.config.method_options import MethodOptions
from simulate.config.run import Run
from simulate.costs.state import persistent_state, projected
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of
from simulate.rules.optimizer import BLOCK_ELEMENTS, CPU_CHUNK_BYTES, CPU_CHUNK_ELEMENTS, is_eight_bit


def moment_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes of all moments of one device."""
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    if run.train.optimizer_state == "fp32":
        return persistent_state(run, shape).moments * element_bytes
    return _eight_bit_bytes(run.method, shape, run.cluster.devices, run.train.optimizer == "muon", element_bytes)


def moment_bytes_beside_adapters(run: Run, shape: ModelShape) -> int:
    """Return the bytes of moments of trained parameters without adapters, which AdamW updates."""
    layout = plan_of(run.method).adapters(run.cluster.devices)
    element_bytes, kinds = ELEMENT_BYTES[run.train.dtype], layout.frozen_kinds if layout else frozenset()
    trained = [tensor.elements for tensor in shape.replicated if tensor.kind not in kinds]
    if run.train.optimizer_state == "fp32":
        return 2 * sum(trained) * element_bytes
    return sum(_eight_bit_pair(elements, False, element_bytes) for elements in trained)


def largest_step_bytes(run: Run, shape: ModelShape) -> int:
    """Return the working bytes of a step with projected moments, or with 8-bit ones on a CPU."""
    if run.train.optimizer == "apollo":
        # The projected gradient, or what Adam makes of it.
        sizes = (rank * max(x.out_features, x.in_features) for x, rank in projected(shape, run.train.apollo_rank))
        return max(sizes, default=0) * ELEMENT_BYTES[run.train.dtype]
    if run.train.optimizer_state == "fp32":
        return 0
    muon = run.train.optimizer == "muon"
    # One parameter at a time is updated, in chunks; Muon's one moment is not in 8 bits.
    chunks = (rows * elements for rows, elements, has_one in _trained(run.method, shape, run.cluster.devices, muon)
             if is_eight_bit(elements) and not has_one)  # fmt: skip
    return min(max(chunks, default=0), CPU_CHUNK_ELEMENTS) * CPU_CHUNK_BYTES


@lru_cache(maxsize=4096)
def _eight_bit_bytes(method: MethodOptions, shape: ModelShape, devices: int, muon: bool, element_bytes: int) -> int:
    trained = _trained(method, shape, devices, muon)
    return sum(rows * _eight_bit_pair(elements, has_one, element_bytes) for rows, elements, has_one in trained)


def _eight_bit_pair(elements: int, has_one: bool, element_bytes: int) -> int:
    """Return the bytes of a parameter's moments: large ones in 8 bits, except Muon's one (`has_one`)."""
    if has_one:
        return elements * element_bytes
    if is_eight_bit(elements):  # a byte an element, and a float32 scale a block
        return 2 * (elements + -(-elements // BLOCK_ELEMENTS) * 4)
    return 2 * elements * element_bytes


def _trained(method: MethodOptions, shape: ModelShape, devices: int, muon: bool) -> Iterator[tuple[int, int, bool]]:
    """Yield (rows, elements of a row, whether Muon updates it) of each parameter that one device trains."""
    plan = plan_of(method)
    layout = None if plan.starts_dense else plan.adapters(devices)
    if layout is None:  # Muon updates the matrices of linear layers, AdamW the rest
        for tensor in shape.tensors:
            yield 1, tensor.elements, muon and tensor.kind == "adapted"
        return
    for linear in shape.adapted:
        for side in (linear.out_features,) if layout.frozen_a else (linear.out_features, linear.in_features):
            for _ in range(linear.count):
                yield layout.stacked, side * layout.held_rank // layout.stacked, muon
    for tensor in shape.replicated:
        if tensor.kind not in layout.frozen_kinds:
            yield 1, tensor.elements, False
