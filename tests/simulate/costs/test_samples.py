"""The assumed number of samples to equal loss, at points where it is plain arithmetic."""

from __future__ import annotations

import math

import pytest

from simulate.config import Run
from simulate.costs.samples import samples_factor
from tests import tiny

WIDE = {"width": 16, "context": 8}
"""Largest layer dimension: 16. Two devices with two samples of eight tokens make steps of 32 tokens."""


def factor(run: Run, tokens: float = math.inf) -> float:
    return samples_factor(run, run.model.shape(), tokens)


def test_dense_training_with_small_batches_is_the_yardstick() -> None:
    assert factor(tiny.ddp_run(model=WIDE)) == 1


def test_a_batch_of_one_part_in_two_hundred_doubles_the_samples() -> None:
    assert factor(tiny.ddp_run(model=WIDE), tokens=200 * 32) == 2
    assert factor(tiny.ddp_run(model=WIDE), tokens=400 * 32) == 1.5


def test_enough_rank_and_frequent_merges_cost_what_the_paper_says() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=8, merge_every=10)) == 1.4
    assert factor(tiny.lte_run(model=WIDE, rank=16, merge_every=1)) == 1.4


def test_half_the_rank_that_is_needed_costs_its_square_root() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=4)) == pytest.approx(1.4 * math.sqrt(2))


def test_ten_times_rarer_merges_cost_a_factor() -> None:
    assert factor(tiny.lte_run(model=WIDE, rank=8, merge_every=100)) == pytest.approx(1.4 * 10**0.15)
