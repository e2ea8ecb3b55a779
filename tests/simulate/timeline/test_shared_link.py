"""Transfers that share a link: by hand, and against a simulation in small time steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.timeline.shared_link import shared_ends
from tests.reference.hops import ring_ends, sliced_ends


def test_the_second_of_two_slows_the_first_down() -> None:
    # 10 bytes at 2/s alone, 3/s together: 4 bytes are through when the second comes; 6 more at 1.5/s end at 6. The
    # second then has 6 of 10, and 4 more at 2/s take 2 s.
    ends_N = shared_ends(np.array([0.0, 2.0]), 10, 2, 3)
    assert ends_N.tolist() == pytest.approx([6.0, 8.0])


def test_order_does_not_matter() -> None:
    assert shared_ends(np.array([2.0, 0.0]), 10, 2, 3).tolist() == pytest.approx([8.0, 6.0])


def test_all_at_once_is_the_closed_form_to_the_last_bit() -> None:
    assert shared_ends(np.full(7, 3.0), 11, 2, 5).tolist() == [3.0 + 7 * 11 / 5] * 7


def test_a_pause_between_transfers_is_none_of_their_time() -> None:
    assert shared_ends(np.array([0.0, 100.0, 100.0]), 10, 2, 3).tolist() == pytest.approx(
        [5.0, 100 + 20 / 3, 100 + 20 / 3]
    )


def test_almost_at_once_is_almost_the_closed_form() -> None:
    starts_N = np.linspace(0, 1e-9, 50)
    assert shared_ends(starts_N, 10, 2, 30) == pytest.approx(np.full(50, 50 * 10 / 30), rel=1e-6)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=6), st.floats(1, 5), st.floats(1, 8))
def test_slices_of_time_say_the_same(starts: list[float], own: float, whole: float) -> None:
    ends = sliced_ends(starts, 3.0, own, whole, 2e-3)
    assert shared_ends(np.array(starts), 3.0, own, whole) == pytest.approx(np.array(ends), abs=2e-2)


@given(st.lists(st.floats(0, 9), min_size=2, max_size=8), st.sampled_from((1, 2)))
def test_nobody_on_a_ring_is_through_before_the_last_to_start_plus_all_hops(starts: list[float], phases: int) -> None:
    hops = phases * (len(starts) - 1)
    assert ring_ends(starts, hops, [0.5] * len(starts)) == pytest.approx([max(starts) + hops * 0.5] * len(starts))


def test_with_too_few_hops_some_are_through_earlier() -> None:
    assert min(ring_ends([9.0, 0.0, 0.0, 0.0], 2, [0.5] * 4)) < 10.0
