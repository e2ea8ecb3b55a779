"""Which runs are far apart, and what the plan says of a quorum."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.config.hardware import Device
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.planning.candidate import Candidate
from simulate.planning.explain import explain
from simulate.planning.far_apart import can_have_quorum, latency_s, majority, reasons
from simulate.planning.notes import quorum_notes
from simulate.planning.objective import SelectionCriteria
from simulate.planning.planner import Plan, evaluate, make_plan
from simulate.planning.search_space import Pins
from simulate.planning.verdict import verdict_of

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
        ({"name": "lte"}, {"quorum": 4}, False),
        ({"name": "lte"}, {"class": [{"devices": 1}, {"devices": 3}]}, True),
    ],
)
def test_who_can_have_a_quorum(method: dict[str, Any], cluster: dict[str, Any], can: bool) -> None:
    assert can_have_quorum(run_of(HOME, method, **cluster)) is can


def build(device: Device, **keys: Any) -> Device:
    return Device.model_validate({**device.model_dump(exclude_none=True), **keys})


def plan_of(profile: str, objective: str = "time", memory_bytes: int | None = None, **pins: Any) -> Plan:
    """Return a plan whose user left open who may be missing."""
    found, run = load_profile(profile), run_of(profile)
    if memory_bytes is not None:
        device = [build(one, memory_bytes=memory_bytes) for one in found.device]
        found = found.model_copy(update={"device": device})
    choice = SelectionCriteria(objective=objective, with_rivals=False)
    return make_plan(run, found, 1_000_000, Pins(**{"is_quorum_open": True, "method": "lte", **pins}), (), choice)


def quorum_of(plan: Plan) -> int | None:
    assert plan.chosen is not None
    return plan.chosen.run.cluster.quorum


def test_homes_get_a_majority_and_the_plan_says_so_with_numbers() -> None:
    plan = plan_of(HOME)
    rule = plan.quorum_rule
    assert quorum_of(plan) == 3 and plan.chosen is not None and plan.chosen.run.cluster.has_quorum and rule is not None
    said = plan.to_dict(1)["quorum_rule"]
    assert said["reasons"] == ["links have 20 ms of latency"] and said["limits"]["latency_s"] == 5e-3
    assert (rule.quorum, rule.devices, rule.step_ratio) == (3, 4, 1.0)
    # All four repeat a round that one leaves; with a quorum the one alone loses it.
    round_s = plan.chosen.time.round_s
    assert (said["loss_without_s"], said["loss_with_s"]) == (4 * round_s, round_s)
    (answer,) = [one for one in verdict_of(plan).answers if one.question == "Merges"]
    assert answer.answer == "3 of 4" and "--set cluster.quorum=4" in answer.because
    assert any(note.startswith("cluster.quorum = 3: links have 20 ms") for note in plan.notes)
    choices = {choice.key: choice for choice in explain(plan, plan.chosen).choices}
    assert choices["cluster.quorum"].value == "3" and "20 ms" in choices["cluster.quorum"].worth


def test_the_default_is_the_plan_that_its_key_asks_for() -> None:
    chosen, run = plan_of(HOME).chosen, run_of(HOME, quorum=3)
    choice = SelectionCriteria(with_rivals=False)
    asked = make_plan(run, load_profile(HOME), 1_000_000, Pins(method="lte"), (), choice)
    assert chosen is not None and asked.chosen is not None and asked.quorum_rule is None
    assert (chosen.run, chosen.memory, chosen.wall_s) == (asked.chosen.run, asked.chosen.memory, asked.chosen.wall_s)


@pytest.mark.parametrize(
    ("profile", "objective", "pins"),
    [
        (ROOM, "time", {}),
        (MIXED, "time", {}),  # batches of their own make steps alike
        ("jetson_orin_nano_x8_wifi", "time", {}),
        (HOME, "memory", {}),
        (HOME, "time", {"is_quorum_open": False}),
        (HOME, "time", {"method": "ddp"}),
    ],
)
def test_others_wait_for_all(profile: str, objective: str, pins: dict[str, Any]) -> None:
    plan = plan_of(profile, objective, **pins)
    assert quorum_of(plan) is None and plan.quorum_rule is None
    assert all(answer.question != "Merges" for answer in verdict_of(plan).answers)


def test_unequal_steps_get_a_majority_in_a_room_too() -> None:
    plan = plan_of(MIXED, micro_batch=1, accumulate=1)
    assert quorum_of(plan) == 2 and plan.quorum_rule is not None
    assert plan.quorum_rule.step_ratio >= 1.5
    assert plan.quorum_rule.reasons == (
        f"a step takes the slowest {plan.quorum_rule.step_ratio:.1f}x as long as the fastest",
    )


def test_other_hardware_gets_its_own_majority() -> None:
    plan = plan_of(HOME)
    assert plan.base.cluster.quorum is None and plan.chosen is not None
    doubled = next(change for change in explain(plan, plan.chosen).changes if change.what == "twice the devices")
    assert doubled.chosen is not None and doubled.chosen.run.cluster.quorum == 5


def test_a_quorum_that_does_not_fit_is_left_away() -> None:
    pins = {"micro_batch": 1, "accumulate": 1}

    def least_bytes(plan: Plan) -> int:
        return min(candidate.memory.total for candidate in plan.candidates)

    lockstep, majority_bytes = (
        least_bytes(plan_of(HOME, is_quorum_open=False, **pins)),
        least_bytes(plan_of(HOME, **pins)),
    )
    assert lockstep < majority_bytes
    headroom_share = 0.05
    plan = plan_of(HOME, memory_bytes=round((lockstep + majority_bytes) / 2 / (1 - headroom_share)), **pins)
    assert quorum_of(plan) is None and plan.quorum_rule is None


def test_the_slowest_line_says_how_far_apart_homes_are() -> None:
    friends = load_profile("friends_x4_home")
    assert latency_s(friends) == max(line.latency_s for line in friends.link.lines) == 20e-3
