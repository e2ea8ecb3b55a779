"""Forecast of LTE: factors or deltas of the heads travel every T steps, and means of the parameters beside them.

With nodes of several devices, gradients travel inside of each node at every step, and merges between nodes. The buffers
follow simulate.methods.lte.merge in the order in which it makes and drops tensors. Torch-free.

Letters: N devices, M nodes (devices, where each trains alone), K heads of a device, F elements of one device's factors,
O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

from simulate.comm.transfers import (
    Exchange,
    Operation,
    Transfer,
    averages,
    bucket,
    bucket_bytes,
    copied_in_nodes,
    filled_elements,
    fragment,
    residual_elements,
    wire_bytes,
)
from simulate.costs.buffers import LONG_BYTES, at_merge, averaging_phases, compressed_mean, with_gradients
from simulate.costs.state import layout_elements
from simulate.layers.formats import PICKING, packing_bytes, quantized_bytes, unpacking_bytes
from simulate.methods.lte.options import LteOptions
from simulate.methods.plans import MERGE_EVERY, RANKS, AdapterPlan
from simulate.models.shapes import LinearShape, ModelShape, ParameterShape
from simulate.rules.method_plan import AdapterLayout, ExchangeContext, PeriodicExchange, staggered
from simulate.rules.phases import Phase, WeightMaterialisation
from simulate.rules.transport import factor_buffer_bytes, is_averaged, layer_transport

DRAW_BYTES = 3 * 8
"""Bytes of an element of A while it is drawn in fp64: its normal number, its factor of QR, the scaled one."""
JOINT_DRAW_BYTES = 8 + 16 + 8
"""Bytes of an element of one head in a joint draw: as it was, its complex transform, and what becomes of it."""


class LtePlan(AdapterPlan[LteOptions]):
    """The plan of heads that train alone for a round and merge into the weights."""

    axes: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rank": RANKS,
        "heads_per_device": (1, 4),
        "merge_every": MERGE_EVERY,
        "quantize": ("none", "int8", "nf4"),
        "merge_transport": ("gather", "reduce", "server"),
    }
    shares_state = False
    has_separate_heads = True

    def __init__(self, options: LteOptions) -> None:
        super().__init__(options)
        self.transport = options.merge_transport
        # Beside the full-precision W of quantised weights, which AdapterPlan counts.
        self.full_copies += options.reset == "none"  # the start weights, to which reset-less merges return
        self.drops_moments = "adapters" if options.merge_optimizer == "reset" else "none"
        self.drops_at_once = not options.merge_delay and options.fragments == 1
        self._is_served = options.merge_transport == "server"
        self._layout: AdapterLayout | None = None
        self._layout_of = 0
        self.quantizes_merges = not self._is_served  # a server sends weights that are packed

    def adapters(self, devices: int) -> AdapterLayout | None:
        """Return one device's heads, each of which sees its own part of the batch."""
        if self._layout_of != devices:  # costs ask ten times a candidate
            self._layout, self._layout_of = self._adapter_layout(devices), devices
        return self._layout

    def _adapter_layout(self, devices: int) -> AdapterLayout:
        options = self.options
        frozen = (("norm", options.norms == "none"), ("bias", options.biases == "frozen"))
        return AdapterLayout(
            options.rank, options.held_rank(devices), options.row_rank(devices), heads=options.heads_per_device,
            stacked=options.heads_per_device, frozen_a=options.frozen_a, subtracts=options.remembers_product,
            frozen_kinds=frozenset(kind for kind, is_frozen in frozen if is_frozen),
            column_rank=options.total_rank(options.num_nodes(devices)) if options.draws in PICKING else 0,
        )  # fmt: skip

    def messages(self, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
        """Return the sum of a node's gradients at every step, and the merge of each fragment of layers."""
        options, nodes = self.options, self.options.num_nodes(devices)
        parts = list[PeriodicExchange]()
        if (size := options.devices_per_node) > 1:
            sums = bucket_bytes(self._gradient_sizes(shape, devices, element_bytes))
            parts.append(PeriodicExchange(Exchange(tuple(Transfer("all_reduce", b, size, nodes) for b in sums))))
        if nodes == 1:
            return tuple(parts)
        exchanges = _exchanges(
            shape, tuple((len(one.devices), one.held_rank) for one in options.teams(nodes)), options.quantize,
            options.merge_transport, options.wire, options.fragments, options.norms, options.biases, options.frozen_a,
            element_bytes,
        )  # fmt: skip
        if size > 1:
            exchanges = [Exchange(copied_in_nodes(exchange.transfers, size)) for exchange in exchanges]
        return (*parts, *staggered(exchanges, options.merge_every, options.merge_delay))

    def _gradient_sizes(self, shape: ModelShape, devices: int, element_bytes: int) -> list[int]:
        """Return the bytes of the gradients of all trained parameters, in the order in which the network holds them."""
        layout = self.adapters(devices)
        assert layout is not None
        return [count * element_bytes for count in layout_elements(shape, layout, self.options.norms == "vector-lora")]

    def _keeps_last_average(self, devices: int) -> bool:
        """Whether the method keeps the last merge's averages itself: compressed, late and staggered merges do."""
        # Between such merges no device has all of the merged weights, so an evaluation needs them apart.
        late = bool(self.options.merge_delay) or self.options.fragments > 1
        exchanges = self.options.num_nodes(devices) > 1
        return late or (self.options.wire != "full" and exchanges and not self._is_served)

    def extra_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the last averages, error feedback, and with a delay the snapshots and the arriving weights."""
        options = self.options
        factors = shape.factors(options.held_rank(devices), options.frozen_a)
        kept = shape.replicated_parameters if self._keeps_last_average(devices) else 0
        if options.merge_delay:
            averaged = sum(tensor.elements for tensor in self.separate_tensors(shape, devices))
            kept += 2 * averaged + factors + shape.adapted_parameters
        nodes = options.num_nodes(devices)
        if options.wire == "full" or nodes == 1:
            return kept
        reduces = options.merge_transport == "reduce"
        adapted = residual_elements(shape.adapted_parameters, nodes) if reduces else factors
        others = 0 if self._is_served else residual_elements(shape.replicated_parameters, nodes)
        return kept + adapted + others

    def extra_elements_of_some(self, shape: ModelShape, devices: int, fewest: int) -> int:
        """Return the last averages, and error feedback of factors and of whole vectors."""
        options = self.options
        if options.wire == "full" or devices == 1:
            return self.extra_elements(shape, devices)
        reduces = options.merge_transport == "reduce"
        factors = shape.factors(options.held_rank(devices), options.frozen_a)
        adapted = filled_elements(shape.adapted_parameters, devices, fewest) if reduces else factors
        others = 0 if self._is_served else filled_elements(shape.replicated_parameters, devices, fewest)
        return adapted + others + (shape.replicated_parameters if self._keeps_last_average(devices) else 0)

    def shared_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the last averages, and with a delay all that arrives."""
        shared = shape.replicated_parameters if self._keeps_last_average(devices) else 0
        if self.options.merge_delay:
            averaged = sum(tensor.elements for tensor in self.separate_tensors(shape, devices))
            shared += averaged + shape.adapted_parameters
        return shared

    def simulated_copies(self, devices: int) -> int:
        """Return one copy a node."""
        return self.options.num_nodes(devices)

    def separate_copies(self, devices: int) -> int:
        """Return one copy a node."""
        return self.options.num_nodes(devices)

    def evaluation_weights(self) -> WeightMaterialisation:
        """Return that quantised weights are fetched from the master, or unpacked where the master is elsewhere."""
        unpacked = "none" if self.options.master == "host" else self.options.quantize
        return WeightMaterialisation(int(self.options.quantize != "none"), unpacked)

    def separate_tensors(self, shape: ModelShape, devices: int) -> Sequence[ParameterShape]:
        """Return the parameters that merges average."""
        return _averaged(shape, self.options.norms, self.options.biases)

    def base_bytes(self, shape: ModelShape, element_bytes: int) -> int:
        """Return the bytes of the adapted weights, as precise as they are kept, and of the averages."""
        options = self.options
        quantize = "none" if options.keeps_master else options.quantize
        adapted = (quantized_bytes(x.weights, x.in_features, quantize, element_bytes) * x.count for x in shape.adapted)
        averaged = sum(tensor.elements for tensor in _averaged(shape, options.norms, options.biases))
        return sum(adapted) + averaged * element_bytes

    def last_merge_elements(self, shape: ModelShape, devices: int) -> int:
        """Return the elements that merges average, where the method does not keep their last means itself."""
        tensors = () if self._keeps_last_average(devices) else self.separate_tensors(shape, devices)
        return sum(tensor.elements for tensor in tensors)

    def merge_flops(self, shape: ModelShape, devices: int) -> float:
        """Return the operations of Σ_h B_h·A_h over the heads whose factors a device has."""
        if self._is_served:
            return 0.0
        total_rank, total = self.options.total_rank(self.options.num_nodes(devices)), 0.0
        for linear in shape.adapted:
            # Gathered factors: everyone multiplies all heads'; reduced ones: each its own.
            how = layer_transport(linear, total_rank, self.options.merge_transport, self.options.frozen_a)
            rank = total_rank if how == "gather" else self.options.held_rank(devices)
            # Where A picks columns, B is added to them.
            inputs = 1 if self._picks_columns(linear, devices) else linear.in_features
            total += 2.0 * linear.out_features * inputs * linear.count * rank
        return total

    def _picks_columns(self, linear: LinearShape, devices: int) -> bool:
        layout = self.adapters(devices)
        assert layout is not None
        return layout.picks_columns(linear.in_features)

    def _node_picks_columns(self, linear: LinearShape, nodes: int) -> bool:
        return self._picks_columns(linear, nodes * self.options.devices_per_node)

    def merge_elements_moved(self, shape: ModelShape, extra: int) -> float:
        """Return the adapted weights, read and written once."""
        return 2.0 * shape.adapted_parameters

    def rank_shortfall(self, width: int, devices: int, rank_share: float) -> float:
        """Return the width over all heads' ranks, times the rank that a head needs over its own; each at least 1."""
        total = self.options.total_rank(self.options.num_nodes(devices))
        return max(1.0, width / total) * max(1.0, width * rank_share / self.options.rank)

    def is_valid(self) -> bool:
        """Whether the keys of quantised weights go together."""
        options = self.options
        if options.is_paced and options.devices_per_node > 1:
            return False
        if options.quantize == "none":
            return options.master == "host"
        return not options.merge_delay and (options.master != "server" or self._is_served)

    def fitted(self, devices: int) -> LteOptions:
        """Return the options with lone devices, where devices do not fill nodes of that many."""
        uneven = devices % self.options.devices_per_node
        return self.options.model_copy(update={"devices_per_node": 1}) if uneven else self.options

    def synchronisation(self) -> str:
        """Return how parameters beside adapters are trained together."""
        return "averaged at merges, unless said"

    def exchange_phases(self, context: ExchangeContext) -> Iterable[Phase]:
        """Return the memory phase at a merge's peak, and that of gradients which a node's devices average."""
        nodes = self.options.num_nodes(context.devices)
        merge = max(self._merge_phases(replace(context, devices=nodes)), key=lambda phase: phase.total)
        if self.options.devices_per_node == 1:
            return (merge,)
        sizes = self._gradient_sizes(context.shape, context.devices, context.element_bytes)
        return merge, with_gradients(context, max(bucket_bytes(sizes)))

    def _merge_phases(self, context: ExchangeContext) -> Iterator[Phase]:
        """Yield the phases of a merge; the devices of this context, and of those below, are nodes."""
        options, layers, element_bytes = self.options, context.shape.in_order(), context.element_bytes
        held_rank, total_rank = options.held_rank(context.devices), options.total_rank(context.devices)
        most_held = options.most_held_rank(context.devices)
        for k in range(options.fragments):
            part = [layers[i] for i in fragment(len(layers), options.fragments, k)]
            gathered, reduced = _by_transport(part, total_rank, options.merge_transport, options.frozen_a)
            sizes = factor_buffer_bytes(
                gathered, total_rank, most_held, options.merge_transport, element_bytes, options.frozen_a
            )
            for group in bucket(sizes):
                yield at_merge(self._factors_bytes(context, [gathered[i] for i in group]))
            yield from map(at_merge, self._delta_bytes(context, [x.weights * element_bytes for x in reduced]))
        if options.reset == "ab":
            own = (options.heads_per_device, options.rank)
            yield at_merge(max(self._drawing_bytes(context, x, *own) for x in layers))
        if self._is_weighted(context):
            yield at_merge(max(x.out_features for x in layers) * held_rank * element_bytes)
        averaged = [t.elements * element_bytes for t in self.separate_tensors(context.shape, context.devices)]
        for k in range(options.fragments):
            sizes = [averaged[i] for i in fragment(len(averaged), options.fragments, k)]
            yield from averaging_phases(context, sizes, options.wire, self._is_served)
        firsts = [t.elements * element_bytes for t in _trained_by_the_first(context.shape, options.norms)]
        if firsts:
            yield at_merge(2 * max(bucket_bytes(firsts)))

    def _is_weighted(self, context: ExchangeContext) -> bool:
        """Return whether devices' heads count unequally, so that B is multiplied by their weights."""
        return context.weighs_devices or bool(self.options.device_samples)

    def _drawing_bytes(self, context: ExchangeContext, linear: LinearShape, heads: int, rank: int) -> int:
        """Return the bytes while the A of some heads of one layer is drawn and converted.

        All heads at once; in a joint draw head by head; of columns the numbers alone.
        """
        of_head, element_bytes = linear.in_features * rank, context.element_bytes
        if self._node_picks_columns(linear, context.devices):
            return heads * rank * LONG_BYTES
        if self.options.draws != "own":
            return heads * of_head * element_bytes + of_head * JOINT_DRAW_BYTES
        return heads * of_head * (DRAW_BYTES + (element_bytes if element_bytes < LONG_BYTES else 0))

    def _factors_bytes(self, context: ExchangeContext, members: Sequence[LinearShape]) -> int:
        """Return the bytes at the peak of one message: all devices' factors, and one layer's B for the product."""
        options, devices, element_bytes = self.options, context.devices, context.element_bytes
        held_rank, messages = options.held_rank(devices), int(devices > 1)
        factors = [x.factors(held_rank, options.frozen_a) for x in members]
        sides = [] if options.frozen_a else [held_rank * x.in_features for x in members]
        sides += [held_rank * x.out_features for x in members]
        compressed = options.wire != "full" and devices > 1
        sent = sum(factors) * element_bytes
        packed = self._packed_bytes(context, members, held_rank) if compressed else sent
        if self._is_served:  # the factors packed to push, or the weights that come back
            pulled = sum([quantized_bytes(x.weights, x.in_features, options.quantize, element_bytes) for x in members])
            return (packed if compressed else 0) + messages * max(packed, pulled)
        total_rank = options.total_rank(devices)
        everyones = messages * sum([x.factors(total_rank, options.frozen_a) for x in members]) * element_bytes
        packing = max([packing_bytes(x.weights, x.in_features, options.quantize, element_bytes) for x in members])
        copied = everyones if options.devices_per_node > 1 else 0  # one message to the other devices of a node
        added = everyones + max(*self._adding_bytes(context, members), packing, copied)
        if not compressed:
            return added
        rounding = packed + max(sides) * (element_bytes + (4 if options.wire in ("int4", "int2") else 2))
        arrived = 0
        for team in options.teams(devices):
            alike = team.held_rank == held_rank
            arrived += len(team.devices) * (packed if alike else self._packed_bytes(context, members, team.held_rank))
        return max(added, everyones + arrived + packed, rounding)

    def _packed_bytes(self, context: ExchangeContext, members: Sequence[LinearShape], held_rank: int) -> int:
        """Return the bytes of one device's compressed factors."""
        sides = [] if self.options.frozen_a else [x.in_features for x in members]
        sides += [x.out_features for x in members]
        return sum([wire_bytes(held_rank * side, self.options.wire, context.element_bytes) for side in sides])

    def _adding_bytes(self, context: ExchangeContext, members: Sequence[LinearShape]) -> Iterator[int]:
        """Yield the bytes at the peaks of adding up a message's layers, one team of devices after the other."""
        options, devices, element_bytes = self.options, context.devices, context.element_bytes
        base = max([self._base_bytes(context, x.weights) for x in members])
        picking = {x.name: self._node_picks_columns(x, devices) for x in members}
        for index, team in enumerate(options.teams(devices)):
            held_rank, count = team.held_rank, len(team.devices)
            # B laid out for the product with a dense A, or one head's B times the share of the merge.
            ranks = {x.name: team.rank if picking[x.name] else count * held_rank for x in members}
            stacked = max([x.out_features * ranks[x.name] for x in members]) * element_bytes
            if self._is_weighted(context):  # B times the heads' weights is another B
                stacked += count * max(x.out_features for x in members) * held_rank * element_bytes
            drawing = drawn = 0
            # A lone device of its class has its own A; where all are alike, a lone device merges with nobody.
            others = devices > 1 and (count > 1 or held_rank != options.held_rank(devices) or team.rank != options.rank)
            if options.frozen_a and others:
                heads = (count * team.heads_per_device, team.rank)
                drawing = max(self._drawing_bytes(context, x, *heads) for x in members)
                # As drawn, and laid out for the product; with a quorum those of the devices that are there.
                copies = (2 if options.draws == "own" else 1) + context.has_quorum
                dense = [x.in_features for x in members if not picking[x.name]]
                drawn = copies * count * max(dense, default=0) * held_rank * element_bytes
            # A later team's A is drawn beside the weights that the first has been added to.
            yield drawing + (base if index else 0)
            yield base + drawn + stacked

    def _base_bytes(self, context: ExchangeContext, weights: int) -> int:
        """Return the bytes of the weights that a merge adds to, where those are fetched or unpacked for it."""
        quantize, element_bytes = self.options.quantize, context.element_bytes
        if quantize == "none":
            return 0
        unpacked = unpacking_bytes(weights, quantize, element_bytes) if self.options.master == "none" else 0
        return max(weights * element_bytes, unpacked)

    def _delta_bytes(self, context: ExchangeContext, sizes: Sequence[int]) -> Iterator[int]:
        """Yield the bytes of each message of dense sums: sums and message, or one change and its compressed form."""
        for group in bucket(sizes):
            message, largest = sum(sizes[i] for i in group), max(sizes[i] for i in group)
            if self.options.wire == "full" or context.devices == 1:
                base = self._base_bytes(context, largest // context.element_bytes)
                yield message + max(message if context.devices > 1 else 0, base)
            else:
                mean = compressed_mean(context, message // context.element_bytes, self.options.wire)
                yield max(mean.held, 3 * largest)  # a change is stacked beside the last one


@lru_cache(maxsize=64)
def _averaged(shape: ModelShape, norms: str, biases: str) -> tuple[ParameterShape, ...]:
    return tuple(tensor for tensor in shape.replicated if is_averaged(tensor, norms, biases))


def _trained_by_the_first(shape: ModelShape, norms: str) -> list[ParameterShape]:
    return [tensor for tensor in shape.replicated if tensor.kind == "norm" and norms == "one"]


def _by_transport(
    layers: Sequence[LinearShape], total_rank: int, transport: str, frozen_a: bool
) -> tuple[list[LinearShape], list[LinearShape]]:
    """Return the layers whose factors travel, gathered or by a server, and those whose dense deltas are reduced."""
    by_factors, reduced = list[LinearShape](), list[LinearShape]()
    for x in layers:
        how = layer_transport(x, total_rank, transport, frozen_a)
        (reduced if how == "reduce" else by_factors).append(x)
    return by_factors, reduced


@lru_cache(maxsize=8192)
def _exchanges(
    shape: ModelShape, held_ranks: tuple[tuple[int, int], ...], quantize: str, transport: str, wire: str,
    fragments: int, norms: str, biases: str, frozen_a: bool, element_bytes: int,
) -> list[Exchange]:  # fmt: skip
    layers, devices = shape.in_order(), sum(count for count, _ in held_ranks)
    firsts = [t.elements for t in _trained_by_the_first(shape, norms)]
    replicated = [t.elements for t in _averaged(shape, norms, biases)]
    exchanges = []
    for index in range(fragments):
        part = [layers[i] for i in fragment(len(layers), fragments, index)]
        others = [replicated[i] for i in fragment(len(replicated), fragments, index)]
        adapted = factor_transfers(part, held_ranks, quantize, transport, wire, element_bytes, frozen_a)
        if transport == "server":
            sizes = bucket_bytes([count * element_bytes for count in others])
            operations: tuple[Operation, ...] = ("push", "pull")
            rest = tuple(Transfer(operation, size, devices) for size in sizes for operation in operations)
        else:
            rest = averages(others, devices, wire, element_bytes)
        spread = [firsts[i] * element_bytes for i in fragment(len(firsts), fragments, index)]
        exchanges.append(Exchange((*adapted, *rest, *_spread(bucket_bytes(spread), devices, transport))))
    return exchanges


def _spread(sizes_bytes: Sequence[int], devices: int, transport: str) -> Iterator[Transfer]:
    """Yield the messages that copy the first device's parameters to all others."""
    for size in sizes_bytes:
        if transport == "server":
            yield Transfer("push", size, 1)
            yield Transfer("pull", size, devices)
        else:
            yield Transfer("broadcast", size, devices)


def factor_transfers(
    layers: Sequence[LinearShape], held_ranks: Sequence[tuple[int, int]], quantize: str, transport: str, wire: str,
    element_bytes: int, frozen_a: bool = False,
) -> tuple[Transfer, ...]:  # fmt: skip
    """Return the messages that merge some adapted layers: first by factors, then by dense sums.

    `held_ranks` are numbers of devices, and the sum of the ranks that each of them holds.
    """
    devices, total_rank = sum(count for count, _ in held_ranks), sum(count * rank for count, rank in held_ranks)
    most_held = max(rank for _, rank in held_ranks)
    by_factors, reduced = _by_transport(layers, total_rank, transport, frozen_a)
    transfers: list[Transfer] = []
    for group in bucket(factor_buffer_bytes(by_factors, total_rank, most_held, transport, element_bytes, frozen_a)):
        members = [by_factors[i] for i in group]
        sides = [] if frozen_a else [x.in_features for x in members]
        sides += [x.out_features for x in members]
        parts = [
            (count, sum([wire_bytes(rank * side, wire, element_bytes) for side in sides])) for count, rank in held_ranks
        ]
        if transport == "server":
            pulled = sum([quantized_bytes(x.weights, x.in_features, quantize, element_bytes) for x in members])
            transfers += [Transfer.of_parts("push", parts), Transfer("pull", pulled, devices)]
        else:
            transfers.append(Transfer.of_parts("all_gather", parts))
    return (*transfers, *averages((x.weights for x in reduced), devices, wire, element_bytes))
