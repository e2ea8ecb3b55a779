"""Floating-point operations of one device, in closed form; a multiply-add counts as two.

Letters: t tokens of one device and step, P weights of a layer, F elements of its factors (one head's: a token passes
through one head), d width, c context.
"""

from __future__ import annotations

from functools import lru_cache

from simulate.config import Run
from simulate.costs.schedule import layer_transport
from simulate.models.shapes import ModelShape
from simulate.options import AdapterOptions, LteOptions, PowerSgdOptions, ReloraOptions

ITERATIONS = 5
"""Of Muon's Newton-Schulz polynomial."""


def step_flops(run: Run, shape: ModelShape) -> float:
    """Return the operations of one optimizer step: forward and backward passes, and products of compression.

    A dense warm start counts with its share of the run.
    """
    method, devices = run.method, run.cluster.devices
    checkpointing = run.train.activation_checkpointing
    tokens = run.train.micro_batch * shape.context
    dense = tokens * _dense_token_flops(shape, checkpointing)
    if run.train.optimizer == "muon":
        dense += sum(_orthogonalising(x.out_features, x.in_features) * x.count for x in shape.adapted)
    if isinstance(method, AdapterOptions):
        adapted = tokens * _lte_token_flops(
            shape, method.row_rank(devices), method.remembers_product, _has_frozen_a(method), checkpointing
        )
        if run.train.optimizer == "muon":
            adapted += _orthogonalising_factors(method, shape, devices)
        warm = method.warm_start_steps if isinstance(method, ReloraOptions) else 0
        share = min(1.0, warm / run.train.steps)
        return share * dense + (1 - share) * adapted
    if isinstance(method, PowerSgdOptions):  # M·Q, Mᵀ·P and P·Qᵀ of every matrix
        return dense + 6.0 * method.rank * shape.parameters
    return dense


def _orthogonalising(rows: int, columns: int) -> float:
    """Muon's iterations on one matrix: a Gram matrix, its square and a product with the matrix, each time."""
    small, large = sorted((rows, columns))
    return ITERATIONS * (4.0 * small**2 * large + 2.0 * small**3)


def _orthogonalising_factors(method: AdapterOptions, shape: ModelShape, devices: int) -> float:
    pairs = method.held_rank(devices) / method.rank
    total = 0.0
    for linear in shape.adapted:
        sides = (linear.out_features,) if _has_frozen_a(method) else (linear.out_features, linear.in_features)
        total += sum(pairs * linear.count * _orthogonalising(side, method.rank) for side in sides)
    return total


def _has_frozen_a(method: AdapterOptions) -> bool:
    return isinstance(method, LteOptions) and method.frozen_a


def _attention_flops(shape: ModelShape) -> float:
    """Forward: two products of c x d a token, half of them behind the causal mask."""
    return 2.0 * shape.layers * shape.context * shape.width


def _head_flops(shape: ModelShape) -> float:
    """Forward of the tied output layer, which is trained densely by every method."""
    return 2.0 * shape.vocab * shape.width


@lru_cache(maxsize=64)
def _dense_token_flops(shape: ModelShape, checkpointing: bool) -> float:
    """6P: forward 2P, gradient to the input 2P, gradient of the weights 2P (Kaplan et al. 2020, section 2.1)."""
    blocks = 2.0 * shape.adapted_parameters + _attention_flops(shape)
    return 3 * (blocks + _head_flops(shape)) + (blocks if checkpointing else 0)


@lru_cache(maxsize=1024)
def _lte_token_flops(shape: ModelShape, rank: int, reset_less: bool, frozen_a: bool, checkpointing: bool) -> float:
    """4P + 6F, since frozen weights need no gradient; the subtracted old product adds 4F (forward and to the input)."""
    factors = shape.factors(rank)
    forward = 2.0 * shape.adapted_parameters + 2.0 * factors * (2 if reset_less else 1)
    gradients = 2.0 * shape.factors(rank, frozen_a)
    step = 4.0 * shape.adapted_parameters + (8.0 if reset_less else 4.0) * factors + gradients
    attention = _attention_flops(shape)
    recomputed = forward + attention if checkpointing else 0
    return step + 3 * (attention + _head_flops(shape)) + recomputed


def merge_flops(run: Run, shape: ModelShape) -> float:
    """Return one device's operations in a round's merges: Σ_h B_h·A_h over the heads whose factors it has."""
    method, devices = run.method, run.cluster.devices
    if isinstance(method, ReloraOptions):  # its rounds are steps, of which every T-th merges
        return 2.0 * shape.adapted_parameters * method.rank / method.merge_every
    if not isinstance(method, LteOptions) or method.merge_transport == "server":
        return 0.0
    rank, total = method.held_rank(devices), 0.0
    for linear in shape.adapted:
        transport = layer_transport(linear, rank, devices, method.merge_transport, method.frozen_a)
        total += 2.0 * linear.weights * linear.count * rank * (devices if transport == "gather" else 1)
    return total
