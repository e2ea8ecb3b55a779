"""Count the bytes that one diagnostics event exchanges, on top of those of the method.

Over devices in processes of their own, layer by layer, as simulate.methods.round_updates and
simulate.training.diagnostics exchange them:

    heads of LTE    all-gather of a device's factors; with those of the last merge, where that is subtracted; without a
                    frozen A, which everyone can draw
    other weights   all-reduce of the devices' mean change, in fp64; of a matrix S - 1 of S sampled devices' weights, a
                    broadcast each, and an all-reduce of K left singular vectors a device and of S x S inner products
    gradients       all-reduce of their sum

A few numbers a device travel as well and are not counted. In a user network, a matrix that no linear layer or
convolution owns is counted as one with pairs, so that the bytes are an upper bound.

Letters: N devices, O outputs, I inputs, S sampled devices, K directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from simulate.comm.transfers import Exchange, Transfer, averages
from simulate.config.run import Run
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape, ParameterShape
from simulate.rules.diagnostics import DIRECTIONS, SAMPLED_HEADS
from simulate.rules.method_plan import plan_of

FIGURE_BYTES = ELEMENT_BYTES["fp64"]


def diagnostics_exchange(run: Run, shape: ModelShape, merged_before: bool = True) -> Exchange:
    """Return the messages of one event; the first merge of reset-less LTE has nothing to subtract yet."""
    # Each device's share of one gradient of all weights, in the weights' format.
    counts = [tensor.elements for tensor in shape.tensors]
    gradients = averages(counts, run.cluster.devices, "full", ELEMENT_BYTES[run.train.dtype])
    return Exchange((*_round(run, shape, merged_before), *gradients))


def _round(run: Run, shape: ModelShape, merged_before: bool) -> Iterator[Transfer]:
    """Yield the messages about a round; none where devices agree after every step."""
    plan, devices = plan_of(run.method), run.cluster.devices
    layout = plan.adapters(devices) if plan.has_separate_heads else None  # else all devices hold equal pairs
    if layout is not None:
        sets = 2 if layout.subtracts and merged_before else 1
        for linear in shape.in_order():
            elements = linear.factors(layout.held_rank, layout.frozen_a)
            yield Transfer("all_gather", sets * elements * ELEMENT_BYTES[run.train.dtype], devices)
    yield from _dense(run, plan.separate_tensors(shape, devices), plan.separate_copies(devices))


def _dense(run: Run, tensors: Iterable[ParameterShape], heads: int) -> Iterator[Transfer]:
    devices, sampled = run.cluster.devices, min(heads, SAMPLED_HEADS)
    for tensor in tensors:
        yield Transfer("all_reduce", tensor.elements * FIGURE_BYTES, devices)
        if sampled > 1 and tensor.is_matrix:  # a vector has no subspaces to compare
            weights = tensor.elements * ELEMENT_BYTES[run.train.dtype]
            yield from (Transfer("broadcast", weights, devices) for _ in range(sampled - 1))
            outputs, inputs = tensor.shape[0], math.prod(tensor.shape[1:])
            directions = sampled * outputs * min(DIRECTIONS, outputs, inputs)
            yield Transfer("all_reduce", (directions + sampled**2) * FIGURE_BYTES, devices)
