"""Forecast of ReLoRA: an adapter's gradients at every step, and a merge into the weights every T steps; torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from simulate.costs.buffers import FOLD_TENSORS, at_merge, reduced_gradients
from simulate.costs.message_schedule import dense_reduction
from simulate.layers.formats import packing_bytes
from simulate.methods.plans import AdapterPlan
from simulate.methods.relora.options import ReloraOptions
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange
from simulate.rules.phases import Phase, WeightMaterialisation


class ReloraPlan(AdapterPlan[ReloraOptions]):
    """The plan of an adapter that is merged and drawn anew, after dense steps where the run warms up."""

    def __init__(self, options: ReloraOptions) -> None:
        super().__init__(options)
        self.starts_dense = options.warm_start_steps > 0

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the gradients of dense steps first, then those of the adapter."""
        warm = self.options.warm_start_steps
        adapters = PeriodicExchange(self.gradients(shape, devices, element_bytes), first=warm + 1)
        if not warm:
            return (adapters,)
        return PeriodicExchange(dense_reduction(shape, devices, element_bytes), until=warm), adapters

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the gradients' message, and the merge of one layer, which is packed where it is quantised."""
        # With a warm start the dense steps' messages are the larger ones.
        if self.starts_dense:
            yield from reduced_gradients(context, context.sizes)
        else:
            yield from super().exchange_phases(context)
        largest, element_bytes = max(context.shape.adapted, key=lambda x: x.weights), context.element_bytes
        packing = packing_bytes(largest.weights, largest.in_features, self.options.frozen_format, element_bytes)
        yield at_merge(max(FOLD_TENSORS * largest.weights * element_bytes, packing))

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return that pairs are added to each weight; before the first adapter, that the weights are there."""
        return WeightMaterialisation() if self.starts_dense else super().evaluation_weights()

    def dense_share(self, steps: int) -> float:
        """Return the warm start's share of the run."""
        return min(1.0, self.options.warm_start_steps / steps)

    def merge_flops(self, shape: ModelShape, devices: int) -> float:
        """Return the operations of a merge, a T-th of them: its rounds are steps, of which every T-th merges."""
        return 2.0 * shape.adapted_parameters * self.options.rank / self.options.merge_every
