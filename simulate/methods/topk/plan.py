"""Forecast of top-k sparsification: the largest gradient entries and their positions; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.costs.buffers import LONG_BYTES, gathered_gradients
from simulate.costs.message_schedule import gathered
from simulate.methods.plans import DensePlan
from simulate.methods.topk.options import INDEX_BYTES, TopkOptions
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase


class TopkPlan(DensePlan[TopkOptions]):
    """The plan of sparse gradients with error feedback."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"density": (0.01, 0.1)}
    compresses_gradients = True

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return everyone's entries of every parameter, at every step."""
        sizes = [self.options.entries(t.elements) * (element_bytes + INDEX_BYTES) for t in shape.tensors]
        return (PeriodicExchange(gathered(sizes, devices)),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the residual of every parameter."""
        return shape.parameters

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the memory phases of selecting entries, and of averaging all devices' entries."""
        element_bytes = context.element_bytes
        entries = [self.options.entries(t.elements) for t in context.shape.tensors]
        sent = [k * (element_bytes + INDEX_BYTES) for k in entries]
        held = [size + k * (element_bytes + LONG_BYTES) for size, k in zip(context.sizes, entries, strict=True)]
        # A device's sum and mean of one parameter, and one device's positions.
        averaged = [2 * size + k * LONG_BYTES for size, k in zip(context.sizes, entries, strict=True)]
        return gathered_gradients(context, sent, held, averaged)
