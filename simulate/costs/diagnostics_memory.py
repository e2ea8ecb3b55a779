"""What diagnostics take of a device's memory and disk, beside the run that they look at.

A round's figures are worked out layer by layer in double precision right before the merge
(simulate.methods.round_updates).
Gradients are a dense network's, which leave the device as they come: their sums lie in a mapped file of the host's.

Letters: X columns of everyone's factors, n elements, s the smaller side of a matrix, K directions, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from simulate.comm.transfers import MESSAGE_BYTES
from simulate.config.run import Run
from simulate.costs.activations import step_phases
from simulate.costs.cache import by_method
from simulate.costs.diagnostics_bytes import FIGURE_BYTES
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import LinearShape, ModelShape, ParameterShape
from simulate.rules.diagnostics import DIRECTIONS, SAMPLED_HEADS
from simulate.rules.method_plan import AdapterLayout, plan_of
from simulate.rules.phases import Phase, WeightMaterialisation

DRAWN = 4
"""Tensors of all heads' A at the height of drawing it."""
EIGENVECTORS = 4
"""Matrices of the smaller side at a decomposition's height: the Gram matrix, its vectors, and twice LAPACK's work."""


def diagnosing_phases(
    run: Run, shape: ModelShape, made: WeightMaterialisation, shared_memory: bool, dropped_bytes: int
) -> tuple[Phase, ...]:
    """Return the moments of an event that can be a device's peak, over what is held all the time.

    `made` says how weights come about, `dropped_bytes` what moments the merge drops.
    """
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    step = step_phases(
        shape, run.train.micro_batch, 0, 0, run.train.activation_checkpointing, element_bytes, element_bytes,
        made=made, plain=True,
    )  # fmt: skip
    passes = [phase for phase in step if phase.name != "evaluation"]
    passes.append(_last_forward(passes[0], run, shape, made))
    largest = max(tensor.elements for tensor in shape.tensors) * element_bytes
    message = max(largest, min(MESSAGE_BYTES, shape.parameters * element_bytes)) if run.cluster.devices > 1 else 0
    # On its way: on the device, and packed.
    adding = message if shared_memory else 2 * message
    batch_bytes = run.train.micro_batch * shape.inputs * element_bytes  # of images, held until the next one comes
    gradients = (*passes, Phase("gradient_figures", 0, batch_bytes, adding))
    after_merge = (replace(phase, name="gradient_figures", dropped=dropped_bytes) for phase in gradients)
    of_heads = _drawing_bytes(run, shape) if shared_memory else 0
    of_round = max(round_bytes(run, shape), of_heads)
    return (Phase("round_figures", 0, batch_bytes, of_round), *after_merge)


def _last_forward(first: Phase, run: Run, shape: ModelShape, made: WeightMaterialisation) -> Phase:
    """Return the pass of the last layer whose weight is made, before there are logits."""
    element_bytes = ELEMENT_BYTES[run.train.dtype]
    logits = run.train.micro_batch * shape.predictions * shape.outputs * element_bytes if first.name == "forward" else 0
    weight = made.height(max(linear.weights for linear in shape.adapted), element_bytes, 0)
    return replace(first, activations=first.activations - logits, temporary=weight)


@by_method
def kept_bytes(run: Run, shape: ModelShape) -> int:
    """Return what a device keeps from one event to the next, if its run has any: the last merge, and first directions.

    A checkpoint has both.
    """
    if run.train.diagnostics_every is None:
        return 0
    directions = sum(_directions(*_sides(tensor.shape)) for tensor in _matrices(run, shape))
    return _kept_elements(run, shape) * ELEMENT_BYTES[run.train.dtype] + directions * FIGURE_BYTES


def _kept_elements(run: Run, shape: ModelShape) -> int:
    return plan_of(run.method).last_merge_elements(shape, run.cluster.devices)


def _matrices(run: Run, shape: ModelShape) -> Iterator[ParameterShape]:
    """Yield the tensors whose changes are decomposed."""
    if plan_of(run.method).has_separate_heads:
        yield from (tensor for tensor in shape.tensors if tensor.kind == "adapted")
    yield from (tensor for tensor in _separate_tensors(run, shape) if tensor.is_matrix)


def _separate_tensors(run: Run, shape: ModelShape) -> Sequence[ParameterShape]:
    return plan_of(run.method).separate_tensors(shape, run.cluster.devices)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _directions(outputs: int, inputs: int) -> int:
    return min(DIRECTIONS, outputs, inputs) * (outputs + inputs)


@by_method
def round_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes at the height of a round's figures: of its largest layer."""
    layers = [_of_tensor(run, tensor) for tensor in _separate_tensors(run, shape)]
    plan = plan_of(run.method)
    layout = plan.adapters(run.cluster.devices) if plan.has_separate_heads else None
    if layout is not None:
        layers += [_of_heads(run, layout, linear) for linear in shape.in_order()]
    return max(layers, default=0)


def _drawing_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes at the height of drawing everyone's frozen A, which happens in the host's memory."""
    devices = run.cluster.devices
    layout = plan_of(run.method).adapters(devices)
    if layout is None or not layout.frozen_a or layout.draws_jointly:
        return 0
    return max(
        DRAWN * linear.in_features * devices * layout.held_rank * FIGURE_BYTES
        + linear.out_features * devices * layout.held_rank * ELEMENT_BYTES[run.train.dtype]
        for linear in shape.in_order()
    )


def _double(elements: int, element_bytes: int) -> int:
    """Return the bytes of a copy in double precision; none where it is."""
    return 0 if element_bytes == FIGURE_BYTES else elements * FIGURE_BYTES


def _of_heads(run: Run, layout: AdapterLayout, linear: LinearShape) -> int:
    """Of low-rank heads: everyone's factors, and beside them means, changes or a decomposition."""
    devices, element_bytes = run.cluster.devices, ELEMENT_BYTES[run.train.dtype]
    outputs, inputs = linear.out_features, linear.in_features
    columns, sets = devices * layout.held_rank, 2 if layout.subtracts else 1
    left, right = outputs * columns, inputs * columns
    gathered = ((left + (0 if layout.frozen_a else right)) * sets if devices > 1 else 0) + layout.frozen_a * right
    doubled = sets * _double(left + right, element_bytes)
    # With two sets both are put together, a copy more; then the scale goes into the left ones.
    joined = sets * (left + right) * FIGURE_BYTES if sets > 1 else 0
    scaled = (joined or doubled) + sets * left * FIGURE_BYTES
    coming = gathered * element_bytes + max(doubled + joined, scaled)
    factors = sets * (left + right) * FIGURE_BYTES
    weight = outputs * inputs * FIGURE_BYTES
    stacked = sets * left * FIGURE_BYTES
    squares = min(outputs, inputs) ** 2 * FIGURE_BYTES
    compared = _bases(outputs, inputs, devices) + 2 * factors // devices  # two heads' factors in other bases
    working = max(stacked + 2 * weight, stacked // devices + 3 * weight, weight + max(EIGENVECTORS * squares, compared))
    return factors // devices + max(coming, factors + working)  # beside the own ones


def _bases(outputs: int, inputs: int, devices: int) -> int:
    """Of the leading directions of those that are compared."""
    return min(SAMPLED_HEADS, devices) * outputs * min(DIRECTIONS, outputs, inputs) * FIGURE_BYTES


def _of_tensor(run: Run, tensor: ParameterShape) -> int:
    """Of what devices train as a whole: the mean change, and beside it one or two devices' own, or a decomposition."""
    devices = run.cluster.devices
    change = tensor.elements * FIGURE_BYTES
    weights = 2 * _double(tensor.elements, ELEMENT_BYTES[run.train.dtype])  # of which the change is the difference
    height = change + max(change + weights, 2 * change)
    if not tensor.is_matrix:
        return height
    outputs, inputs = _sides(tensor.shape)
    decomposed = change + EIGENVECTORS * min(outputs, inputs) ** 2 * FIGURE_BYTES
    if devices == 1:
        return max(height, decomposed)
    return _bases(outputs, inputs, devices) + change + max(change + max(change + weights, 2 * change), decomposed)
