"""Bytes of working memory while a device exchanges, steps its optimizer or merges, on top of its state.

The peak depends on which tensors exist at the same time, so a method's plan lists these phases in the order in which
its code allocates and frees tensors. This file has the parts that several plans share. simulate.costs.memory calls
exchange_phases; plans in simulate/methods call the rest.

Letters: N devices, X elements of a message, C elements of the chunk that a device averages, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from simulate.comm.transfers import (
    WIRE_BITS,
    Sparsity,
    bucket,
    bucket_bytes,
    chunk_elements,
    positions_bytes,
    scales_bytes,
    wire_bytes,
)
from simulate.config.method_options import MethodOptions
from simulate.config.run import Run
from simulate.costs.moments import largest_step_bytes
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import ExchangeContext, MethodPlan, plan_of
from simulate.rules.optimizer import through_gram
from simulate.rules.phases import Phase
from simulate.rules.transport import gather_groups

LONG_BYTES = 8
OUTER_TENSORS = 2
"""Tensors of a parameter's size in an outer step: the outer gradient and the new weights."""
NEWTON_SCHULZ_TENSORS = 3
"""Tensors of a matrix's size in Muon's iterations: the gradient, the old and the new iterate."""
GRAM_TENSORS = 5
"""Gram matrices where Muon iterates on them alone: old, new, the product between, their factor, the product of all."""
FOLD_TENSORS = 2
"""Tensors of a weight's size while adapters are added to it: their product and its mean over heads, or the mean and the
sum."""


def exchange_phases(run: Run, shape: ModelShape, gradient_bytes: int) -> tuple[Phase, ...]:
    """Return the phases of a run's optimizer step, gradient exchange and merge that can be its peak."""
    method = run.method
    if "merge_every" in type(method).model_fields:  # no buffer depends on it, so that more candidates share a result
        method = method.model_copy(update={"merge_every": 1})
    context = ExchangeContext(
        shape, run.cluster.devices, gradient_bytes, ELEMENT_BYTES[run.train.dtype], run.train.optimizer == "muon",
        largest_step_bytes(run, shape), method.is_paced or run.cluster.has_quorum, run.cluster.has_quorum,
        run.cluster.fewest,
    )  # fmt: skip
    return _exchange_phases(method, context)


@lru_cache(maxsize=8192)
def _exchange_phases(method: MethodOptions, context: ExchangeContext) -> tuple[Phase, ...]:
    plan = plan_of(method)
    return with_gradients(context, optimizer_bytes(plan, context)), *plan.exchange_phases(context)


def optimizer_bytes(plan: MethodPlan, context: ExchangeContext) -> int:
    """Return the peak bytes of the optimizer's own work.

    AdamW's fused step needs none, except with 8-bit moments; Muon holds the iterates of one matrix at a time, APOLLO a
    projected gradient.
    """
    if not context.muon:
        return context.moments_step
    largest = max(stack * _iterates(rows, columns) for stack, rows, columns in _muon_matrices(plan, context))
    return max(context.moments_step, context.element_bytes * largest)


def _iterates(rows: int, columns: int) -> int:
    """Return the elements that Muon holds at the peak of its iterations on a matrix."""
    matrix, gram = rows * columns, min(rows, columns) ** 2
    if through_gram(rows, columns):
        # Either the iterations peak, or the products with the matrix before and after them.
        iterating = (NEWTON_SCHULZ_TENSORS - 1) * matrix + GRAM_TENSORS * gram
        return max(iterating, NEWTON_SCHULZ_TENSORS * matrix + gram)
    return NEWTON_SCHULZ_TENSORS * matrix + 2 * gram  # the Gram matrix and its square


def _muon_matrices(plan: MethodPlan, context: ExchangeContext) -> Iterator[tuple[int, int, int]]:
    """Yield (count, rows, columns) of each stack of matrices that Muon steps at once."""
    layout = None if plan.starts_dense else plan.adapters(context.devices)
    for linear in context.shape.adapted:
        if layout is None:
            yield 1, linear.out_features, linear.in_features
            continue
        yield layout.heads, linear.out_features, layout.row_rank
        if not layout.frozen_a:
            yield layout.heads, layout.row_rank, linear.in_features


def with_gradients(context: ExchangeContext, num_bytes: int) -> Phase:
    """Return a phase of the optimizer's step that holds all gradients and so many bytes more."""
    return Phase("optimizer_step", context.gradients, 0, num_bytes)


def at_merge(num_bytes: int) -> Phase:
    """Return a phase of a merge that holds so many bytes."""
    return Phase("merge", 0, 0, num_bytes)


def reduced_gradients(context: ExchangeContext, sizes: Sequence[int]) -> tuple[Phase, ...]:
    """Return the phase in which gradients are averaged: all of them, and the largest message."""
    return (with_gradients(context, max(bucket_bytes(list(sizes)))),) if context.devices > 1 else ()


def gathered_gradients(
    context: ExchangeContext, sent: Sequence[int], compressing: Sequence[int], averaging: Sequence[int]
) -> tuple[Phase, ...]:
    """Return the peak phase of gradients that are compressed, gathered and averaged.

    Gradients are compressed and freed one by one, all messages are kept, and then means are computed one by one.
    """
    phases, left, messages, done = [], context.gradients, 0, 0
    for size, part, working in zip(context.sizes, sent, compressing, strict=True):
        left -= size
        # with_gradients adds all gradients; only `left` of them still exist.
        phases.append(with_gradients(context, left + messages + working - context.gradients))
        messages += part
    for group in gather_groups(sent, context.devices):
        everyones = context.devices * sum(sent[i] for i in group) if context.devices > 1 else 0
        for i in group:
            phases.append(with_gradients(context, done + messages + everyones + averaging[i] - context.gradients))
            done += context.sizes[i]
    return (max(phases, key=lambda phase: phase.total),)


def averaging_phases(
    context: ExchangeContext, sizes: Sequence[int], wire: str, served: bool = False, outer: bool = False
) -> Iterator[Phase]:
    """Yield the phases of simulate.methods.averaging.Averaging, over tensors of given bytes.

    Delayed merges hold less, but the merge at the run's end is never delayed.
    """
    # Messages are averaged one after the other, so each has a peak of its own.
    for group in bucket(sizes):
        members = [sizes[i] for i in group]
        message, largest = sum(members), max(members)
        if wire != "full" and context.devices > 1 and not served:
            mean = compressed_mean(context, message // context.element_bytes, wire)
            yield at_merge(max(mean.held, largest + mean.last, mean.last + message))
        elif context.devices > 1:
            yield at_merge(2 * message)
        if outer:
            yield Phase("outer_step", 0, 0, message + OUTER_TENSORS * largest)


def sparse_averaging_phases(
    context: ExchangeContext, sizes: Sequence[int], sparsity: Sparsity, wire: str
) -> Iterator[Phase]:
    """Yield the phases of simulate.methods.averaging.Averaging with sparse changes and an outer step."""
    for group in bucket(sizes):
        members = [sizes[i] for i in group]
        message, largest = sum(members), max(members)
        if context.devices > 1:
            yield at_merge(max(_sparse_mean_bytes(context, message, largest, sparsity, wire), 2 * message))
        yield Phase("outer_step", 0, 0, message + largest)


def _sparse_mean_bytes(context: ExchangeContext, message: int, largest: int, sparsity: Sparsity, wire: str) -> int:
    """Return the bytes at the peak of a mean of vectors, as simulate.comm.sparse computes it."""
    element_bytes = context.element_bytes
    kept = sparsity.kept(message // element_bytes)
    # Magnitudes, and of the largest their values and places.
    looking = message + kept * (element_bytes + LONG_BYTES)
    # Places with their filling, parts of three bytes as whole numbers, and these side by side.
    packing = kept * LONG_BYTES * 5
    sent = positions_bytes(kept) + wire_bytes(kept, wire, element_bytes)
    adding = message + context.devices * sent + kept * (3 * LONG_BYTES + element_bytes)
    return max(largest, looking, packing, adding)


@dataclass(frozen=True)
class CompressedMean:
    """Bytes of a compressed mean of one message, without its error feedback."""

    held: int
    """Bytes at the peak."""
    last: int
    """Bytes of the resulting mean."""


def compressed_mean(context: ExchangeContext, elements: int, wire: str) -> CompressedMean:
    """Return the bytes of a mean of so many elements, as simulate.comm.compression computes it.

    It encodes, exchanges, decodes and averages; then encodes the means, gathers and decodes them. Where devices may be
    missing, as simulate.comm.mean_of_some does, among few or all.
    """
    if context.fewest is None:
        return _compressed_mean(context, elements, wire)
    # Chunks grow as devices are missing; fewer than all also hold the error of the mean that they send.
    among = [_compressed_mean(replace(context, devices=n), elements, wire) for n in (context.fewest, context.devices)]
    chunk_bytes = chunk_elements(elements, context.fewest) * context.element_bytes
    return CompressedMean(max(mean.held for mean in among) + 2 * chunk_bytes, max(mean.last for mean in among))


def _compressed_mean(context: ExchangeContext, elements: int, wire: str) -> CompressedMean:
    chunk = chunk_elements(elements, context.devices)
    # Every device averages one chunk, so the message is padded to whole chunks.
    padded, mean = chunk * context.devices, chunk * context.element_bytes
    message = wire_bytes(padded, wire, context.element_bytes)
    decoded = padded * context.element_bytes
    encoding, unpacked = message, 0
    if wire in WIRE_BITS:
        # The rounded floats and what divides them, then integers of a byte each; packing several into a byte takes
        # three such tensors.
        packs = WIRE_BITS[wire] < 8
        encoding = decoded + (3 if packs else 1) * padded + 2 * scales_bytes(padded, wire)
        unpacked = padded if packs else 0
    sent = message + decoded + unpacked
    averaged = 2 * message + message // context.devices + decoded + max(unpacked, mean)
    return CompressedMean(max(encoding, sent, averaged), decoded)
