"""Shards: sizes and tables by hand, every sample exactly once, and skew as alpha demands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.data.partition import even_shards, fit_table, shard_sizes, skewed_shards


@pytest.mark.parametrize(
    ("samples", "devices", "shards", "sizes"),
    [
        pytest.param(10, 3, None, [3, 4, 3], id="equal"),
        pytest.param(12, 4, None, [3, 3, 3, 3], id="without rest"),
        pytest.param(70, 4, [4.0, 1.0, 1.0, 1.0], [40, 10, 10, 10], id="four to one"),
        pytest.param(10, 3, [0.1, 0.7, 0.2], [1, 7, 2], id="tenths"),
        pytest.param(2, 3, None, [1, 0, 1], id="too few"),
    ],
)
def test_sizes_by_hand(samples: int, devices: int, shards: list[float] | None, sizes: list[int]) -> None:
    assert shard_sizes(samples, devices, shards) == sizes


SHARES = st.lists(st.floats(0.05, 20), min_size=1, max_size=12)


@given(samples=st.integers(1, 400), shares=SHARES, seed=st.integers(0, 5))
def test_even_shards_hold_every_sample_once(samples: int, shares: list[float], seed: int) -> None:
    parts = even_shards(samples, len(shares), shares, seed)
    assert sorted(np.concatenate(parts)) == list(range(samples))
    assert [len(part) for part in parts] == shard_sizes(samples, len(shares), shares)


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=300),
    shares=SHARES,
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e3]),
    equal=st.booleans(),
)
def test_skewed_shards_hold_every_sample_once_in_the_given_sizes(
    labels: list[int], shares: list[float], alpha: float, equal: bool
) -> None:
    sizes = None if equal else shares
    parts = skewed_shards(np.array(labels), 7, len(shares), sizes, alpha, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert [len(part) for part in parts] == shard_sizes(len(labels), len(shares), sizes)


def test_samples_are_shuffled_and_addressed_by_the_seed() -> None:
    first, again, other = (even_shards(100, 2, None, seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)


LABELS = np.arange(1000) % 10


def table_of(alpha: float, devices: int = 10, seed: int = 0) -> np.ndarray:
    """Return the number of samples of each device in each class, (N, K)."""
    parts = skewed_shards(LABELS, 10, devices, None, alpha, seed)
    return np.stack([np.bincount(LABELS[part], minlength=10) for part in parts])


def test_a_large_alpha_deals_classes_alike() -> None:
    assert np.abs(table_of(1e6) - 10).max() <= 1


def test_a_small_alpha_gives_devices_few_classes() -> None:
    # Of ten devices with a hundred samples each, of ten classes of a hundred: one class a device.
    assert np.sort(table_of(1e-2), axis=1)[:, -1].min() >= 90


def test_skew_grows_as_alpha_falls() -> None:
    largest = [np.mean([table_of(alpha, seed=seed).max(1).mean() for seed in range(5)]) for alpha in (100, 1, 0.1)]
    assert largest[0] < largest[1] < largest[2]


def test_a_table_that_fits_already_stays() -> None:
    wanted = np.array([[30, 10], [20, 40]])
    assert np.array_equal(fit_table(wanted / 7.0, wanted.sum(1), wanted.sum(0)), wanted)


def test_fitting_by_hand() -> None:
    # Rows 50 and 50, columns 50 and 50, odds 2·2/(1·1) = 4: x/(50 − x) = 2, so x = 33⅓.
    table = fit_table(np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([50, 50]), np.array([50, 50]))
    assert table.tolist() in ([[33, 17], [17, 33]], [[34, 16], [16, 34]])


def test_shares_of_nothing_are_dealt_out_all_the_same() -> None:
    table = fit_table(np.zeros((2, 2)), np.array([3, 1]), np.array([2, 2]))
    assert table.sum(1).tolist() == [3, 1] and table.sum(0).tolist() == [2, 2]
