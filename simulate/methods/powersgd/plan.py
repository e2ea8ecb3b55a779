"""Forecast of PowerSGD: two factors of every matrix's gradient, and all other gradients as they are; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.comm.transfers import Exchange, averages, bucket_bytes
from simulate.costs.buffers import with_gradients
from simulate.methods.plans import DensePlan
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase


class PowerSgdPlan(DensePlan[PowerSgdOptions]):
    """The plan of rank-r gradients with error feedback."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"rank": (4, 16)}

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return three messages a step: all P, all Q, all gradients that stay dense."""
        p, q, dense = list[int](), list[int](), list[int]()
        for tensor in shape.tensors:
            if self.options.is_compressible(tensor.shape):
                outputs, inputs = tensor.shape
                p.append(outputs * self.options.rank)  # P is (O, r), Q is (I, r)
                q.append(inputs * self.options.rank)
            else:
                dense.append(tensor.elements)
        messages = (averages(counts, devices, "full", element_bytes) for counts in (p, q, dense))
        return (PeriodicExchange(Exchange(tuple(t for message in messages for t in message))),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the residual of every matrix, and its Q for the next step."""
        matrices = [t for t in shape.tensors if self.options.is_compressible(t.shape)]
        return sum(t.elements + self.options.rank * t.shape[1] for t in matrices)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the one memory phase: factors of all matrices, and the largest message of the other gradients."""
        tensors, rank = context.shape.tensors, self.options.rank
        factors = sum(rank * sum(t.shape) for t in tensors if self.options.is_compressible(t.shape))
        rest = [t.elements * context.element_bytes for t in tensors if not self.options.is_compressible(t.shape)]
        message = max(bucket_bytes(rest), default=0) if context.devices > 1 else 0
        yield with_gradients(context, factors * context.element_bytes + message)

    def update_flops(self, shape: ModelShape) -> float:
        """Return the operations of M·Q, Mᵀ·P and P·Qᵀ for every matrix."""
        return 6.0 * self.options.rank * shape.parameters
