"""Random draws depend on their addresses alone, and have the documented distribution."""

from __future__ import annotations

import numpy as np
import pytest

from simulate.rules.jitter import normal, slowness, uniform

MANY = np.arange(200_000)


def test_a_draw_is_its_addresss_whoever_else_is_there() -> None:
    among_many = uniform(3, "leave", MANY, 7)
    assert uniform(3, "leave", np.array([41, 5]), 7).tolist() == among_many[[41, 5]].tolist()


def test_other_addresses_draw_otherwise() -> None:
    draws = [uniform(0, "a", MANY, 0), uniform(1, "a", MANY, 0), uniform(0, "b", MANY, 0), uniform(0, "a", MANY, 1)]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]) < 0.01


def test_uniform_and_normal_numbers_are_spread_as_they_should() -> None:
    flat, bell = uniform(0, "x", MANY, 0), normal(0, "x", MANY, 0)
    assert flat.min() > 0 and flat.max() < 1
    assert np.histogram(flat, 10, (0, 1))[0] == pytest.approx(np.full(10, 20_000), rel=0.03)
    assert (bell.mean(), bell.std()) == pytest.approx((0, 1), abs=0.01)


@pytest.mark.parametrize("jitter", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 10])
def test_steps_are_as_long_as_the_profile_says_on_average_and_spread_as_independent_ones_are(
    jitter: float, steps: int
) -> None:
    factor_N = slowness(0, MANY, 0, np.full(len(MANY), float(steps)), np.full(len(MANY), jitter))
    assert factor_N.min() >= 0
    assert factor_N.mean() == pytest.approx(1, abs=0.005)
    assert factor_N.std() == pytest.approx(jitter / steps**0.5, rel=0.02)


def test_the_shape_is_the_gamma_distributions() -> None:
    ours = np.sort(slowness(0, MANY, 0, np.full(len(MANY), 4.0), np.full(len(MANY), 0.6)))
    theirs = np.sort(np.random.default_rng(0).gamma(4 / 0.36, 0.36 / 4, len(MANY)))
    assert np.quantile(ours, (0.05, 0.5, 0.95)) == pytest.approx(np.quantile(theirs, (0.05, 0.5, 0.95)), rel=0.01)


def test_without_jitter_nothing_is_drawn() -> None:
    assert set(slowness(0, MANY[:9], 0, np.ones(9), np.zeros(9)).tolist()) == {1.0}
