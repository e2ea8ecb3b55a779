"""Forecast of SparseLoCo: the largest entries of all devices' changes travel every T steps; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.comm.transfers import Exchange, bucket, fragment, sparse_mean_transfer
from simulate.costs.buffers import sparse_averaging_phases
from simulate.methods.plans import MERGE_EVERY, DensePlan
from simulate.methods.sparseloco.options import SparselocoOptions
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange, staggered
from simulate.rules.phases import Phase


class SparselocoPlan(DensePlan[SparselocoOptions]):
    """The plan of local steps and a mean of sparse changes."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"merge_every": MERGE_EVERY, "density": (0.0078125, 0.03125)}
    shares_state = False

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the entries of all devices, gathered, for each fragment."""
        options, counts = self.options, [t.elements for t in shape.tensors]
        gathers = []
        for index in range(options.fragments):
            part = [counts[i] for i in fragment(len(counts), options.fragments, index)]
            groups = bucket([count * element_bytes for count in part])
            sums = [sum(part[group.start : group.stop]) for group in groups]
            gathers.append(
                Exchange(
                    tuple(
                        sparse_mean_transfer(elements, devices, options.sparsity, options.wire, element_bytes)
                        for elements in sums
                    )
                )
            )
        return staggered(gathers, options.merge_every, options.merge_delay)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the last merge's weights, what has not travelled, and with a delay snapshots and arriving means."""
        errors = shape.parameters if devices > 1 else 0
        return shape.parameters + errors + (2 * shape.parameters if self.options.merge_delay else 0)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the weights of the last merge, and with a delay the arriving means."""
        return shape.parameters * (2 if self.options.merge_delay else 1)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the memory phases of sparse means and of the outer steps, fragment by fragment."""
        options = self.options
        for index in range(options.fragments):
            sizes = [context.sizes[i] for i in fragment(len(context.sizes), options.fragments, index)]
            yield from sparse_averaging_phases(context, sizes, options.sparsity, options.wire)

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return all parameters."""
        return shape.tensors
