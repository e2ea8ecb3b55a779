"""The choice of processes and threads of a simulation, in cases that were computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulate.planning.simulation_split import Split, Work, choose_split, split_of, step_s

SMALL = Work(devices=4, steps=1000, step_s=0.15, layer_flops=1e9, sent_bytes=1e6, messages=0.1)
"""A network of which a fifth is not shortened by threads: the square root of 4e7 / 1e9."""


def always(processes: int) -> bool:
    return True


def test_the_time_of_a_step_is_the_one_computed_by_hand() -> None:
    # One thread: 0.15 / (0.2 + 0.8 / 2) = 0.25 s. A process with two of four devices takes half of it.
    # Exchanges: 0.1 * 0.5 ms and 1e6 bytes at 1e9 bytes/s.
    assert step_s(SMALL, 2, Split(2, 1)) == pytest.approx(0.125 + 0.00005 + 0.001)
    assert step_s(SMALL, 2, Split(1, 2)) == 0.15
    # On four cores the step in one process is that of four threads: 0.15 / 0.4 = 0.375 s with one.
    assert step_s(SMALL, 4, Split(2, 2)) == pytest.approx(0.375 * 0.5 * 0.6 + 0.00105)
    assert step_s(SMALL, 4, Split(4, 1)) == pytest.approx(0.375 / 4 + 0.00105)


@pytest.mark.parametrize(
    ("changes", "cores", "processes"),
    [
        ({}, 2, 2),
        ({}, 4, 4),
        ({}, 3, 1),  # two processes leave a core idle, and three have one with two devices
        ({"devices": 3}, 2, 1),
        ({}, 1, 1),
        ({"devices": 1}, 2, 1),
        ({"steps": 251}, 2, 2),  # 251 * 0.02395 s = 6.01 s are saved
        ({"steps": 250}, 2, 1),  # 5.99 s: less than 6
        ({"layer_flops": 1.6e10}, 2, 1),  # 0.15 / 0.525 / 2 + 0.00105 = 0.1439 s: 4.1 % less
        ({"sent_bytes": 50e6}, 2, 1),  # 0.125 + 0.05 s
        ({"messages": 100}, 2, 1),  # 0.125 + 0.05 s
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
