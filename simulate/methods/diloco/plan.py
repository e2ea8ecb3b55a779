"""Forecast of DiLoCo: the change of the weights travels every T steps, whole or fragment by fragment; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.comm.transfers import Exchange, averages, filled_elements, fragment, residual_elements
from simulate.costs.buffers import averaging_phases
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.plans import MERGE_EVERY, DensePlan
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange, staggered
from simulate.rules.phases import Phase


class DilocoPlan(DensePlan[DilocoOptions]):
    """The plan of local steps and an outer step with momentum."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"merge_every": MERGE_EVERY}
    shares_state = False

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return one mean of outer gradients for each fragment."""
        counts, parts = [t.elements for t in shape.tensors], self.options.fragments
        means = [
            Exchange(averages((counts[i] for i in items), devices, self.options.wire, element_bytes))
            for items in (fragment(len(counts), parts, index) for index in range(parts))
        ]
        return staggered(means, self.options.merge_every, self.options.merge_delay)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return outer weights and momentum, error feedback, and with a delay the snapshots and the arriving means."""
        compressed = self.options.wire != "full" and devices > 1
        residuals = residual_elements(shape.parameters, devices) if compressed else 0
        return 2 * shape.parameters + residuals + (2 * shape.parameters if self.options.merge_delay else 0)

    def extra_elements_of_some(self, shape: ModelShape, devices: int, fewest: int) -> int:
        """Return outer weights and momentum, and error feedback of whole vectors."""
        if self.options.wire == "full" or devices == 1:
            return self.extra_elements(shape, devices)
        return 2 * shape.parameters + filled_elements(shape.parameters, devices, fewest)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return outer weights and momentum, and with a delay the arriving means."""
        return shape.parameters * (3 if self.options.merge_delay else 2)

    def base_bytes(self, shape: ModelShape, element_bytes: int) -> int:
        """Return the bytes of all weights and of the outer momentum."""
        return 2 * shape.parameters * element_bytes

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the memory phases of the means of outer gradients and of the outer steps, fragment by fragment."""
        for index in range(self.options.fragments):
            sizes = [context.sizes[i] for i in fragment(len(context.sizes), self.options.fragments, index)]
            yield from averaging_phases(context, sizes, self.options.wire, outer=True)

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return all parameters."""
        return shape.tensors
