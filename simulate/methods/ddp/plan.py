"""Forecast of dense data parallelism: one mean of all gradients at every step; torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.comm.transfers import bucket, residual_elements
from simulate.costs.buffers import compressed_mean, with_gradients
from simulate.costs.message_schedule import dense_reduction
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.plans import DensePlan
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase


class DdpPlan(DensePlan[DdpOptions]):
    """The plan of dense training, the baseline."""

    def __init__(self, options: DdpOptions) -> None:
        super().__init__(options)
        self.compresses_gradients = options.wire != "full"

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the mean of all gradients at every step."""
        return (PeriodicExchange(dense_reduction(shape, devices, element_bytes, self.options.wire)),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the error feedback of compressed messages."""
        compressed = self.options.wire != "full" and devices > 1
        return residual_elements(shape.parameters, devices) if compressed else 0

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield a memory phase for each message: gradients not yet averaged, and the means so far."""
        if self.options.wire == "full" or context.devices == 1:
            yield from super().exchange_phases(context)
            return
        done, left = 0, context.gradients
        for group in bucket(context.sizes):
            message = sum(context.sizes[i] for i in group)
            left -= message
            mean = compressed_mean(context, message // context.element_bytes, self.options.wire)
            yield with_gradients(context, done + left + max(mean.held, message) - context.gradients)
            done += mean.last  # gradients are views of the mean
