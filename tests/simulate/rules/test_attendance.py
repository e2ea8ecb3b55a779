"""Attendance of merges: by hand, and with properties that any profile has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate.config.hardware import Device
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.config.tables import LOST
from simulate.rules.attendance import Attendance, GivenAttendance, SimulatedAttendance
from simulate.rules.pace import discounts, quorum_deadline_s, round_compute_s, round_counts

PI = load_profile("raspberry_x8").device[0]


def run_of(devices: int, steps: int = 40, **cluster: object) -> Run:
    method = {"name": "local-sgd", "merge_every": 10}
    table = {"method": method, "train": {"steps": steps}, "cluster": {"devices": devices, **cluster}}
    return build_run(table)


def simulated(run: Run, step_s: tuple[float, ...], round_s: float = 10.0, **figures: float) -> SimulatedAttendance:
    device: Device = PI.model_copy(update={"leave_per_hour": 0.0, "join_s": 0.0, "step_jitter": 0.0, **figures})
    return SimulatedAttendance(run, (device,) * len(step_s), step_s, round_s)


def test_devices_stop_at_the_deadline_with_the_steps_that_they_have_by_hand() -> None:
    round_ = simulated(run_of(3, deadline_s=7.0), (1.0, 2.0, 0.5)).begin(0, 100.0)
    assert round_.brought_N.tolist() == round_.takes_N.tolist() == [7, 3, 10]
    assert round_.ends_s_N.tolist() == [107.0, 106.0, 105.0]


def test_without_a_deadline_the_quorum_th_fastest_sets_it_by_hand() -> None:
    run = run_of(3, quorum=2)
    assert quorum_deadline_s(run.cluster, 10, (1.0, 5.0, 2.0)) == 20.0
    assert simulated(run, (1.0, 5.0, 2.0)).begin(0, 0.0).brought_N.tolist() == [10, 4, 10]
    assert round_counts(run.method, (1.0, 5.0, 2.0), cluster=run.cluster) == (10, 4, 10)
    assert round_compute_s(run.method, (1.0, 5.0, 2.0), run.cluster) == (20.0, 24.0)


def test_a_device_whose_step_outlasts_a_round_brings_it_to_a_later_merge_by_hand() -> None:
    attendance = simulated(run_of(3, quorum=2, deadline_s=10.0), (1.0, 1.0, 25.0))
    rows = [attendance.begin(step, float(step)) for step in (0, 10, 20, 30)]
    # Its first step ends at 25 s, so that the third merge, at 30 s, has it; the next one begins at 30 s.
    assert [round_.brought_N.tolist() for round_ in rows] == [[10, 10, 0], [10, 10, 0], [10, 10, 1], [10, 10, 0]]
    assert [round_.takes_N.tolist()[2] for round_ in rows] == [1, 0, 0, 1]
    assert rows[2].ends_s_N.tolist() == [30.0, 30.0, 25.0]


def test_a_merge_that_lacks_the_quorum_waits_by_hand() -> None:
    attendance = simulated(run_of(2, deadline_s=10.0), (1.0, 25.0))
    round_ = attendance.begin(0, 0.0)
    assert round_.brought_N.tolist() == [10, 1] and round_.ends_s_N.tolist() == [10.0, 25.0]


def test_everyone_who_leaves_comes_back_and_the_quorum_is_waited_for() -> None:
    run = run_of(4, steps=4000, quorum=3)
    attendance = simulated(run, (1.0,) * 4, leave_per_hour=0.9999999, join_s=30.0, round_s=100.0)
    now_s, lost, joined, waited = 0.0, 0, 0, 0
    for step in range(0, 4000, 10):
        round_ = attendance.begin(step, now_s)
        assert round_.present_N.sum() >= 3
        lost, joined = lost + round_.leaves, joined + int(round_.joined_N.sum())
        waited += round_.starts_s > now_s
        now_s = float(round_.ends_s_N.max())
    # Others are back while the round that they left still waits.
    assert lost > 50 and 10 < joined < lost and waited > 10


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.data())
def test_a_rerun_sees_the_same_and_rows_replay_it(devices: int, data: st.DataObject) -> None:
    quorum = data.draw(st.integers(1, devices))
    step_s = tuple(data.draw(st.lists(st.floats(0.1, 20.0), min_size=devices, max_size=devices)))
    figures = {"leave_per_hour": data.draw(st.sampled_from([0.0, 0.5, 0.99])), "join_s": 20.0, "step_jitter": 0.3}
    run = run_of(devices, steps=95, quorum=quorum, deadline_s=data.draw(st.floats(0.5, 30.0)))

    def rows() -> list[Attendance]:
        attendance, now_s, rounds = simulated(run, step_s, round_s=60.0, **figures), 0.0, []
        for step in range(0, 95, 10):
            rounds.append(attendance.begin(step, now_s))
            now_s = float(rounds[-1].ends_s_N.max()) + 1.0
        return rounds

    first, again = rows(), rows()
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in ((one.brought_N, other.brought_N), (one.ends_s_N, other.ends_s_N)))
        assert one.present_N.sum() >= quorum and one.brought_N.max() <= 10
    replayed = GivenAttendance(run_of(devices, steps=95, merges_given=[r.brought_N.tolist() for r in first]))
    for index, one in enumerate(first):
        other = replayed.begin(10 * index, 0.0)
        assert np.array_equal(one.brought_N, other.brought_N) and np.array_equal(one.joined_N, other.joined_N)
        # Late changes that no merge takes any more are not computed in a replay.
        never = (one.brought_N == 0) & (other.takes_N == 0)
        assert np.array_equal(np.where(never, 0, one.takes_N), other.takes_N)


def test_rows_are_read_back_by_hand() -> None:
    run = run_of(3, steps=45, merges_given=[[10, 0, 10], [10, 4, LOST], [10, 6, LOST], [10, 5, 9], [8, 9, 0]])
    attendance = GivenAttendance(run)
    rounds = [attendance.begin(step, 0.0) for step in range(0, 45, 10)]
    assert [r.takes_N.tolist() for r in rounds] == [[10, 4, 10], [10, 0, 0], [10, 6, 0], [10, 5, 9], [5, 5, 0]]
    assert [r.brought_N.tolist() for r in rounds] == [[10, 0, 10], [10, 4, -1], [10, 6, -1], [10, 5, 9], [5, 5, 0]]
    assert [r.joined_N.tolist() for r in rounds] == [[False] * 3] * 3 + [[False, False, True]] + [[False] * 3]
    assert [r.leaves for r in rounds] == [0, 1, 0, 0, 0]


def test_discounts_by_hand() -> None:
    assert discounts((0, 1, 3), None) == pytest.approx([1.0, 2**-0.5, 0.5])
    assert discounts((0, 1, 3), 0.0) == [1.0, 1.0, 1.0]
    assert discounts((0, 1, 3), 1.0) == [1.0, 0.5, 0.25]
