"""The event simulation against the closed form where that is exact, and against the simulated clock elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from simulate.comm.transfers import Transfer
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.hardware import Device, FlopPerSecond, Link
from simulate.config.lines import DeviceLine
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.message_schedule import num_rounds
from simulate.costs.step_time import device_step_s, round_time
from simulate.methods.registry import build_method
from simulate.rules.churn import away_share, redo_factor
from simulate.timeline.engine import Timeline, simulate
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny

UNLIKE_THE_CLOSED_FORM = ("daso", "nodes, late", "sapipe", "paced")
"""Delayed exchanges between nodes share the link with those inside, SAPipe's last is for nobody, given steps differ."""
EQUAL = [name for name in tiny.VARIANTS if not any(word in name for word in UNLIKE_THE_CLOSED_FORM)]
DEVICE = load_profile("raspberry_x8").device[0]


def link(topology: str = "star", rate: float = 1e6, latency_s: float = 1e-3, **figures: Any) -> Link:
    rates = {"up_bytes_per_s": rate, "down_bytes_per_s": 3 * rate, "latency_s": latency_s, "source": "guess"}
    return Link.model_validate({"topology": topology, **rates, **figures})


def planned_s(run: Run, devices: tuple[Device, ...], wires: Link) -> float:
    time = round_time(run, run.model.shape(), devices, wires)
    return run.train.steps * time.compute_s + num_rounds(run) * (time.merge_s + time.exchange_s)


def assert_adds_up(timeline: Timeline) -> None:
    assert sum(timeline.seconds.values()) == pytest.approx(timeline.wall_s, rel=1e-9)


@pytest.mark.parametrize("name", [*EQUAL, "daso, waiting"])
@pytest.mark.parametrize("topology", ["star", "ring", "mesh"])
def test_equal_devices_take_what_the_closed_form_says(name: str, topology: str) -> None:
    run, devices = tiny.variant_run(name, train={"steps": 20}), (DEVICE,) * 4
    for wires in (
        link(topology, 1e4),
        link(topology, 1e9, 1e-6),
        link(topology, 1e5, shared_bytes_per_s=1.1e5, hop_delays=2.5, server_up_bytes_per_s=2e5),
        link(topology, 1e5, collectives="gloo"),
        link(topology, 1e5, collectives="gloo", shared_bytes_per_s=1.1e5, hop_delays=2.5),
    ):
        timeline = simulate(run, devices, wires)
        assert timeline.wall_s == pytest.approx(planned_s(run, devices, wires), rel=1e-12)
        assert timeline.device_steps == 4 * 20
        assert_adds_up(timeline)


# Of unlike lines the slowest has the longest delay, too, where the closed form of a push is exact.
UNLIKE = (
    DeviceLine(1e4, 5e4, 0.03), DeviceLine(9e4, 9e4, 1e-3, 0, 3e4, 6e4, 0.02),
    DeviceLine(9e4, 9e4, 1e-3, 0, 3e4, 6e4, 0.02), DeviceLine(1e6, 1e6, 0.0),
)  # fmt: skip


@pytest.mark.parametrize("name", [*EQUAL, "daso, waiting"])
@pytest.mark.parametrize("collectives", ["nccl", "gloo"])
def test_devices_with_lines_of_their_own_take_what_the_closed_form_says(name: str, collectives: str) -> None:
    run, devices = tiny.variant_run(name, train={"steps": 20}), (DEVICE,) * 4
    for rented in ({}, {"server_up_bytes_per_s": 3e4, "server_down_bytes_per_s": 3e4}):
        wires = link(collectives=collectives, **rented).with_lines(UNLIKE)
        timeline = simulate(run, devices, wires)
        assert timeline.wall_s == pytest.approx(planned_s(run, devices, wires), rel=1e-9)
        assert_adds_up(timeline)


@pytest.mark.parametrize("name", [n for n in EQUAL if "late" in n and "streaming" not in n])
def test_a_last_round_that_is_shorter_hides_less(name: str) -> None:
    run, devices = tiny.variant_run(name, train={"steps": 11}), (DEVICE,) * 4
    assert simulate(run, devices, link()).wall_s == pytest.approx(planned_s(run, devices, link()), rel=1e-12)


@pytest.mark.parametrize("name", [n for n in tiny.VARIANTS if "paced" in n and "served" not in n])
def test_given_steps_take_what_the_closed_form_says_in_whole_cycles(name: str) -> None:
    run, devices = tiny.variant_run(name, train={"steps": 24}), (DEVICE,) * 4
    timeline = simulate(run, devices, link())
    assert timeline.wall_s == pytest.approx(planned_s(run, devices, link()), rel=1e-12)
    assert timeline.device_steps == 3 * sum(map(sum, tiny.UNEQUAL))


def test_a_deadline_of_unequal_devices_is_the_closed_forms() -> None:
    run = tiny._run(3, None, {"steps": 12}, {"name": "diloco", "merge_every": 4, "pace": "deadline"})
    devices = load_profile("mixed_gtx1080ti_rtx2060_rtx3090").devices(3)
    planned = planned_s(run, devices, link())
    # The plan adds the slowest merge arithmetic to the slowest steps, which may be two devices.
    assert 0.999 * planned < simulate(run, devices, link()).wall_s <= planned


@pytest.mark.parametrize("name", ["daso", "sapipe", "sapipe, none", "diloco, late", "lte, late, served"])
def test_the_simulated_clock_charges_real_messages_alike(name: str) -> None:
    run, devices = tiny.variant_run(name, train={"steps": 20}), (DEVICE,) * 4
    plain = [link(rate=rate) for rate in (1e4, 3e6, 1e9)]
    links = [*plain, *(wires.with_lines(UNLIKE) for wires in plain)]
    for wires, charged in zip(links, charged_s(run, devices, links), strict=True):
        assert simulate(run, devices, wires).wall_s == pytest.approx(charged, rel=1e-9)


def charged_s(run: Run, devices: tuple[Device, ...], links: Sequence[Link]) -> list[float]:
    """Train once, and return the seconds that simulated clocks were charged, one for each link."""
    clocks = [SimulatedClock(run, devices, wires) for wires in links]

    def charge_all(transfer: Transfer, background: bool) -> None:
        for clock in clocks:
            clock.charge_transfer(transfer, background)

    def all_wait() -> None:
        for clock in clocks:
            clock.wait()

    method = build_method(run, VirtualCommunicator(4, charge_all, all_wait), tiny.CPU)
    data = tiny.batches(run)
    for step in range(20):
        for clock in clocks:
            clock.charge_step()
        method.step(*data.batch(step, range(4)), step)
        if method.merge_due(step):
            method.merge(step)
            for clock in clocks:
                clock.charge_merge()
    return [clock.now_s for clock in clocks]


def test_fast_devices_wait_for_the_slowest() -> None:
    run, devices = (
        tiny.variant_run("diloco", 3, train={"steps": 8}),
        load_profile("mixed_gtx1080ti_rtx2060_rtx3090").devices(3),
    )
    step_s = device_step_s(run, run.model.shape(), devices)
    timeline = simulate(run, devices, link(), drawn=range(3), drawn_rounds=1)
    waits = {span.device: span.end_s - span.start_s for span in timeline.spans if span.kind == "wait"}
    first = {d: next(s for s in timeline.spans if s.device == d and s.kind == "compute") for d in range(3)}
    assert [first[d].end_s for d in range(3)] == pytest.approx([4 * s for s in step_s])
    slowest = step_s.index(max(step_s))
    assert {d for d in waits if waits[d] > 1e-9} >= set(range(3)) - {slowest}
    assert_adds_up(timeline)


def test_who_pushes_early_has_the_servers_link_to_itself() -> None:
    run = tiny._run(3, None, {"steps": 4}, {"name": "local-sgd", "merge_every": 4, "merge_transport": "server"})
    devices = load_profile("mixed_gtx1080ti_rtx2060_rtx3090").devices(3)
    narrow = link(rate=1e9, server_down_bytes_per_s=1e9)
    wall_s = simulate(run, devices, narrow).wall_s
    assert 4 * max(device_step_s(run, run.model.shape(), devices)) < wall_s < planned_s(run, devices, narrow)


def test_jitter_makes_rounds_longer_and_is_the_same_every_time() -> None:
    run, jittery = tiny.variant_run("ddp", 16), DEVICE.model_copy(update={"step_jitter": 0.3})
    first, again = (simulate(run, (jittery,) * 16, link(rate=1e9, latency_s=0)) for _ in range(2))
    calm = simulate(run, (DEVICE,) * 16, link(rate=1e9, latency_s=0))
    assert first == again
    # The mean of the slowest of 16 is about 1.77 standard deviations above a normal mean, more above a gamma's.
    assert 0.4 < (first.wall_s - calm.wall_s) / calm.seconds["compute"] < 0.8
    assert first.seconds["compute"] == pytest.approx(calm.seconds["compute"], rel=0.05)
    assert_adds_up(first)


def test_many_steps_to_a_merge_even_jitter_out() -> None:
    def slowdown(every: int) -> float:
        run = tiny._run(16, None, {"steps": 100}, {"name": "diloco", "merge_every": every})
        devices = [(d,) * 16 for d in (DEVICE, DEVICE.model_copy(update={"step_jitter": 0.3}))]
        calm, jittery = (simulate(run, d, link(rate=1e9, latency_s=0)).wall_s for d in devices)
        return jittery / calm

    assert slowdown(50) < slowdown(5) < slowdown(1)


def test_a_device_that_leaves_is_missed_for_as_many_rounds_as_expected() -> None:
    run = tiny._run(200, None, {"steps": 800}, {"name": "diloco", "merge_every": 4})
    slow = DEVICE.model_copy(update={"flop_per_s": FlopPerSecond(fp32=1e4)})
    calm = simulate(run, (slow,) * 200, link())
    figures = {"leave_per_hour": 1 - 0.95 ** (3600 / calm.round_s), "join_s": 1.5 * calm.round_s}
    moving = slow.model_copy(update=figures)
    timeline = simulate(run, (moving,) * 200, link())
    missed = 1 - timeline.device_steps / (200 * 800)
    assert timeline.leaves > 500
    assert missed == pytest.approx(away_share(moving.leave_per_hour, moving.join_s, calm.round_s), rel=0.1)
    assert_adds_up(timeline)


def test_the_last_device_stays() -> None:
    leaving = DEVICE.model_copy(update={"leave_per_hour": 1.0, "join_s": 1e6})
    timeline = simulate(tiny.variant_run("diloco", 4), (leaving,) * 4, link())
    assert timeline.device_steps == 20  # device 0 alone
    assert timeline.leaves == 3


def test_repeating_every_round_in_which_somebody_leaves_may_never_end() -> None:
    assert redo_factor(0.0, 60, 600, 4) == 1
    # One device, 50 % an hour, rounds of an hour: one attempt in vain on average, of half a round and the joining.
    assert redo_factor(0.5, 360, 3600, 1) == pytest.approx(1 + 0.5 + 0.1)
    assert redo_factor(0.9, 60, 3600, 10_000) == float("inf")


def test_rounds_may_be_cut_short() -> None:
    run = tiny.variant_run("diloco", train={"steps": 400})
    assert simulate(run, (DEVICE,) * 4, link(), rounds=3).steps == 12
