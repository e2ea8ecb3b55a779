"""Which messages each method makes, and after which steps: one small function a method.

Letters: N devices, K heads per device, F elements of one head's factors, T steps of a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from simulate.comm.transfers import Exchange, Operation, Transfer, averages, bucket, bucket_bytes, fragment, wire_bytes
from simulate.config.run import Run
from simulate.costs.cache import by_method
from simulate.layers.formats import ELEMENT_BYTES, quantized_bytes
from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.daso.options import DasoOptions
from simulate.methods.ddp.options import DdpOptions
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.lora.options import LoraOptions
from simulate.methods.lte.options import LteOptions
from simulate.methods.mhlora.options import MhloraOptions
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.relora.options import ReloraOptions
from simulate.methods.sapipe.options import SapipeOptions
from simulate.methods.signsgd.options import SignsgdOptions
from simulate.methods.topk.options import TopkOptions
from simulate.models.shapes import LinearShape, ModelShape
from simulate.rules.transport import factor_buffer_bytes, gather_groups, is_averaged, layer_transport

INDEX_BYTES = 4
"""int32 positions of top-k entries."""


@dataclass(frozen=True)
class PeriodicExchange:
    """An exchange after step `first`, and every `every` steps from there on, up to step `until`; steps count from 1."""

    exchange: Exchange
    first: int = 1
    every: int = 1
    until: int | None = None
    at_end: bool = False
    """Also after the run's last step."""
    hidden_steps: int = 0
    """Steps of compute that go on while it travels; after the run's last step there are none."""

    def happens(self, step: int, last_step: int) -> bool:
        """Whether it takes place after `step` of a run of `last_step`."""
        if self.at_end and step == last_step:
            return True
        return self.first <= step <= (self.until or step) and (step - self.first) % self.every == 0

    def times(self, steps: int, last_step: int) -> int:
        """How often it takes place in the first `steps` of a run of `last_step` steps."""
        reached = min(steps, self.until or steps)
        regular = max(0, (reached - self.first) // self.every + 1)
        extra = self.at_end and steps == last_step and (steps < self.first or (steps - self.first) % self.every != 0)
        return regular + extra

    def hidden(self, last_step: int) -> Iterator[tuple[int, int]]:
        """Yield how often it takes place in a run, and the steps of compute that go on while it travels then."""
        if not self.hidden_steps:
            yield self.times(last_step, last_step), 0
            return
        # An exchange that nobody waits for at the run's end, like a last stale gradient, is as hidden as all others.
        late = range(max(1, last_step - self.hidden_steps + 1) if self.at_end else last_step + 1, last_step + 1)
        cut = [last_step - step for step in late if self.happens(step, last_step)]
        yield self.times(last_step, last_step) - len(cut), self.hidden_steps
        for steps in cut:
            yield 1, steps


@by_method
def schedule(run: Run, shape: ModelShape) -> tuple[PeriodicExchange, ...]:
    """Return everything that a run's devices exchange; one device alone exchanges nothing."""
    method, devices = run.method, run.cluster.devices
    return () if devices == 1 else _SCHEDULES[type(method)](method, shape, devices, ELEMENT_BYTES[run.train.dtype])


def sent_bytes(run: Run, shape: ModelShape, steps: int) -> int:
    """Bytes that all devices together send in the first `steps` steps."""
    return sum(part.exchange.sent_bytes * part.times(steps, run.train.steps) for part in schedule(run, shape))


def received_bytes(run: Run, shape: ModelShape, steps: int) -> int:
    """Bytes that all devices together receive in the first `steps` steps."""
    return sum(part.exchange.received_bytes * part.times(steps, run.train.steps) for part in schedule(run, shape))


def transfers_of_step(run: Run, shape: ModelShape, step: int) -> tuple[Transfer, ...]:
    """Return the messages of one step, counted from 1, in the order in which they are made."""
    parts = (part for part in schedule(run, shape) if part.happens(step, run.train.steps))
    return tuple(transfer for part in parts for transfer in part.exchange.transfers)


def num_rounds(run: Run) -> int:
    """Return the rounds of a whole run; the last may be shorter, its merge is still made."""
    return -(-run.train.steps // run.method.round_steps)


@lru_cache(maxsize=256)
def dense_reduction(shape: ModelShape, devices: int, element_bytes: int, wire: str = "full") -> Exchange:
    """Return the messages that average one dense tensor per parameter over all devices."""
    return Exchange(averages((t.elements for t in shape.tensors), devices, wire, element_bytes))


def _ddp(method: DdpOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    return (PeriodicExchange(dense_reduction(shape, devices, element_bytes, method.wire)),)


def _sapipe(method: SapipeOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    return (PeriodicExchange(dense_reduction(shape, devices, element_bytes), hidden_steps=1),)


@lru_cache(maxsize=1024)
def _adapter_reduction(shape: ModelShape, rank: int, devices: int, element_bytes: int) -> Exchange:
    """Return the messages that average the gradients of one pair a layer of the given rank, and of all else."""
    counts: list[int] = []
    layers = iter(shape.in_order())
    for tensor in shape.tensors:
        if tensor.kind == "adapted":
            layer = next(layers)
            counts += [rank * layer.in_features, rank * layer.out_features]
        else:
            counts.append(tensor.elements)
    return Exchange(averages(counts, devices, "full", element_bytes))


def _lora(method: LoraOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    return (PeriodicExchange(_adapter_reduction(shape, method.rank, devices, element_bytes)),)


def _mhlora(method: MhloraOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    return (PeriodicExchange(_adapter_reduction(shape, method.held_rank(devices), devices, element_bytes)),)


def _adamix(method: AdamixOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    # Everyone routes alike, so only the chosen pair has a gradient.
    return (PeriodicExchange(_adapter_reduction(shape, method.rank, devices, element_bytes)),)


def _relora(method: ReloraOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    warm = method.warm_start_steps
    adapters = PeriodicExchange(_adapter_reduction(shape, method.rank, devices, element_bytes), first=warm + 1)
    return (
        (PeriodicExchange(dense_reduction(shape, devices, element_bytes), until=warm), adapters)
        if warm
        else (adapters,)
    )


def _local_sgd(
    method: LocalSgdOptions, shape: ModelShape, devices: int, element_bytes: int
) -> tuple[PeriodicExchange, ...]:
    counts = [t.elements for t in shape.tensors]
    if method.merge_optimizer == "average":
        counts *= 3
    if method.merge_transport == "reduce":
        exchange = Exchange(averages(counts, devices, method.wire, element_bytes))
    else:
        active = method.participants(devices)
        sizes = bucket_bytes([count * element_bytes for count in counts])
        operations: tuple[Operation, ...] = ("push", "pull")
        exchange = Exchange(tuple(Transfer(operation, size, active) for size in sizes for operation in operations))
    return (_merge(exchange, method.merge_every, method.merge_delay),)


def _diloco(method: DilocoOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    counts = [t.elements for t in shape.tensors]

    def merge(items: range) -> Exchange:
        return Exchange(averages((counts[i] for i in items), devices, method.wire, element_bytes))

    parts = (fragment(len(counts), method.fragments, index) for index in range(method.fragments))
    return _staggered([merge(items) for items in parts], method.merge_every, method.merge_delay)


def _daso(method: DasoOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    nodes, size = devices // method.devices_per_node, method.devices_per_node
    sizes = bucket_bytes([t.elements * element_bytes for t in shape.tensors])
    parts = []
    if size > 1:
        parts.append(PeriodicExchange(Exchange(tuple(Transfer("all_reduce", b, size, nodes) for b in sizes))))
    if nodes > 1:
        between = [(Transfer("all_reduce", b, nodes), Transfer("broadcast", b, size, nodes)) for b in sizes]
        messages = tuple(t for pair in between for t in (pair if size > 1 else pair[:1]))
        parts.append(_merge(Exchange(messages), method.merge_every, method.delay_steps))
    return tuple(parts)


def _powersgd(
    method: PowerSgdOptions, shape: ModelShape, devices: int, element_bytes: int
) -> tuple[PeriodicExchange, ...]:
    p, q, dense = [], [], []
    for tensor in shape.tensors:
        if is_compressible(tensor.shape, method.rank):
            outputs, inputs = tensor.shape
            p.append(outputs * method.rank)
            q.append(inputs * method.rank)
        else:
            dense.append(tensor.elements)
    messages = (averages(counts, devices, "full", element_bytes) for counts in (p, q, dense))
    return (PeriodicExchange(Exchange(tuple(t for message in messages for t in message))),)


def is_compressible(shape: Sequence[int], rank: int) -> bool:
    """Whether PowerSGD's factors of a matrix are smaller than the matrix; all else travels as it is."""
    return len(shape) == 2 and rank * sum(shape) < math.prod(shape)


def _gathered(sizes_bytes: Sequence[int], devices: int) -> Exchange:
    groups = gather_groups(sizes_bytes, devices)
    return Exchange(tuple(Transfer("all_gather", sum(sizes_bytes[i] for i in group), devices) for group in groups))


def _topk(method: TopkOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    sizes = [topk_entries(t.elements, method.density) * (element_bytes + INDEX_BYTES) for t in shape.tensors]
    return (PeriodicExchange(_gathered(sizes, devices)),)


def topk_entries(elements: int, density: float) -> int:
    """Return how many entries of a tensor travel: at least one."""
    return max(1, math.ceil(density * elements))


def _signsgd(
    method: SignsgdOptions, shape: ModelShape, devices: int, element_bytes: int
) -> tuple[PeriodicExchange, ...]:
    return (PeriodicExchange(_gathered([-(-t.elements // 8) + element_bytes for t in shape.tensors], devices)),)


def _lte(method: LteOptions, shape: ModelShape, devices: int, element_bytes: int) -> tuple[PeriodicExchange, ...]:
    exchanges = _lte_exchanges(
        shape, devices, method.held_rank(devices), method.quantize, method.merge_transport, method.wire,
        method.fragments, method.norms, method.biases, method.frozen_a, element_bytes,
    )  # fmt: skip
    return _staggered(exchanges, method.merge_every, method.merge_delay)


@lru_cache(maxsize=8192)
def _lte_exchanges(
    shape: ModelShape, devices: int, held_rank: int, quantize: str, transport: str, wire: str, fragments: int,
    norms: str, biases: str, frozen_a: bool, element_bytes: int,
) -> list[Exchange]:  # fmt: skip
    layers = shape.in_order()
    firsts = [t.elements for t in shape.replicated if t.kind == "norm" and norms == "one"]
    replicated = [t.elements for t in shape.replicated if is_averaged(t, norms, biases)]
    exchanges = []
    for index in range(fragments):
        part = [layers[i] for i in fragment(len(layers), fragments, index)]
        others = [replicated[i] for i in fragment(len(replicated), fragments, index)]
        adapted = lte_transfers(part, devices, held_rank, quantize, transport, wire, element_bytes, frozen_a)
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
    """Yield the messages by which all devices take over what the first one has."""
    for size in sizes_bytes:
        if transport == "server":
            yield Transfer("push", size, 1)
            yield Transfer("pull", size, devices)
        else:
            yield Transfer("broadcast", size, devices)


def lte_transfers(
    layers: Sequence[LinearShape], devices: int, held_rank: int, quantize: str, transport: str, wire: str,
    element_bytes: int, frozen_a: bool = False,
) -> tuple[Transfer, ...]:  # fmt: skip
    """Return the messages that merge some adapted layers: first by factors, then by dense sums."""
    by_factors = [x for x in layers if layer_transport(x, held_rank, devices, transport, frozen_a) != "reduce"]
    reduced = [x for x in layers if layer_transport(x, held_rank, devices, transport, frozen_a) == "reduce"]
    transfers: list[Transfer] = []
    for group in bucket(factor_buffer_bytes(by_factors, devices, held_rank, transport, element_bytes, frozen_a)):
        members = [by_factors[i] for i in group]
        sides = [x.in_features for x in members if not frozen_a] + [x.out_features for x in members]
        factors = [wire_bytes(held_rank * side, wire, element_bytes) for side in sides]
        if transport == "server":
            pulled = sum(quantized_bytes(x.weights, x.in_features, quantize, element_bytes) for x in members)
            transfers += [Transfer("push", sum(factors), devices), Transfer("pull", pulled, devices)]
        else:
            transfers.append(Transfer("all_gather", sum(factors), devices))
    return (*transfers, *averages((x.weights for x in reduced), devices, wire, element_bytes))


def _merge(exchange: Exchange, every: int, hidden_steps: int = 0) -> PeriodicExchange:
    return PeriodicExchange(exchange, first=every, every=every, at_end=True, hidden_steps=hidden_steps)


def _staggered(exchanges: Sequence[Exchange], every: int, hidden_steps: int) -> tuple[PeriodicExchange, ...]:
    """One fragment after the other, each every T steps, T / fragments apart; all of them after the last step."""
    apart = every // len(exchanges)
    return tuple(
        PeriodicExchange(exchange, first=apart * (index + 1), every=every, at_end=True, hidden_steps=hidden_steps)
        for index, exchange in enumerate(exchanges)
    )


_SCHEDULES: dict[type, Callable[[Any, ModelShape, int, int], tuple[PeriodicExchange, ...]]] = {
    DdpOptions: _ddp,
    SapipeOptions: _sapipe,
    LoraOptions: _lora,
    MhloraOptions: _mhlora,
    AdamixOptions: _adamix,
    ReloraOptions: _relora,
    LteOptions: _lte,
    LocalSgdOptions: _local_sgd,
    DilocoOptions: _diloco,
    DasoOptions: _daso,
    PowerSgdOptions: _powersgd,
    TopkOptions: _topk,
    SignsgdOptions: _signsgd,
}
