"""Floating-point operations of one device, in closed form; a multiply-add counts as two.

Letters: P weights of a layer, F elements of its factors (one head's: a row passes through one head). A layer works on
rows: a sample's tokens, its channels, or a convolution's pixels.
"""

from __future__ import annotations

from functools import lru_cache

from simulate.config.run import Run
from simulate.costs.state import projected
from simulate.layers.folding import writes_columns
from simulate.models.shapes import ModelShape
from simulate.rules.method_plan import AdapterLayout, plan_of
from simulate.rules.optimizer import through_gram

ITERATIONS = 5
"""Iterations of Muon's Newton-Schulz polynomial."""


def pass_flops(run: Run, shape: ModelShape) -> float:
    """Return the operations of a step's forward and backward passes, which autocast runs in another format.

    A dense warm start counts with its share of the run.
    """
    plan, train = plan_of(run.method), run.train
    samples, checkpointing = train.micro_batch * train.accumulate, train.activation_checkpointing
    dense = samples * _dense_sample_flops(shape, checkpointing)
    layout = plan.adapters(run.cluster.devices)
    if layout is None:
        return dense
    of_sample = _lte_sample_flops(shape, layout.row_rank, layout.subtracts, layout.frozen_a, checkpointing)
    adapted = samples * (of_sample - _saved_by_columns(shape, layout, train.micro_batch, checkpointing))
    share = plan.dense_share(run.train.steps)
    return share * dense + (1 - share) * adapted


def forward_flops(shape: ModelShape, samples: int) -> float:
    """Return the operations of a forward pass of plain layers."""
    # Layers outside blocks count three passes in outer_flops.
    return samples * (float(shape.adapted_flops + shape.mixing_flops) + shape.outer_flops / 3)


def update_flops(run: Run, shape: ModelShape) -> float:
    """Return a step's operations on gradients: those of compression, Muon and APOLLO, which autocast leaves alone."""
    plan = plan_of(run.method)
    total = plan.update_flops(shape)
    if run.train.optimizer == "apollo":
        return total + sum(2.0 * rank * x.weights * x.count for x, rank in projected(shape, run.train.apollo_rank))
    if run.train.optimizer != "muon":
        return total
    # Muon orthogonalises the updates of matrices only; AdamW's operations are too few to count.
    layout = plan.adapters(run.cluster.devices)
    if layout is None:
        return total + _orthogonalising_weights(shape)
    factors = _orthogonalising_factors(shape, layout.held_rank, layout.rank, layout.frozen_a)
    if not plan.starts_dense:
        return factors
    share = plan.dense_share(run.train.steps)
    return share * _orthogonalising_weights(shape) + (1 - share) * factors


def _orthogonalising(rows: int, columns: int) -> float:
    """Return the operations of Muon's iterations on one matrix.

    Each iteration takes a Gram matrix, its square and a product with the matrix. Long matrices iterate on the Gram
    matrix alone: that one and a product with the matrix once, a square in each iteration, three products between two.
    """
    small, large = sorted((rows, columns))
    if through_gram(rows, columns):
        return 4.0 * small**2 * large + (2.0 * ITERATIONS + 6.0 * (ITERATIONS - 1)) * small**3
    return ITERATIONS * (4.0 * small**2 * large + 2.0 * small**3)


@lru_cache(maxsize=64)
def _orthogonalising_weights(shape: ModelShape) -> float:
    return sum(_orthogonalising(x.out_features, x.in_features) * x.count for x in shape.adapted)


@lru_cache(maxsize=1024)
def _orthogonalising_factors(shape: ModelShape, held_rank: int, rank: int, frozen_a: bool) -> float:
    pairs, total = held_rank / rank, 0.0  # each pair is orthogonalised by itself
    for linear in shape.adapted:
        sides = (linear.out_features,) if frozen_a else (linear.out_features, linear.in_features)
        total += sum(pairs * linear.count * _orthogonalising(side, rank) for side in sides)
    return total


@lru_cache(maxsize=64)
def _dense_sample_flops(shape: ModelShape, checkpointing: bool) -> float:
    """Return the operations of a sample, 6P a row: forward 2P, gradient of the input 2P, gradient of the weights 2P
    (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    # Recomputing a block repeats its forward pass.
    blocks = float(shape.adapted_flops + shape.mixing_flops)
    return 3 * blocks + shape.outer_flops + (blocks if checkpointing else 0)


@lru_cache(maxsize=1024)
def _lte_sample_flops(shape: ModelShape, rank: int, reset_less: bool, frozen_a: bool, checkpointing: bool) -> float:
    """Return the operations of a sample, 4P + 6F a row: frozen weights need no gradient. The subtracted product of the
    last merge adds 4F (forward, gradient of the input).
    """
    factors = float(shape.factor_flops(rank))
    forward = shape.adapted_flops + factors * (2 if reset_less else 1)
    step = 2 * shape.adapted_flops + (4 if reset_less else 2) * factors + shape.factor_flops(rank, frozen_a)
    recomputed = forward + shape.mixing_flops if checkpointing else 0
    return step + 3 * shape.mixing_flops + shape.outer_flops + recomputed


@lru_cache(maxsize=1024)
def _saved_by_columns(shape: ModelShape, layout: AdapterLayout, samples: int, checkpointing: bool) -> float:
    """Return the operations of a sample that layers save where A picks columns: those with A, and where B is written
    into copies of W those with B, forward and to the inputs.
    """
    saved = 0.0
    for x in shape.adapted:
        if layout.picks_columns(x.in_features):
            written = writes_columns(samples * x.rows / layout.heads, layout.row_rank, x.in_features)
            sides = x.in_features + (x.out_features if written else 0)
            saved += 2.0 * layout.row_rank * sides * x.rows * x.count * (3 if checkpointing else 2)
    return saved


def merge_flops(run: Run, shape: ModelShape) -> float:
    """Return one device's operations in a round's merges."""
    return plan_of(run.method).merge_flops(shape, run.cluster.devices)
