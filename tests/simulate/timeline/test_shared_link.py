"""Transfers that share a link: by hand, and against a simulation in small time steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulate.timeline.shared_link import UnequalLinks, shared_ends, unequal_ends
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


def links(own: list[float], whole: float, place: list[int] | None = None, **rates: float) -> UnequalLinks:
    places = np.array(place or [-1] * len(own))
    return UnequalLinks(np.array(own), places, {int(key[1:]): rate for key, rate in rates.items()}, whole)


def test_what_a_slow_line_leaves_goes_to_the_others() -> None:
    # 1/s of its own, so that the other has 3 of 4/s: 12 bytes take 12 s and 4 s.
    assert unequal_ends(np.zeros(2), 12, links([1, 10], 4)).tolist() == pytest.approx([12.0, 4.0])
    # The second comes at 2, when the first has 8 of 12 through; both then get 2/s. The first is through at 4, and the
    # second, with 4 of its 12, gets 4/s and ends at 6.
    assert unequal_ends(np.array([0.0, 2.0]), 12, links([10, 10], 4)).tolist() == pytest.approx([4.0, 6.0])


def test_devices_of_one_place_share_its_line() -> None:
    # Two at a place of 2/s get 1/s each, the third its own 3/s of 5/s.
    ends_N = unequal_ends(np.zeros(3), 6, links([9, 9, 3], 5, [0, 0, -1], p0=2.0))
    assert ends_N.tolist() == pytest.approx([6.0, 6.0, 2.0])


def test_nothing_ends_before_it_starts_after_a_pause() -> None:
    assert unequal_ends(np.array([0.0, 100.0]), 10, links([2, 5], 9)).tolist() == pytest.approx([5.0, 102.0])


@given(st.lists(st.floats(0, 4), min_size=1, max_size=6), st.floats(1, 5), st.floats(1, 8))
def test_equal_links_end_as_by_the_two_queues(starts: list[float], own: float, whole: float) -> None:
    starts_N = np.array(starts)
    ends_N = unequal_ends(starts_N, 3.0, links([own] * len(starts), whole))
    assert ends_N == pytest.approx(shared_ends(starts_N, 3.0, own, whole), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0.1, 5), st.sampled_from((-1, 0, 1))), min_size=1, max_size=6), st.floats(1, 8))
def test_the_last_of_those_that_start_together_is_the_closed_forms(own: list[tuple[float, int]], whole: float) -> None:
    rates, places = [rate for rate, _ in own], [place for _, place in own]
    ends_N = unequal_ends(np.zeros(len(own)), 3.0, links(rates, whole, places, p0=1.5, p1=0.7))
    crossing = [(places.count(place) * 3.0 / rate) for place, rate in ((0, 1.5), (1, 0.7))]
    assert max(ends_N) == pytest.approx(max(3.0 / min(rates), len(own) * 3.0 / whole, *crossing), rel=1e-9)
