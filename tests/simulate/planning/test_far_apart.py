"""Which runs are far apart, and what the plan says of a quorum."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.planning.candidate import Candidate
from simulate.planning.far_apart import can_have_quorum, majority, reasons
from simulate.planning.notes import quorum_notes
from simulate.planning.planner import evaluate

MIXED, HOME, ROOM = "mixed_gtx1080ti_rtx2060_rtx3090", "rtx3060_x4_home", "gtx1080ti_x8"


def run_of(profile: str, method: dict[str, Any] | None = None, **cluster: Any) -> Run:
    devices = load_profile(profile).count
    table = {"method": method or {"name": "lte"}, "cluster": {"profile": profile, "devices": devices, **cluster}}
    return build_run(table)


def notes_of(profile: str, **keys: Any) -> list[str]:
    candidate = evaluate(run_of(profile, **keys), load_profile(profile), 1_000_000)
    assert isinstance(candidate, Candidate)
    return list(quorum_notes(candidate))


@pytest.mark.parametrize(("devices", "quorum"), [(3, 2), (4, 3), (5, 3), (8, 5)])
def test_no_two_parts_have_a_majority(devices: int, quorum: int) -> None:
    assert majority(devices) == quorum and 2 * quorum > devices


def test_reasons_have_numbers() -> None:
    home, room = load_profile(HOME), load_profile(ROOM)
    assert list(reasons(home, home.devices(4), (1.0,) * 4)) == ["links have 20 ms of latency"]
    assert not list(reasons(room, room.devices(8), (1.0,) * 7 + (1.49,)))
    assert list(reasons(room, room.devices(2), (1.0, 1.5))) == ["a step takes the slowest 1.5x as long as the fastest"]
    leaving = [device.model_copy(update={"leave_per_hour": 0.02}) for device in room.devices(2)]
    assert list(reasons(room, leaving, (1.0, 1.0))) == ["2% of the devices leave within an hour"]


def test_the_plan_suggests_a_quorum_over_home_links_and_not_in_a_room() -> None:
    (note,) = notes_of(HOME)
    assert "links have 20 ms of latency: with cluster.quorum = 3 merges wait for a majority alone" in note
    assert notes_of(ROOM) == []
    assert notes_of(HOME, method={"name": "ddp"}) == []


def test_the_plan_says_what_a_quorum_changes() -> None:
    (note,) = notes_of(HOME, quorum=3)
    assert note.startswith("merges go on with 3 of 4 devices, and a round's steps end after ")


@pytest.mark.parametrize(
    ("method", "cluster", "can"),
    [
        ({"name": "lte"}, {}, True),
        ({"name": "lte", "reset": "none"}, {}, False),
        ({"name": "lte", "wire": "int8"}, {}, True),
        ({"name": "diloco"}, {"min_devices": 2}, False),
        ({"name": "diloco"}, {"devices": 2}, False),
        ({"name": "lte"}, {"class": [{"devices": 1}, {"devices": 3}]}, True),
    ],
)
def test_who_can_have_a_quorum(method: dict[str, Any], cluster: dict[str, Any], can: bool) -> None:
    assert can_have_quorum(run_of(HOME, method, **cluster)) is can
