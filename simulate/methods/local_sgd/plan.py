"""Forecast of local SGD: whole weights travel every T steps; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.comm.transfers import (
    Exchange,
    Operation,
    Transfer,
    averages,
    bucket_bytes,
    filled_elements,
    residual_elements,
)
from simulate.costs.buffers import averaging_phases
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.plans import MERGE_EVERY, DensePlan
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange, merge_every
from simulate.rules.phases import Phase

MOMENTS_TOO = 3
"""Weights and both of Adam's moments, where moments are averaged as well."""


class LocalSgdPlan(DensePlan[LocalSgdOptions]):
    """The plan of devices that train alone for a round and average their weights."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"merge_every": MERGE_EVERY}
    shares_state = False

    def __init__(self, options: LocalSgdOptions) -> None:
        super().__init__(options)
        self.drops_moments = "all" if options.merge_optimizer == "reset" else "none"
        self.drops_at_once = not options.merge_delay  # a late merge drops them when it is applied
        self._tensors = MOMENTS_TOO if options.merge_optimizer == "average" else 1
        self._is_served = options.merge_transport == "server"

    def _keeps_last_average(self, devices: int) -> bool:
        """Whether training itself needs the last merge's averages: compressed and late merges do."""
        return bool(self.options.merge_delay) or (self.options.wire != "full" and devices > 1)

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the mean of all weights every T steps, or the pushes and pulls of the round's participants."""
        # Moments are as large as weights, and travel in messages with them.
        counts = [t.elements for t in shape.tensors] * self._tensors
        if self._is_served:
            # Idle devices neither push nor pull.
            active = self.options.participants(devices)
            sizes = bucket_bytes([count * element_bytes for count in counts])
            operations: tuple[Operation, ...] = ("push", "pull")
            exchange = Exchange(tuple(Transfer(operation, size, active) for size in sizes for operation in operations))
        else:
            exchange = Exchange(averages(counts, devices, self.options.wire, element_bytes))
        return (merge_every(exchange, self.options.merge_every, self.options.merge_delay),)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the last averages, error feedback, and with a delay the snapshots and the arriving means."""
        last = shape.parameters if self._keeps_last_average(devices) else 0
        compressed = self.options.wire != "full" and devices > 1
        residuals = residual_elements(shape.parameters, devices) if compressed else 0
        return last + residuals + (2 * shape.parameters if self.options.merge_delay else 0)

    def extra_elements_of_some(self, shape: ModelShape, devices: int, fewest: int) -> int:
        """Return the last averages, and error feedback of whole vectors."""
        if self.options.wire == "full" or devices == 1:
            return self.extra_elements(shape, devices)
        return shape.parameters + filled_elements(shape.parameters, devices, fewest)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the last averages, and with a delay the arriving means."""
        return shape.parameters * (self._keeps_last_average(devices) + bool(self.options.merge_delay))

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the means of full copies, message by message."""
        return averaging_phases(context, context.sizes * self._tensors, self.options.wire, self._is_served)

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return all parameters."""
        return shape.tensors

    def separate_copies(self, devices: int) -> int:
        """Return the round's participants: each has a copy of its own."""
        return self.options.participants(devices)

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return all weights, where the method does not keep them itself."""
        return 0 if self._keeps_last_average(devices) else sum(tensor.elements for tensor in shape.tensors)
