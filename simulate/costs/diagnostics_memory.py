"""Bound the memory and disk that diagnostics take, on top of the run that they look at.

Diagnostics run seldom, so their memory need not be planned to the byte: a bound of a few lines replaces the exact order
of allocations. It is never below the measured peak and at most a quarter above it (of all that a device then holds).
Only the state kept from one event to the next is exact, since checkpoints contain it. simulate.costs.memory adds both
to the plan of a diagnosed run.

A round's figures are computed layer by layer, in double precision, right before the merge
(simulate.methods.round_updates). Gradients are a dense network's; each is moved to a mapped file of the host as soon
as it is complete.

Letters: N devices, O outputs, I inputs, K directions.
"""

from __future__ import annotations

import math

from simulate.comm.transfers import MESSAGE_BYTES
from simulate.config.run import Run
from simulate.costs.activations import step_phases
from simulate.costs.cache import by_method
from simulate.costs.diagnostics_bytes import FIGURE_BYTES
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.diagnostics import DIRECTIONS, SAMPLED_HEADS
from simulate.rules.method_plan import plan_of
from simulate.rules.phases import Phase, WeightMaterialisation

MARGIN = 1.125
"""Factor for tensors that are not counted: scalars; outputs that plain RMS norms keep, at most an eighth of a block's
activations; parts of gradients that sums of squares copy in double precision."""


def diagnosing_phases(
    run: Run, shape: ModelShape, materialisation: WeightMaterialisation, shared_memory: bool, dropped_bytes: int
) -> tuple[Phase, ...]:
    """Return the phases of an event that can be a device's peak, on top of what is held all the time.

    `materialisation` says how the dense weights are computed; `dropped_bytes` are moments that the preceding merge
    already freed.
    """
    element_bytes, train = ELEMENT_BYTES[run.train.dtype], run.train
    batch_bytes = train.device_batch * shape.inputs * element_bytes  # of images, held until the next batch comes
    largest = max(tensor.elements for tensor in shape.tensors) * element_bytes
    dense_step = step_phases(
        shape, train.micro_batch, 0, 0, train.activation_checkpointing, element_bytes, element_bytes
    )  # fmt: skip
    # The plain network holds no adapters and no optimizer, so its passes are those of rank 0.
    passes = round(MARGIN * max(phase.activations + phase.temporary for phase in dense_step))
    # A pass counts its own images; those of the step's further passes wait beside them.
    passes += batch_bytes - train.micro_batch * shape.inputs * element_bytes
    making = materialisation.height(max(linear.weights for linear in shape.adapted), element_bytes, 0)
    message = max(largest, min(MESSAGE_BYTES, shape.parameters * element_bytes)) if run.cluster.devices > 1 else 0
    # The host holds the sum of gradients; a device with memory of its own also holds a copy, and one in a message.
    adding = round(MARGIN * message * (1 if shared_memory else 2))
    return (
        Phase("round_figures", 0, batch_bytes, round_bytes(run, shape)),
        Phase("gradient_figures", 0, passes, max(largest, making), dropped_bytes),
        Phase("gradient_figures", 0, batch_bytes, adding, dropped_bytes),
    )


@by_method
def kept_bytes(run: Run, shape: ModelShape) -> int:
    """Return the bytes that a device keeps from one event to the next, 0 in a run without diagnostics.

    They are the last merge, and each matrix's leading directions at the first event; a checkpoint contains both.
    """
    if run.train.diagnostics_every is None:
        return 0
    plan, devices = plan_of(run.method), run.cluster.devices
    matrices = [tensor for tensor in plan.separate_tensors(shape, devices) if tensor.is_matrix]
    if plan.has_separate_heads:
        matrices += [tensor for tensor in shape.tensors if tensor.kind == "adapted"]
    directions = sum(min(DIRECTIONS, *_sides(tensor)) * sum(_sides(tensor)) for tensor in matrices)
    # With a quorum the method keeps it itself.
    elements = 0 if run.cluster.has_quorum else plan.last_merge_elements(shape, devices)
    last_merge = elements * ELEMENT_BYTES[run.train.dtype]
    return last_merge + directions * FIGURE_BYTES


def _sides(tensor: ParameterShape) -> tuple[int, int]:
    return tensor.shape[0], math.prod(tensor.shape[1:])


@by_method
def round_bytes(run: Run, shape: ModelShape) -> int:
    """Return a bound of the peak bytes of a round's figures, which its largest layer reaches."""
    plan, devices = plan_of(run.method), run.cluster.devices
    # A device's own change is the difference of two weights; fp64 needs no copy of it in double precision.
    parts = 2 if run.train.dtype == "fp64" else 3
    layers = []
    for tensor in plan.separate_tensors(shape, devices):
        # The mean change, a device's change, and the weights that it comes from.
        num_elements = (1 + parts) * tensor.elements
        if tensor.is_matrix:  # devices' changes are compared in pairs, and the mean one is decomposed
            squares = min(_sides(tensor)) ** 2
            compared = _compared(tensor.shape[0], devices) + (devices > 1) * tensor.elements
            num_elements = compared + tensor.elements + max(parts * tensor.elements, 4 * squares)
        layers.append(num_elements)
    layout = plan.adapters(devices) if plan.has_separate_heads else None
    if layout is not None:
        sets = 2 if layout.subtracts else 1  # the present factors, and those of the last merge
        for linear in shape.in_order():
            left, weight = sets * devices * layout.held_rank * linear.out_features, linear.weights
            factors = left + sets * devices * layout.held_rank * linear.in_features
            squares = min(linear.out_features, linear.in_features) ** 2
            working = max(left + 3 * weight, weight + 4 * squares + _compared(linear.out_features, devices))
            coming = (4 if layout.frozen_a else 2.5) * factors
            layers.append(round(factors / devices + max(coming, factors + working)))
    return round(MARGIN * max(layers, default=0)) * FIGURE_BYTES


def _compared(outputs: int, devices: int) -> int:
    """Return the elements of the leading directions of all heads that are compared."""
    return min(SAMPLED_HEADS, devices) * outputs * DIRECTIONS
