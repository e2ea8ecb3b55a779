"""Operations of a network with 1 block, width 4, 2 heads, context 3 and vocabulary 5, worked out by hand."""

from __future__ import annotations

import pytest

from simulate.config import Run
from simulate.costs.flops import merge_flops, step_flops
from tests import tiny

SIZES = {"layers": 1, "width": 4, "attention_heads": 2, "context": 3, "vocab": 5}
WEIGHTS = 12 * 4 * 4
"""P: qkv 12 x 4, projection 4 x 4, up 16 x 4, down 4 x 16."""
FACTORS = 2 * (16 + 8 + 20 + 20)
"""F of one head at rank 2: each layer's outputs plus inputs, twice."""
ATTENTION, HEAD = 2 * 3 * 4, 2 * 5 * 4
"""Forward, a token: causal attention, and the output layer."""


def flops(run: Run) -> float:
    return step_flops(run, run.model.shape())


def train(checkpointing: bool) -> dict[str, object]:
    return {"micro_batch": 2, "activation_checkpointing": checkpointing}


@pytest.mark.parametrize(
    ("checkpointing", "a_token"),
    [(False, 3 * (2 * WEIGHTS + ATTENTION + HEAD)), (True, 3 * HEAD + 4 * (2 * WEIGHTS + ATTENTION))],
)
def test_dense_training_costs_three_forwards(checkpointing: bool, a_token: int) -> None:
    assert flops(tiny.ddp_run(model=SIZES, train=train(checkpointing))) == 2 * 3 * a_token


@pytest.mark.parametrize(
    ("reset", "checkpointing", "a_token"),
    [
        ("b", False, 4 * WEIGHTS + 6 * FACTORS + 3 * (ATTENTION + HEAD)),
        ("none", False, 4 * WEIGHTS + 10 * FACTORS + 3 * (ATTENTION + HEAD)),
        ("b", True, 6 * WEIGHTS + 8 * FACTORS + 4 * ATTENTION + 3 * HEAD),
        ("none", True, 6 * WEIGHTS + 14 * FACTORS + 4 * ATTENTION + 3 * HEAD),
    ],
)
def test_frozen_weights_save_a_third_and_factors_cost_extra(reset: str, checkpointing: bool, a_token: int) -> None:
    assert flops(tiny.lte_run(model=SIZES, train=train(checkpointing), reset=reset)) == 2 * 3 * a_token


def test_a_token_passes_through_one_head() -> None:
    one, two = (tiny.lte_run(model=SIZES, heads_per_device=heads) for heads in (1, 2))
    assert flops(one) == flops(two)


@pytest.mark.parametrize(("transport", "heads"), [("gather", 6), ("reduce", 2), ("server", 0)])
def test_a_merge_multiplies_the_heads_it_has(transport: str, heads: int) -> None:
    run = tiny.lte_run(devices=3, model=SIZES, heads_per_device=2, merge_transport=transport)
    assert merge_flops(run, run.model.shape()) == 2 * WEIGHTS * heads * 2


def test_dense_training_never_merges() -> None:
    run = tiny.ddp_run(model=SIZES)
    assert merge_flops(run, run.model.shape()) == 0
