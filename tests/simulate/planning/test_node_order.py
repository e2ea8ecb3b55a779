"""The order of nodes whose lines differ: never slower than the profile's own, and as a person would place them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate.config.hardware import Profile
from simulate.config.lines import Line, Place
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.step_time import round_time
from simulate.planning.node_order import better_order, likely_order, reordered
from simulate.planning.planner import make_plan
from simulate.planning.search_space import Pins

FRIENDS = load_profile("friends_x4_home")
SLOW, FAST = (Line(up_bytes_per_s=up, down_bytes_per_s=4 * up, latency_s=0.02) for up in (1e6, 1e8))


def run_of(transport: str, devices: int = 4) -> Run:
    method = {"name": "lte", "rank": 8, "merge_every": 4, "merge_transport": transport}
    return build_run({"model": {"name": "gpt"}, "method": method, "cluster": {"devices": devices}})


def profile_of(*places: int | Line) -> Profile:
    """Return a profile of devices at numbered places of slow lines, or with lines of their own."""
    device = FRIENDS.device[0].model_copy(update={"link": None, "name": None})
    numbers = sorted({place for place in places if isinstance(place, int)})
    devices = [
        device.model_copy(update={"place": f"p{x}"} if isinstance(x, int) else {"link": x}) for x in places
    ]  # fmt: skip
    link = FRIENDS.link.model_copy(update={"up_bytes_per_s": 1e8, "down_bytes_per_s": 1e8, "latency_s": 1e-4})
    return Profile(device=devices, link=link, place=[Place(name=f"p{n}", link=SLOW) for n in numbers])


def exchange_s(run: Run, profile: Profile) -> float:
    return round_time(run, run.shape(), profile.devices(run.cluster.devices), profile.link).exchange_s


def test_devices_of_one_place_stand_beside_each_other() -> None:
    run, profile = run_of("gather"), profile_of(0, 1, 0, 1)
    order = better_order(run, profile)
    assert order is not None and order.order in ((0, 2, 1, 3), (1, 3, 0, 2))
    # One message crosses each line in the place of two, and delays stay.
    assert order.exchange_s == pytest.approx(order.listed_s / 2, rel=0.2)
    assert order.exchange_s == exchange_s(run, order.profile)


def test_the_fastest_line_serves() -> None:
    run, profile = run_of("server"), profile_of(SLOW, SLOW, FAST, SLOW)
    order = better_order(run, profile)
    assert order is not None and order.order[0] == 2
    assert likely_order(run, profile).device[0].link == FAST


def test_lines_that_are_alike_keep_their_order() -> None:
    assert better_order(run_of("server"), profile_of(SLOW, SLOW, SLOW, SLOW)) is None
    assert better_order(run_of("gather"), load_profile("rtx3060_x4_home")) is None
    # A place that has all of the devices moves nobody.
    assert likely_order(run_of("gather"), profile_of(0, 0, 0, 0)).device[0].place == "p0"


def test_devices_with_shards_of_their_own_stay_where_they_are() -> None:
    run = run_of("server")
    fixed = run.model_copy(update={"data": run.data.model_copy(update={"shards": (1.0, 2.0, 3.0, 4.0)})})
    assert better_order(fixed, profile_of(SLOW, SLOW, FAST, SLOW)) is None


@given(
    st.sampled_from(("gather", "reduce", "server")),
    st.lists(
        st.one_of(
            st.integers(0, 2),
            st.builds(
                Line,
                up_bytes_per_s=st.floats(1e5, 1e9),
                down_bytes_per_s=st.floats(1e5, 1e9),
                latency_s=st.floats(0, 0.5),
            ),
        ),
        min_size=2,
        max_size=8,
    ),
)
@settings(max_examples=25, deadline=None)
def test_another_order_is_never_slower(transport: str, places: list[int | Line]) -> None:
    run, profile = run_of(transport, len(places)), profile_of(*places)
    order = better_order(run, profile)
    if order is None:
        return
    assert sorted(order.order) == list(range(len(places)))
    assert exchange_s(run, order.profile) < exchange_s(run, profile)
    # Nobody is lost: every device keeps its line.
    assert [order.profile.link.lines[i].outer_rates for i in range(len(places))] == [
        profile.link.lines[i].outer_rates for i in order.order
    ]


def test_equal_neighbours_become_one_entry_again() -> None:
    profile = profile_of(0, 1, 0, 1)
    assert [(d.place, d.count) for d in reordered(profile, (0, 2, 1, 3)).device] == [("p0", 2), ("p1", 2)]


def test_a_plan_says_what_its_order_gains_and_is_for_it() -> None:
    run = run_of("server")
    keys = frozenset({"merge_transport"})
    plan = make_plan(run, profile_of(SLOW, SLOW, FAST, SLOW), 10**6, Pins(method="lte", keys=keys, micro_batch=8))
    assert plan.node_order is not None and plan.profile == plan.node_order.profile
    assert plan.notes[-1].startswith("nodes are planned in the order node 0 device 2 (NVIDIA GeForce RTX 3060 12 GB)")
    assert plan.to_dict()["node_order"]["devices"][0] == 2
    assert plan.chosen is not None and plan.chosen.time.exchange_s == plan.node_order.exchange_s
