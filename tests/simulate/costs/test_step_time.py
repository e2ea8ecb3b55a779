"""Seconds of messages on each kind of link, in numbers a person can work out."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.comm.transfers import Exchange, Operation, Transfer
from simulate.config.hardware import Link
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.message_schedule import schedule
from simulate.costs.message_time import link_of, transfer_s
from simulate.costs.state import persistent_state
from simulate.costs.step_time import exchange_s, round_time
from tests import tiny

MEGABYTE = 1_000_000


def link(topology: str, **figures: Any) -> Link:
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


SMALL, LARGE = 131_072, 4 * MEGABYTE
"""The largest part that gloo's devices send by pairs, and a part that goes round a ring."""


@pytest.mark.parametrize(
    ("operation", "payload_bytes", "devices", "topology", "seconds"),
    [
        # Large buffers go round the ring, whatever the topology: each hop is asked for, and so takes two delays.
        ("all_reduce", 4 * LARGE, 4, "star", 6 * (0.02 + 4.0)),
        ("all_reduce", 4 * LARGE, 4, "mesh", 6 * (0.02 + 4.0)),
        ("all_gather", LARGE, 4, "star", 3 * (0.02 + 4.0)),
        # Small parts go by pairs: two delays in all, and two swaps of a reduction four.
        ("all_reduce", 4 * SMALL, 4, "star", 2 * (0.02 + 3 * 0.131072)),
        ("all_reduce", 4 * SMALL + 4, 4, "star", 6 * (0.02 + 0.131073)),
        ("all_reduce", 8 * SMALL, 8, "star", 2 * (0.02 + 7 * 0.131072)),
        ("all_reduce", 4 * SMALL, 4, "mesh", 2 * (0.02 + 0.131072)),
        ("all_gather", SMALL, 4, "star", 0.02 + 3 * 0.131072),
        ("all_gather", SMALL + 1, 4, "star", 3 * (0.02 + 0.131073)),
        # Two devices gather by pairs, whatever the size; an all-to-all always goes so.
        ("all_gather", LARGE, 2, "star", 0.02 + 4.0),
        ("all_to_all", 4 * LARGE, 4, "star", 0.02 + 3 * 4.0),
        ("all_to_all", 4 * LARGE, 4, "mesh", 0.02 + 4.0),
        # On a ring of four the farthest part crosses three links, and a link carries 1 + 2 + 3 parts.
        ("all_to_all", 4 * LARGE, 4, "ring", 3 * 0.02 + 6 * 4.0),
        # A tree: of four the root sends two copies at once, its first child a third; and three, two, one of eight. All
        # have asked for it, so that a level takes one delay after the first one's two. Of three the root sends both.
        ("broadcast", MEGABYTE, 2, "star", 0.02 + 1.0),
        ("broadcast", MEGABYTE, 3, "star", 0.02 + 2.0),
        ("broadcast", MEGABYTE, 4, "star", 0.03 + 3.0),
        ("broadcast", MEGABYTE, 8, "star", 0.04 + 6.0),
        ("broadcast", MEGABYTE, 4, "mesh", 0.03 + 2.0),
        # What goes to a server and comes from it is asked for, too.
        ("push", MEGABYTE, 4, "star", 0.02 + 2.0),
        ("pull", MEGABYTE, 4, "star", 0.02 + 4.0),
    ],
)
def test_gloo_takes_what_the_launched_communicator_makes_of_it(
    operation: Operation, payload_bytes: int, devices: int, topology: str, seconds: float
) -> None:
    wires = link(topology, collectives="gloo")
    assert transfer_s(Transfer(operation, payload_bytes, devices), wires) == pytest.approx(seconds)


def test_a_broadcasts_copies_wait_for_the_root_or_for_the_slower_way_down() -> None:
    slow_down = link("star", collectives="gloo", up_bytes_per_s=2e6, down_bytes_per_s=0.5e6)
    # Two copies up take 1 s, one down 2 s; the third copy takes 2 s down.
    assert transfer_s(Transfer("broadcast", MEGABYTE, 4), slow_down) == pytest.approx(0.03 + 2.0 + 2.0)


def test_an_uplink_that_all_share_bounds_gloos_messages_too() -> None:
    shared = link("star", collectives="gloo", shared_bytes_per_s=1e6)
    together = 4 * 3 * 0.131072  # every device's three parts
    assert transfer_s(Transfer("all_gather", SMALL, 4), shared) == pytest.approx(0.02 + together)
    assert transfer_s(Transfer("all_gather", LARGE, 4), shared) == pytest.approx(3 * (0.02 + 4 * 4.0))
    # Seven copies, one after the other.
    assert transfer_s(Transfer("broadcast", MEGABYTE, 8), shared) == pytest.approx(0.04 + 7.0)


def test_a_hops_delays_can_be_given_and_a_run_says_what_carries_it() -> None:
    ring = Transfer("all_gather", LARGE, 4)
    assert transfer_s(ring, link("star", collectives="gloo", hop_delays=2.5)) == pytest.approx(3 * (0.025 + 4.0))
    assert transfer_s(ring, link("star", hop_delays=1.5)) == pytest.approx(3 * (0.015 + 4.0))
    by_profile = link("star", collectives="gloo")
    assert link_of(by_profile, "auto") is link_of(by_profile, "gloo") is by_profile
    assert transfer_s(ring, link_of(by_profile, "nccl")) == pytest.approx(3 * (0.01 + 4.0))
    run, profile = tiny.lte_run(devices=2), load_profile("raspberry_x8")
    asked = run.model_copy(update={"cluster": run.cluster.model_copy(update={"backend": "nccl"})})
    gloo, nccl = (round_time(r, r.model.shape(), profile.devices(2), profile.link).exchange_s for r in (run, asked))
    assert nccl < gloo


def test_nodes_own_links_carry_gloos_messages_between_their_devices() -> None:
    wires = link("star", collectives="gloo", node_bytes_per_s=4e6, node_latency_s=0.001)
    assert transfer_s(Transfer("all_reduce", 4 * LARGE, 4, teams=2), wires) == pytest.approx(6 * (0.002 + 1.0))


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


def split(run: Run, micro_batch: int, accumulate: int) -> Run:
    """Return the run with its batch in so many passes."""
    train = {"micro_batch": micro_batch, "accumulate": accumulate}
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


@pytest.mark.parametrize("run", [tiny.ddp_run(), tiny.lte_run(merge_every=4)], ids=["ddp", "lte"])
def test_passes_share_one_optimizer_step_and_one_exchange(run: Run) -> None:
    """Beside the whole batch's step there are two sums of gradients, of three elements moved for each trained one."""
    profile, shape = load_profile("gtx1080ti_x8"), run.model.shape()
    parts, whole = (
        round_time(split(run, *batch), shape, profile.devices(2), profile.link) for batch in ((2, 3), (6, 1))
    )
    trained = persistent_state(run, shape).trained
    summed_s = 2 * 3 * trained * 8 / profile.device[0].memory_bytes_per_s
    assert parts.compute_s == pytest.approx(whole.compute_s + summed_s, rel=1e-9)
    assert (parts.exchange_s, parts.merge_s) == (whole.exchange_s, whole.merge_s)


def test_every_pass_unpacks_and_casts_the_weights_again() -> None:
    profile = load_profile("gtx1080ti_x8")
    run = tiny.lte_run(train={"dtype": "fp32", "autocast": "fp16"}, quantize="int8", reset="b", frozen_a=True)
    shape = run.model.shape()
    one, two, three = (
        round_time(split(run, 2, passes), shape, profile.devices(2), profile.link).compute_s for passes in (1, 2, 3)
    )
    summed_s = 3 * persistent_state(run, shape).trained * 4 / profile.device[0].memory_bytes_per_s
    assert three - two == pytest.approx(two - one)
    weights = shape.adapted_parameters
    # Each pass reads int8 with its scales twice, writes and reads fp32 twice, and casts fp32 to fp16 twice.
    assert two - one - summed_s > weights * (2 * (1 + 4 + 4) + 2 * (4 + 2)) / profile.device[0].memory_bytes_per_s
