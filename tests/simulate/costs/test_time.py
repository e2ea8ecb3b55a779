"""Seconds of messages on each kind of link, in numbers a person can work out."""

from __future__ import annotations

import pytest

from simulate.config import Run
from simulate.costs.schedule import schedule
from simulate.costs.time import exchange_s, round_time, transfer_s
from simulate.costs.traffic import Exchange, Operation, Transfer
from simulate.hardware import Link, load_profile
from tests import tiny

MEGABYTE = 1_000_000


def link(topology: str, **figures: float) -> Link:
    """Return a link of 1 MB/s up, 2 MB/s down and 10 ms."""
    rates = {"up_bytes_per_s": 1e6, "down_bytes_per_s": 2e6, "latency_s": 0.01, **figures}
    return Link.model_validate({"topology": topology, "source": "guess", **rates})


@pytest.mark.parametrize(
    ("operation", "payload_bytes", "topology", "seconds"),
    [
        # Four devices. All-reduce: 2 x 3 hops of a quarter at the slower of the two rates; on a mesh 2 hops.
        ("all_reduce", 4 * MEGABYTE, "star", 6 * (0.01 + 1.0)),
        ("all_reduce", 4 * MEGABYTE, "ring", 6 * (0.01 + 1.0)),
        ("all_reduce", 4 * MEGABYTE, "mesh", 2 * (0.01 + 1.0)),
        # All-gather: 3 hops of one contribution; on a mesh 1.
        ("all_gather", MEGABYTE, "star", 3 * (0.01 + 1.0)),
        ("all_gather", MEGABYTE, "ring", 3 * (0.01 + 1.0)),
        ("all_gather", MEGABYTE, "mesh", 0.01 + 1.0),
        # Push: a device needs 1 s; the server takes in four contributions at 2 MB/s a link.
        ("push", MEGABYTE, "star", 0.01 + 2.0),
        ("push", MEGABYTE, "ring", 2 * 0.01 + 1.0),
        ("push", MEGABYTE, "mesh", 0.01 + 1.0),
        # Pull: a device needs 0.5 s; the server gives out four at 1 MB/s a link.
        ("pull", MEGABYTE, "star", 0.01 + 4.0),
        ("pull", MEGABYTE, "ring", 2 * 0.01 + 2.0),
        ("pull", MEGABYTE, "mesh", 0.01 + 1.0),
    ],
)
def test_a_message_takes_what_its_links_allow(
    operation: Operation, payload_bytes: int, topology: str, seconds: float
) -> None:
    assert transfer_s(Transfer(operation, payload_bytes, 4), link(topology)) == pytest.approx(seconds)


def test_a_fast_server_leaves_the_devices_own_links_as_the_limit() -> None:
    fast = link("star", server_up_bytes_per_s=100e6, server_down_bytes_per_s=100e6)
    assert transfer_s(Transfer("push", MEGABYTE, 4), fast) == pytest.approx(0.01 + 1.0)
    assert transfer_s(Transfer("pull", MEGABYTE, 4), fast) == pytest.approx(0.01 + 0.5)


def test_a_slow_server_is_the_limit() -> None:
    slow = link("star", server_up_bytes_per_s=8e6, server_down_bytes_per_s=0.5e6)
    assert transfer_s(Transfer("push", MEGABYTE, 4), slow) == pytest.approx(0.01 + 8.0)
    assert transfer_s(Transfer("pull", MEGABYTE, 4), slow) == pytest.approx(0.01 + 0.5)


def merge_of(run: Run) -> Exchange:
    (merge,) = schedule(run, run.model.shape())
    return merge.exchange


def test_a_round_waits_for_its_messages_one_after_the_other() -> None:
    run = tiny.lte_run(devices=3)
    exchange = merge_of(run)
    star = link("star")
    assert exchange_s(exchange, star) == pytest.approx(sum(transfer_s(t, star) for t in exchange.transfers))


def test_links_that_differ_in_the_server_alone_are_told_apart() -> None:
    run = tiny.lte_run(devices=3, merge_transport="server")
    exchange = merge_of(run)
    slow = link("star", server_up_bytes_per_s=1e3, server_down_bytes_per_s=1e3)
    assert exchange_s(exchange, slow) > exchange_s(exchange, link("star"))


def test_everybody_waits_for_the_slowest_device() -> None:
    profile, run = load_profile("mixed_gtx1080ti_rtx2060_rtx3090"), tiny.lte_run(devices=3)
    shape = run.model.shape()
    alone = [round_time(run, shape, (device,), profile.link) for device in profile.device]
    together = round_time(run, shape, profile.devices(3), profile.link)
    assert together.compute_s == max(time.compute_s for time in alone)
    assert together.merge_s == max(time.merge_s for time in alone)
    assert together.round_s == together.steps * together.compute_s + together.merge_s + together.exchange_s


def test_one_device_exchanges_nothing() -> None:
    run = tiny.lte_run(devices=1)
    assert schedule(run, run.model.shape()) == ()
    assert round_time(run, run.model.shape(), load_profile("gtx1080ti_x8").devices(1), link("star")).exchange_s == 0
