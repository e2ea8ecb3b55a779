"""Forecast of DASO: gradients travel inside a node at every step, weights between nodes every T steps; torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from simulate.comm.transfers import Exchange, Transfer, bucket_bytes
from simulate.config.method_options import MethodOptions
from simulate.costs.buffers import at_merge, with_gradients
from simulate.methods.daso.options import DasoOptions
from simulate.methods.plans import DensePlan
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.method_plan import ExchangeContext, PeriodicExchange, merge_every
from simulate.rules.phases import Phase


class DasoPlan(DensePlan[DasoOptions]):
    """The plan of synchronous nodes that average their weights late."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {"merge_every": (4, 8)}
    shares_state = False

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the gradients' sum in each node, and the weights' between nodes, which each node then broadcasts."""
        size = self.options.devices_per_node
        nodes, parts = devices // size, list[PeriodicExchange]()
        sizes = bucket_bytes([t.elements * element_bytes for t in shape.tensors])
        if size > 1:
            parts.append(PeriodicExchange(Exchange(tuple(Transfer("all_reduce", b, size, nodes) for b in sizes))))
        if nodes > 1:
            # One device of each node sums with the others', and broadcasts inside its node.
            between = [(Transfer("all_reduce", b, nodes), Transfer("broadcast", b, size, nodes)) for b in sizes]
            messages = tuple(t for pair in between for t in (pair if size > 1 else pair[:1]))
            parts.append(merge_every(Exchange(messages), self.options.merge_every, self.options.delay_steps))
        return tuple(parts)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the sums of weights that travel between nodes."""
        return shape.parameters if self.options.delay_steps and devices > self.options.devices_per_node else 0

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the sums of weights that travel."""
        return self.extra_elements(shape, devices)

    def simulated_copies(self, devices: int) -> int:
        """Return one copy a node."""
        return self.options.num_nodes(devices)

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Yield the phases of the gradients' message, of the weights' sums, and of an evaluation while these travel."""
        message = max(bucket_bytes(context.sizes))
        if self.options.devices_per_node > 1:
            yield with_gradients(context, message)
        if context.devices > self.options.devices_per_node:
            yield at_merge(2 * message)
            # An evaluation divides the sums that travel into means of its own.
            yield Phase("evaluation", 0, 0, sum(context.sizes) if self.options.delay_steps else 0)

    @property
    def measured_delay_steps(self) -> int:
        """Steps that go on while a global exchange travels."""
        return self.options.delay_steps

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return all parameters, where there are several nodes."""
        return shape.tensors if devices > self.options.devices_per_node else ()

    def separate_copies(self, devices: int) -> int:
        """Return one copy a node."""
        return self.options.num_nodes(devices)

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return all weights."""
        return shape.parameters

    def fitted(self, devices: int) -> MethodOptions:
        """Return the options with nodes of one device, where devices do not fill nodes of that many."""
        uneven = devices % self.options.devices_per_node
        return self.options.model_copy(update={"devices_per_node": 1}) if uneven else self.options
