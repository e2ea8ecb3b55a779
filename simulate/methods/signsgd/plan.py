"""Forecast of signSGD: one bit an element and a magnitude a parameter; torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.costs.buffers import gathered_gradients
from simulate.costs.message_schedule import gathered
from simulate.methods.plans import DensePlan
from simulate.methods.signsgd.options import SignsgdOptions
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase


class SignsgdPlan(DensePlan[SignsgdOptions]):
    """The plan of signs with error feedback."""

    compresses_gradients = True

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return everyone's signs and magnitudes of every parameter, at every step."""
        return (PeriodicExchange(gathered([-(-t.elements // 8) + element_bytes for t in shape.tensors], devices)),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the residual of every parameter."""
        return shape.parameters

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the memory phases of taking signs, and of averaging all devices' signs."""
        elements, element_bytes = [t.elements for t in context.shape.tensors], context.element_bytes
        sent = [-(-x // 8) + element_bytes for x in elements]
        held = [(element_bytes + 1) * x for x in elements]  # the signs, and the magnitude with each
        # Everyone's signs, and with their magnitudes; then the mean beside these.
        everyones = max(context.devices * (element_bytes + 1), (context.devices + 1) * element_bytes)
        return gathered_gradients(context, sent, held, [everyones * x for x in elements])
