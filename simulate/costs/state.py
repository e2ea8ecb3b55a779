"""Count the elements that one device keeps from step to step, and say which of them a simulation stores once.

simulate.costs.memory turns them into bytes, simulate.costs.step_time into memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.layers.formats import ELEMENT_BYTES, quantized_bytes
from simulate.models.shapes import LinearShape, ModelShape
from simulate.rules.method_plan import AdapterLayout, plan_of
from simulate.rules.optimizer import projected_rank

LONG_BYTES = 8
"""Bytes of an index."""


@dataclass(frozen=True)
class PersistentState:
    """Elements that one device keeps, without frozen weights and activations."""

    adapters: int
    """A and B, and their values at the last merge."""
    trained: int
    """Elements that the optimizer updates."""
    moments: int
    """AdamW keeps two for each trained element; Muon one for each element of a matrix; APOLLO two for each element of
    a projected matrix, and a norm."""
    projections: int
    """APOLLO's random projections, which a process holds once and never saves."""
    extra: int
    """The method's own state: error feedback, outer momentum, weights and gradients of other steps."""
    last_merge: int
    """The part of `extra` that only a quorum keeps: the last merge's averages, equal on all devices that took part."""
    shared: bool
    """Whether all devices hold equal state (except `extra`), so that a simulation stores it once."""


@by_method
def persistent_state(run: Run, shape: ModelShape) -> PersistentState:
    """Return a device's state; with a dense warm start, that of the dense steps, which hold most."""
    plan, devices = plan_of(run.method), run.cluster.devices
    layout = None if plan.starts_dense else plan.adapters(devices)
    adapters, matrices, others = 0, shape.adapted_parameters, shape.replicated_parameters
    if layout is not None:
        adapters = _adapter_elements(shape, layout, ELEMENT_BYTES[run.train.dtype])
        # Frozen A are held but not trained.
        matrices = shape.factors(layout.held_rank, layout.frozen_a)
        others = _elements_without(shape, layout.frozen_kinds)
    # Changes that come late are taken against the weights that they started from.
    last_merge = plan.last_merge_elements(shape, devices) if run.cluster.has_quorum else 0
    return PersistentState(
        adapters=adapters,
        trained=matrices + others,
        moments=_matrix_moments(run, shape, matrices) + 2 * others,
        projections=_projections(shape, run.train.apollo_rank) if run.train.optimizer == "apollo" else 0,
        extra=_extra_elements(run, shape) + last_merge,
        last_merge=last_merge,
        shared=plan.shares_state,
    )


def _matrix_moments(run: Run, shape: ModelShape, matrices: int) -> int:
    """Return the moments of so many elements of matrices."""
    if run.train.optimizer == "apollo":
        return sum(x.count * (2 * rank * max(x.out_features, x.in_features) + 1)
                   for x, rank in projected(shape, run.train.apollo_rank))  # fmt: skip
    return matrices if run.train.optimizer == "muon" else 2 * matrices


def projected(shape: ModelShape, rank: int | None) -> Iterator[tuple[LinearShape, int]]:
    """Yield the matrices that APOLLO steps, and the rank to which it projects the gradients of each."""
    for linear in shape.adapted:
        yield linear, projected_rank(rank, linear.out_features, linear.in_features)


def _projections(shape: ModelShape, rank: int | None) -> int:
    return sum(x.count * held * min(x.out_features, x.in_features) for x, held in projected(shape, rank))


def _extra_elements(run: Run, shape: ModelShape) -> int:
    plan, devices, fewest = plan_of(run.method), run.cluster.devices, run.cluster.fewest
    if fewest is None:
        return plan.extra_elements(shape, devices)
    return plan.extra_elements_of_some(shape, devices, fewest)


@lru_cache(maxsize=1024)
def _adapter_elements(shape: ModelShape, layout: AdapterLayout, element_bytes: int) -> int:
    """Return the elements of A and B; where A picks columns, their numbers count as elements of so many bytes."""
    elements = shape.factors(layout.held_rank) * (2 if layout.subtracts else 1)
    for linear in shape.adapted:
        if layout.picks_columns(linear.in_features):
            columns = layout.held_rank * LONG_BYTES // element_bytes
            elements += linear.count * (columns - layout.held_rank * linear.in_features)
    return elements


@lru_cache(maxsize=256)
def layout_elements(shape: ModelShape, layout: AdapterLayout, vectors_in_pairs: bool = False) -> tuple[int, ...]:
    """Return the elements of each parameter that is trained beside frozen weights, in the network's order.

    Where norms have pairs, a vector's is one number longer than the vector.
    """
    counts, layers = list[int](), iter(shape.in_order())
    for tensor in shape.tensors:
        if tensor.kind == "adapted":
            layer = next(layers)
            counts += [] if layout.frozen_a else [layout.held_rank * layer.in_features]
            counts.append(layout.held_rank * layer.out_features)
        elif tensor.kind not in layout.frozen_kinds:
            counts.append(tensor.elements + (tensor.kind == "norm" and vectors_in_pairs))
    return tuple(counts)


@lru_cache(maxsize=64)
def _elements_without(shape: ModelShape, frozen: frozenset[str]) -> int:
    return sum(tensor.elements for tensor in shape.replicated if tensor.kind not in frozen)


@lru_cache(maxsize=256)
def frozen_bytes(shape: ModelShape, quantize: str, element_bytes: int) -> int:
    """Return the bytes of all adapted weights in their frozen format."""
    return sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) * x.count for x in shape.adapted)
