"""Floating-point operations of one device, in closed form; a multiply-add counts as two.

Letters: P weights of a layer, F elements of its factors (one head's: a row passes through one head). A layer works on
rows: a sample's tokens, its channels, or a convolution's pixels.
"""

from __future__ import annotations

from functools import lru_cache

from simulate.config.method_options import AdapterOptions
from simulate.config.run import Run
from simulate.methods.lte.options import LteOptions
from simulate.methods.powersgd.options import PowerSgdOptions
from simulate.methods.relora.options import ReloraOptions
from simulate.models.shapes import ModelShape
from simulate.rules.optimizer import through_gram
from simulate.rules.transport import layer_transport

ITERATIONS = 5
"""Of Muon's Newton-Schulz polynomial."""


def step_flops(run: Run, shape: ModelShape) -> float:
    """Return the operations of one optimizer step: forward and backward passes, the optimizer's and of compression.

    A dense warm start counts with its share of the run.
    """
    return pass_flops(run, shape) + update_flops(run, shape)


def pass_flops(run: Run, shape: ModelShape) -> float:
    """Return the operations of forward and backward passes, which autocast makes in another format."""
    method, samples, checkpointing = run.method, run.train.micro_batch, run.train.activation_checkpointing
    dense = samples * _dense_sample_flops(shape, checkpointing)
    if not isinstance(method, AdapterOptions):
        return dense
    rank = method.row_rank(run.cluster.devices)
    adapted = samples * _lte_sample_flops(
        shape, rank, method.remembers_product, _has_frozen_a(method), checkpointing
    )  # fmt: skip
    share = _dense_share(run)
    return share * dense + (1 - share) * adapted


def forward_flops(shape: ModelShape, samples: int) -> float:
    """Return the operations of a forward pass of plain layers."""
    return samples * (float(shape.adapted_flops + shape.mixing_flops) + shape.outer_flops / 3)


def update_flops(run: Run, shape: ModelShape) -> float:
    """Return the operations on gradients: Muon's, and products of compression."""
    method, total = run.method, 0.0
    if isinstance(method, PowerSgdOptions):  # M·Q, Mᵀ·P and P·Qᵀ of every matrix
        total = 6.0 * method.rank * shape.parameters
    if run.train.optimizer != "muon":
        return total
    dense = sum(_orthogonalising(x.out_features, x.in_features) * x.count for x in shape.adapted)
    if not isinstance(method, AdapterOptions):
        return total + dense
    share = _dense_share(run)
    return share * dense + (1 - share) * _orthogonalising_factors(method, shape, run.cluster.devices)


def _dense_share(run: Run) -> float:
    """Share of the run's steps that train all weights before adapters do."""
    warm = run.method.warm_start_steps if isinstance(run.method, ReloraOptions) else 0
    return min(1.0, warm / run.train.steps)


def _orthogonalising(rows: int, columns: int) -> float:
    """Muon's iterations on one matrix: a Gram matrix, its square and a product with the matrix, each time.

    Through the Gram matrix: it and one product with the matrix; a square each time, and three products between two.
    """
    small, large = sorted((rows, columns))
    if through_gram(rows, columns):
        return 4.0 * small**2 * large + (2.0 * ITERATIONS + 6.0 * (ITERATIONS - 1)) * small**3
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


@lru_cache(maxsize=64)
def _dense_sample_flops(shape: ModelShape, checkpointing: bool) -> float:
    """6P a row: forward 2P, gradient to the input 2P, gradient of the weights 2P (Kaplan et al. 2020, section 2.1)."""
    blocks = float(shape.adapted_flops + shape.mixing_flops)
    return 3 * blocks + shape.outer_flops + (blocks if checkpointing else 0)


@lru_cache(maxsize=1024)
def _lte_sample_flops(shape: ModelShape, rank: int, reset_less: bool, frozen_a: bool, checkpointing: bool) -> float:
    """4P + 6F a row: frozen weights need no gradient; the subtracted old product adds 4F (forward and to the input)."""
    factors = float(shape.factor_flops(rank))
    forward = shape.adapted_flops + factors * (2 if reset_less else 1)
    step = 2 * shape.adapted_flops + (4 if reset_less else 2) * factors + shape.factor_flops(rank, frozen_a)
    recomputed = forward + shape.mixing_flops if checkpointing else 0
    return step + 3 * shape.mixing_flops + shape.outer_flops + recomputed


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
