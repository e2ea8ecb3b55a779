"""Elements that one device keeps from step to step, and which of them a simulation of all devices keeps once.

simulate.costs.memory turns them into bytes; simulate.costs.step_time into memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.layers.formats import quantized_bytes
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import plan_of


@dataclass(frozen=True)
class PersistentState:
    """Elements of one device, beside frozen weights and activations."""

    adapters: int
    """A and B, and their values at the last merge."""
    trained: int
    """What the optimizer steps."""
    moments: int
    """AdamW's two for each trained element; Muon's one for each of a matrix."""
    extra: int
    """Error feedback, outer momentum, weights and gradients of other steps."""
    shared: bool
    """Whether all devices hold the same, so that a simulation keeps it once (but for `extra`)."""


@by_method
def persistent_state(run: Run, shape: ModelShape) -> PersistentState:
    """Return what a device of the run keeps; with a dense warm start that of the dense steps, which hold most."""
    plan, devices, muon = plan_of(run.method), run.cluster.devices, run.train.optimizer == "muon"
    layout = None if plan.starts_dense else plan.adapters(devices)
    adapters, matrices, others = 0, shape.adapted_parameters, shape.replicated_parameters
    if layout is not None:
        adapters = shape.factors(layout.held_rank) * (2 if layout.subtracts else 1)
        matrices = shape.factors(layout.held_rank, layout.frozen_a)
        others = _elements_without(shape, layout.frozen_kinds)
    return PersistentState(
        adapters=adapters,
        trained=matrices + others,
        moments=(1 if muon else 2) * matrices + 2 * others,
        extra=plan.extra_elements(shape, devices),
        shared=plan.shares_state,
    )


@lru_cache(maxsize=64)
def _elements_without(shape: ModelShape, frozen: frozenset[str]) -> int:
    return sum(tensor.elements for tensor in shape.replicated if tensor.kind not in frozen)


@lru_cache(maxsize=256)
def frozen_bytes(shape: ModelShape, quantize: str, element_bytes: int) -> int:
    """Bytes of all adapted weights in their frozen format."""
    return sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) * x.count for x in shape.adapted)
