"""What a device holds beside its state while it exchanges, steps its optimizer or merges: one function a method.

Each follows the order in which the method's code makes and drops tensors, since what is held at once is what counts.

Letters: s a tensor's bytes, G all gradients' bytes, N devices, X elements of a message, C of the chunk that a device
averages, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from simulate.comm.transfers import WIRE_BLOCK, bucket, bucket_bytes, chunk_elements, fragment, wire_bytes
from simulate.config.method_options import AdapterOptions, MethodOptions
from simulate.config.run import Run
from simulate.costs.message_schedule import INDEX_BYTES, is_compressible, topk_entries
from simulate.costs.moments import largest_step_bytes
from simulate.layers.formats import ELEMENT_BYTES, packing_bytes, quantized_bytes, unpacking_bytes
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
from simulate.rules.optimizer import through_gram
from simulate.rules.phases import Phase
from simulate.rules.transport import factor_buffer_bytes, gather_groups, is_averaged, layer_transport

DRAW_BYTES = 3 * 8
"""An element of A while it is drawn, in double precision: its normal number, its factor of QR, the scaled one."""
JOINT_DRAW_BYTES = 8 + 16 + 8
"""Of an element of one head in a joint draw: as it was, its complex transform, and what becomes of it."""
LONG_BYTES, FLOAT_BYTES = 8, 4
PREDICTION_TENSORS = 5
"""Tensors of a parameter's size at the height of SAPipe's prediction: both moments, their ratio, the decay, the sum."""
OUTER_TENSORS = 2
"""The outer gradient, and the weights that it leads to."""
NEWTON_SCHULZ_TENSORS = 3
"""The update's gradient, and an iterate before and after; two Gram matrices beside."""
GRAM_TENSORS = 5
"""Where Gram matrices alone are iterated on: one before and after, the product between, their factor and the product
of all."""
FOLD_TENSORS = 2
"""Of a weight's size, while adapters are added to it: their product and its mean over heads, or that and the sum."""


@dataclass(frozen=True)
class _Exchange:
    """One device's part of one method's exchanges."""

    method: Any
    """Options of a method, as the functions below know it."""
    shape: ModelShape
    devices: int
    gradients: int
    """Bytes of all gradients."""
    element_bytes: int
    muon: bool
    eight_bit_step: int
    """Working memory of an optimizer step whose moments have 8 bits."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each parameter."""
        return [t.elements * self.element_bytes for t in self.shape.tensors]


def starts_dense(method: MethodOptions) -> bool:
    """Whether the run begins with dense steps, which need more than those that follow."""
    return isinstance(method, ReloraOptions) and method.warm_start_steps > 0


def exchange_phases(run: Run, shape: ModelShape, gradient_bytes: int) -> tuple[Phase, ...]:
    """Return the phases of a run's optimizer step, gradient exchange and merge that can be its peak."""
    method = run.method
    if "merge_every" in type(method).model_fields:  # plays no part, and many candidates differ in nothing else
        method = method.model_copy(update={"merge_every": 1})
    return _exchange_phases(
        _Exchange(
            method, shape, run.cluster.devices, gradient_bytes, ELEMENT_BYTES[run.train.dtype],
            run.train.optimizer == "muon", largest_step_bytes(run, shape),
        )
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _exchange_phases(e: _Exchange) -> tuple[Phase, ...]:
    phases = [Phase("optimizer_step", e.gradients, 0, _optimizer_bytes(e)), *_PHASES[type(e.method)](e)]
    return tuple(phases)


def _optimizer_bytes(e: _Exchange) -> int:
    """AdamW's fused step holds nothing but with 8 bits; Muon holds iterates of one matrix at a time."""
    if not e.muon:
        return e.eight_bit_step
    return max(e.eight_bit_step, _iterates_bytes(e))


def _iterates_bytes(e: _Exchange) -> int:
    return e.element_bytes * max(stack * _iterates(rows, columns) for stack, rows, columns in _muon_matrices(e))


def _iterates(rows: int, columns: int) -> int:
    """Return the elements that Muon holds at the height of its iterations on a matrix."""
    matrix, gram = rows * columns, min(rows, columns) ** 2
    if through_gram(rows, columns):
        iterating = (NEWTON_SCHULZ_TENSORS - 1) * matrix + GRAM_TENSORS * gram
        return max(iterating, NEWTON_SCHULZ_TENSORS * matrix + gram)
    return NEWTON_SCHULZ_TENSORS * matrix + 2 * gram


def _muon_matrices(e: _Exchange) -> Iterator[tuple[int, int, int]]:
    """Yield (how many, rows, columns) of each kind of matrix that Muon steps at once."""
    method = e.method
    for linear in e.shape.adapted:
        if not isinstance(method, AdapterOptions) or starts_dense(method):
            yield 1, linear.out_features, linear.in_features
            continue
        heads = method.heads_per_device if isinstance(method, LteOptions) else 1
        rank = method.row_rank(e.devices)
        yield heads, linear.out_features, rank
        if not (isinstance(method, LteOptions) and method.frozen_a):
            yield heads, rank, linear.in_features


def _with_gradients(e: _Exchange, num_bytes: int) -> Phase:
    return Phase("optimizer_step", e.gradients, 0, num_bytes)


def _trained_sizes(e: _Exchange) -> list[int]:
    """Bytes of each gradient, in the order of the network."""
    method = e.method
    if not isinstance(method, AdapterOptions) or starts_dense(method):
        return e.sizes
    rank, layers, counts = method.row_rank(e.devices), iter(e.shape.in_order()), []
    for tensor in e.shape.tensors:
        if tensor.kind == "adapted":
            layer = next(layers)
            counts += [rank * layer.in_features, rank * layer.out_features]
        else:
            counts.append(tensor.elements)
    return [count * e.element_bytes for count in counts]


def _reduced_gradients(e: _Exchange) -> tuple[Phase, ...]:
    """One gradient for all: beside it, the message that it travels in."""
    merges = (_merge(_restart_bytes(e)),) if isinstance(e.method, ReloraOptions) else ()
    if e.devices == 1:
        return merges
    return (_with_gradients(e, max(bucket_bytes(_trained_sizes(e)))), *merges)


def _restart_bytes(e: _Exchange) -> int:
    """Of one layer whose adapters are added to its weight, which is packed where it is quantised."""
    largest = max(e.shape.adapted, key=lambda x: x.weights)
    packing = packing_bytes(largest.weights, largest.in_features, e.method.frozen_format, e.element_bytes)
    return max(FOLD_TENSORS * largest.weights * e.element_bytes, packing)


def _ddp(e: _Exchange) -> tuple[Phase, ...]:
    if e.method.wire == "full" or e.devices == 1:
        return _reduced_gradients(e)
    groups = bucket(e.sizes)
    done, left, phases = 0, e.gradients, []
    for group in groups:
        message = sum(e.sizes[i] for i in group)
        left -= message
        mean = _compressed(e, message // e.element_bytes)
        phases.append(_with_gradients(e, done + left + max(mean.held, message) - e.gradients))
        done += mean.last  # gradients are views of the mean
    return tuple(phases)


def _sapipe(e: _Exchange) -> tuple[Phase, ...]:
    """A device's own gradients stay until the end of its step; beside them the stale ones, or the message."""
    largest, done = max(e.sizes), 0
    temporary = max(e.gradients + _optimizer_bytes(e), max(bucket_bytes(e.sizes)) if e.devices > 1 else 0)
    if e.method.compensation == "prediction":
        temporary = max(temporary, PREDICTION_TENSORS * largest)
    elif e.method.compensation == "delay":
        for size in e.sizes:
            done += size
            temporary = max(temporary, done + 2 * size)  # its square, and the change of the parameter
    return (_with_gradients(e, temporary),)


def _powersgd(e: _Exchange) -> tuple[Phase, ...]:
    rank = e.method.rank
    matrices = [t.shape for t in e.shape.tensors if is_compressible(t.shape, rank)]
    factors = sum(rank * sum(shape) for shape in matrices) * e.element_bytes
    rest = [t.elements * e.element_bytes for t in e.shape.tensors if not is_compressible(t.shape, rank)]
    message = max(bucket_bytes(rest), default=0) if e.devices > 1 else 0
    return (_with_gradients(e, factors + message),)


def _topk(e: _Exchange) -> tuple[Phase, ...]:
    entries = [topk_entries(t.elements, e.method.density) for t in e.shape.tensors]
    sent = [k * (e.element_bytes + INDEX_BYTES) for k in entries]
    held = [size + k * (e.element_bytes + LONG_BYTES) for size, k in zip(e.sizes, entries, strict=True)]
    # A device's sum and mean of one parameter, and one device's positions.
    averaged = [2 * size + k * LONG_BYTES for size, k in zip(e.sizes, entries, strict=True)]
    return _gathered_gradients(e, sent, held, averaged)


def _signsgd(e: _Exchange) -> tuple[Phase, ...]:
    elements = [t.elements for t in e.shape.tensors]
    sent = [-(-x // 8) + e.element_bytes for x in elements]
    held = [(e.element_bytes + 1) * x for x in elements]  # the signs, and the magnitude with each
    # Everyone's signs, and with their magnitudes; then the mean beside these.
    everyones = max(e.devices * (e.element_bytes + 1), (e.devices + 1) * e.element_bytes)
    averaged = [everyones * x for x in elements]
    return _gathered_gradients(e, sent, held, averaged)


def _gathered_gradients(
    e: _Exchange, sent: Sequence[int], compressing: Sequence[int], averaging: Sequence[int]
) -> tuple[Phase, ...]:
    """Gradients are compressed one by one and freed, all messages are kept, and means take their place one by one."""
    phases, left, messages, done = [], e.gradients, 0, 0
    for size, part, working in zip(e.sizes, sent, compressing, strict=True):
        left -= size
        phases.append(_with_gradients(e, left + messages + working - e.gradients))
        messages += part
    for group in gather_groups(sent, e.devices):
        everyones = e.devices * sum(sent[i] for i in group) if e.devices > 1 else 0
        for i in group:
            phases.append(_with_gradients(e, done + messages + everyones + averaging[i] - e.gradients))
            done += e.sizes[i]
    return (max(phases, key=lambda phase: phase.total),)


def _daso(e: _Exchange) -> tuple[Phase, ...]:
    message = max(bucket_bytes(e.sizes))
    inside = (_with_gradients(e, message),) if e.method.devices_per_node > 1 else ()
    if e.devices == e.method.devices_per_node:
        return inside
    # Sums and their message; what is evaluated while sums travel is a mean of its own.
    means = sum(e.sizes) if e.method.delay_steps else 0
    return (*inside, Phase("merge", 0, 0, 2 * message), Phase("evaluation", 0, 0, means))


def _averaged(e: _Exchange) -> tuple[Phase, ...]:
    """Full copies: their means and the message they travel in, or its compressed form; then the outer step."""
    method, sizes = e.method, e.sizes
    if isinstance(method, LocalSgdOptions) and method.merge_optimizer == "average":
        sizes = sizes * 3
    parts = method.merges_per_round
    groups = [[sizes[i] for i in fragment(len(sizes), parts, index)] for index in range(parts)]
    return tuple(phase for group in groups for phase in _averaging(e, group, isinstance(method, DilocoOptions)))


def _averaging(e: _Exchange, sizes: Sequence[int], outer: bool) -> Iterator[Phase]:
    """Yield the phases of simulate.methods.averaging.Averaging, over tensors of given bytes.

    Merges that are late hold less, but that at the run's end waits.
    """
    for group in bucket(sizes):
        members = [sizes[i] for i in group]
        message, largest = sum(members), max(members)
        compressed = e.method.wire != "full" and e.devices > 1 and not _is_served(e.method)
        if compressed:
            mean = _compressed(e, message // e.element_bytes)
            yield Phase("merge", 0, 0, max(mean.held, largest + mean.last, mean.last + message))
        elif e.devices > 1:
            yield Phase("merge", 0, 0, 2 * message)
        if outer:
            yield Phase("outer_step", 0, 0, message + OUTER_TENSORS * largest)


def _is_served(method: MethodOptions) -> bool:
    return getattr(method, "merge_transport", "") == "server"


@dataclass(frozen=True)
class _Compressed:
    """Bytes of a compressed mean of one message, beside its errors."""

    held: int
    """At its height."""
    last: int
    """Of the mean that it ends with."""


def _compressed(e: _Exchange, elements: int) -> _Compressed:
    """Follow simulate.comm.compression: encode, exchange, decode and average; encode means, gather, decode."""
    wire, chunk = e.method.wire, chunk_elements(elements, e.devices)
    padded, mean = chunk * e.devices, chunk * e.element_bytes
    message = wire_bytes(padded, wire, e.element_bytes)
    decoded = padded * e.element_bytes
    scales = 0 if wire in ("fp16", "bf16") else 2 * FLOAT_BYTES * padded // WIRE_BLOCK
    # Rounded numbers, as whole ones in a byte each; two in a byte take three passes over them.
    encoding = {"int8": decoded + padded + scales, "int4": decoded + 3 * padded + scales}.get(wire, message)
    unpacked = padded if wire == "int4" else 0
    sent = message + decoded + unpacked
    averaged = 2 * message + message // e.devices + decoded + max(unpacked, mean)
    return _Compressed(max(encoding, sent, averaged), decoded)


def _lte(e: _Exchange) -> tuple[Phase, ...]:
    method, layers = e.method, e.shape.in_order()
    held_rank = method.held_rank(e.devices)
    rank_bytes = held_rank * e.element_bytes

    def is_reduced(x: LinearShape) -> bool:
        return layer_transport(x, held_rank, e.devices, method.merge_transport, method.frozen_a) == "reduce"

    phases: list[Phase] = []
    parts = [[layers[i] for i in fragment(len(layers), method.fragments, k)] for k in range(method.fragments)]
    for part in parts:
        by_factors, dense = [x for x in part if not is_reduced(x)], [x for x in part if is_reduced(x)]
        sizes = factor_buffer_bytes(
            by_factors, e.devices, held_rank, method.merge_transport, e.element_bytes, method.frozen_a
        )
        phases += [_merge(_factors_bytes(e, [by_factors[i] for i in group])) for group in bucket(sizes)]
        phases += [_merge(size) for size in _delta_bytes(e, [x.weights * e.element_bytes for x in dense])]
    if method.reset == "ab":
        phases.append(_merge(max(_drawing_bytes(e, x.in_features, method.heads_per_device) for x in layers)))
    if method.is_paced:
        phases.append(_merge(max(x.out_features for x in layers) * rank_bytes))
    others = [t.elements * e.element_bytes for t in e.shape.replicated if is_averaged(t, method.norms, method.biases)]
    firsts = [t.elements * e.element_bytes for t in e.shape.replicated if t.kind == "norm" and method.norms == "one"]
    for index in range(method.fragments):
        mine = [others[i] for i in fragment(len(others), method.fragments, index)]
        phases += list(_averaging(e, mine, outer=False))
    if firsts:
        phases.append(_merge(2 * max(bucket_bytes(firsts))))
    return (max(phases, key=lambda phase: phase.total),)


def _drawing_bytes(e: _Exchange, inputs: int, heads: int) -> int:
    """While the A of some heads of one layer is drawn and converted: all at once, or, of joint draws, head by head."""
    of_head = inputs * e.method.rank
    if e.method.draws == "joint":
        return heads * of_head * e.element_bytes + of_head * JOINT_DRAW_BYTES
    return heads * of_head * (DRAW_BYTES + (e.element_bytes if e.element_bytes < LONG_BYTES else 0))


def _merge(num_bytes: int) -> Phase:
    return Phase("merge", 0, 0, num_bytes)


def _factors_bytes(e: _Exchange, members: Sequence[LinearShape]) -> int:
    """Of one message of factors: everyone's, and one layer's B laid out for the product."""
    method, held_rank, messages = e.method, e.method.held_rank(e.devices), int(e.devices > 1)
    factors = [x.factors(held_rank, method.frozen_a) for x in members]
    sides = [held_rank * x.in_features for x in members if not method.frozen_a]
    sides += [held_rank * x.out_features for x in members]
    compressed = method.wire != "full" and e.devices > 1
    sent = sum(factors) * e.element_bytes
    packed = sum(wire_bytes(side, method.wire, e.element_bytes) for side in sides) if compressed else sent
    if method.merge_transport == "server":  # the factors packed to push, or the weights that come back
        own = packed if compressed else 0
        return own + messages * max(packed, sum(_quantized(e, x) for x in members))
    stacked = max(e.devices * x.out_features * held_rank for x in members) * e.element_bytes
    stacked *= 2 if method.is_paced else 1
    drawing = drawn = 0
    if method.frozen_a and messages:
        drawing = max(_drawing_bytes(e, x.in_features, e.devices * method.heads_per_device) for x in members)
        copies = 1 if method.draws == "joint" else 2  # as drawn, and laid out for the product
        drawn = copies * max(e.devices * x.in_features * held_rank for x in members) * e.element_bytes
    everyones = messages * e.devices * sent
    packing = max(packing_bytes(x.weights, x.in_features, method.quantize, e.element_bytes) for x in members)
    base = max(_base_bytes(e, x.weights) for x in members)
    added = everyones + max(drawing, base + drawn + stacked, packing)
    if not compressed:
        return added
    rounding = packed + max(sides) * (e.element_bytes + (4 if method.wire == "int4" else 2))
    return max(added, everyones + (e.devices + 1) * packed, rounding)


def _base_bytes(e: _Exchange, weights: int) -> int:
    """Of what a merge adds to, where that is no tensor that is kept: quantised weights, fetched or unpacked."""
    if e.method.quantize == "none":
        return 0
    unpacked = unpacking_bytes(weights, e.method.quantize, e.element_bytes) if e.method.master == "none" else 0
    return max(weights * e.element_bytes, unpacked)


def _quantized(e: _Exchange, x: LinearShape) -> int:
    return quantized_bytes(x.weights, x.in_features, e.method.quantize, e.element_bytes)


def _delta_bytes(e: _Exchange, sizes: Sequence[int]) -> Iterator[int]:
    """Yield what dense sums take, message by message: they and the message, or one change and its compressed form."""
    for group in bucket(list(sizes)):
        message, largest = sum(sizes[i] for i in group), max(sizes[i] for i in group)
        if e.method.wire == "full" or e.devices == 1:
            yield message + max(message if e.devices > 1 else 0, _base_bytes(e, largest // e.element_bytes))
        else:
            # A change is stacked beside the last one.
            yield max(_compressed(e, message // e.element_bytes).held, 3 * largest)


_PHASES: dict[type, Callable[[_Exchange], Iterable[Phase]]] = {
    DdpOptions: _ddp,
    LoraOptions: _reduced_gradients,
    MhloraOptions: _reduced_gradients,
    AdamixOptions: _reduced_gradients,
    ReloraOptions: _reduced_gradients,
    SapipeOptions: _sapipe,
    PowerSgdOptions: _powersgd,
    TopkOptions: _topk,
    SignsgdOptions: _signsgd,
    DasoOptions: _daso,
    LocalSgdOptions: _averaged,
    DilocoOptions: _averaged,
    LteOptions: _lte,
}
