"""Forecast of SAPipe: gradients travel behind the next step's compute; torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.comm.transfers import bucket_bytes
from simulate.costs.buffers import optimizer_bytes, with_gradients
from simulate.costs.message_schedule import dense_reduction
from simulate.methods.plans import DensePlan
from simulate.methods.sapipe.options import SapipeOptions
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase

PREDICTION_TENSORS = 5
"""Tensors of a parameter's size at the peak of the prediction: both moments, their ratio, the decay, the sum."""


class SapipePlan(DensePlan[SapipeOptions]):
    """The plan of gradients that arrive one step late."""

    compresses_gradients = True
    """Prediction and correction move about as much memory as compression does."""
    steps_until_alike = 3

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the mean of all gradients, which travels behind the next step's compute."""
        return (PeriodicExchange(dense_reduction(shape, devices, element_bytes), hidden_steps=1),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the stale gradients, and the predicted weights or (for delay compensation) the previous ones."""
        return shape.parameters * (1 if self.options.compensation == "none" else 2)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the stale gradients and the previous weights; predicted weights are each device's own."""
        return shape.parameters * (2 if self.options.compensation == "delay" else 1)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the one memory phase: own gradients stay until the step ends, beside stale ones or the message."""
        message = max(bucket_bytes(context.sizes)) if context.devices > 1 else 0
        temporary = max(context.gradients + optimizer_bytes(self, context), message)
        if self.options.compensation == "prediction":
            temporary = max(temporary, PREDICTION_TENSORS * max(context.sizes))
        elif self.options.compensation == "delay":
            done = 0
            for size in context.sizes:
                done += size
                temporary = max(temporary, done + 2 * size)  # its square, and the change of the parameter
        yield with_gradients(context, temporary)
