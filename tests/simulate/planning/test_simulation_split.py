"""The choice of processes and threads of a simulation, in cases that were computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulate.planning.simulation_split import Split, Work, choose_split, split_of, step_s

SMALL = Work(devices=4, steps=1000, step_s=0.15, layer_flops=1.8e9, sent_bytes=1e6, messages=0.1)
"""A network whose step threads shorten by half: serial share 0.9e9 / 1.8e9."""


def always(processes: int) -> bool:
    return True


def test_the_time_of_a_step_is_the_one_computed_by_hand() -> None:
    # One thread: 0.15 / (0.5 + 0.5 / 2) = 0.2 s. A process with two of four devices: 0.06 + 0.94 / 2 = 0.53 of it.
    # Exchanges: 0.1 * 0.5 ms and 1e6 bytes at 1e9 bytes/s.
    assert step_s(SMALL, 2, Split(2, 1)) == pytest.approx(0.2 * 0.53 + 0.00005 + 0.001)
    assert step_s(SMALL, 2, Split(1, 2)) == 0.15
    # On four cores the step in one process is that of four threads: 0.15 / 0.625 = 0.24 s with one.
    assert step_s(SMALL, 4, Split(2, 2)) == pytest.approx(0.24 * 0.53 * 0.75 + 0.00105)
    assert step_s(SMALL, 4, Split(4, 1)) == pytest.approx(0.24 * 0.295 + 0.00105)


@pytest.mark.parametrize(
    ("changes", "cores", "processes"),
    [
        ({}, 2, 2),
        ({}, 4, 4),
        ({}, 3, 2),  # three processes have two devices at most, as two have
        ({}, 1, 1),
        ({"devices": 1}, 2, 1),
        ({"steps": 140}, 2, 2),  # 140 * 0.04295 s = 6.01 s are saved
        ({"steps": 139}, 2, 1),  # 5.97 s: less than 6
        ({"layer_flops": 9e9}, 2, 1),  # 0.15 / 0.55 * 0.53 + 0.00105 = 0.1456 s: 2.9 % less, and memory twice
        ({"sent_bytes": 50e6}, 2, 1),  # 0.106 + 0.05 s
        ({"messages": 100}, 2, 1),  # 0.106 + 0.05 s
    ],
)
def test_a_split_is_chosen_that_pays(changes: dict[str, float], cores: int, processes: int) -> None:
    assert choose_split(replace(SMALL, **changes), cores, always).processes == processes  # type: ignore[arg-type]


def test_processes_that_are_not_possible_leave_fewer() -> None:
    assert choose_split(SMALL, 4, lambda processes: processes < 4) == Split(2, 2)
    assert choose_split(SMALL, 4, lambda processes: False) == Split(1, 4)


def test_processes_share_the_cores() -> None:
    assert [split_of(processes, 8) for processes in (1, 2, 3, 8, 9)] == [
        Split(1, 8), Split(2, 4), Split(3, 2), Split(8, 1), Split(9, 1)
    ]  # fmt: skip
    assert str(Split(1, 2)) == "1 process of 2 threads"
    assert str(Split(2, 1)) == "2 processes of 1 thread"
