"""Messages between devices whose lines differ: in numbers a person can work out, and against links that are alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate.comm.transfers import Operation, Transfer
from simulate.config.hardware import Link
from simulate.config.lines import DeviceLine
from simulate.costs.message_time import transfer_s
from tests.reference.hops import ring_ends

MB = 1_000_000


def link(lines: list[DeviceLine], **figures: Any) -> Link:
    """Return a star of 1 MB/s up, 2 MB/s down and 10 ms whose devices have lines of their own."""
    rates = {"up_bytes_per_s": 1e6, "down_bytes_per_s": 2e6, "latency_s": 0.01, **figures}
    return Link.model_validate({"topology": "star", "source": "guess", **rates}).with_lines(tuple(lines))


def line(up: float, down: float, latency_s: float = 0.0) -> DeviceLine:
    return DeviceLine(up * MB, down * MB, latency_s)


def at(place: int, up: float, down: float, latency_s: float = 0.0) -> DeviceLine:
    """Return the line of a device of a place: 100 MB/s to its neighbours, and so many MB/s for all of them outside."""
    return DeviceLine(100 * MB, 100 * MB, 0.0, place, up * MB, down * MB, latency_s)


def test_a_ring_is_paced_by_its_slowest_edge() -> None:
    # Edges 0-1, 1-2, 2-0: min(up, down) is min(1, 3), min(4, 5), min(5, 2); delays are means. Two hops of 6 MB over
    # the first edge take 2 x (0.03 + 6) s.
    wires = link([line(1, 2, 0.02), line(4, 3, 0.04), line(5, 5, 0.0)])
    assert transfer_s(Transfer("all_gather", 6 * MB, 3), wires) == pytest.approx(2 * (0.03 + 6.0))
    # In gloo's ring each hop waits for a request, too; an all-reduce of 18 MB is 4 hops of 6 MB.
    gloo = link([line(1, 2, 0.02), line(4, 3, 0.04), line(5, 5, 0.0)], collectives="gloo")
    assert transfer_s(Transfer("all_reduce", 18 * MB, 3), gloo) == pytest.approx(4 * (2 * 0.03 + 6.0))


def test_the_slow_hop_of_a_ring_holds_all_others_up() -> None:
    # The twin follows each hop of each device: edge i is the one to device i.
    hop_s = [3 / 2, 3 / 1, 3 / 4]
    wires = link([line(1, 2), line(4, 3), line(5, 5)])
    assert transfer_s(Transfer("all_gather", 3 * MB, 3), wires) == pytest.approx(max(ring_ends([0.0] * 3, 2, hop_s)))


def test_the_edges_that_leave_a_place_share_its_line() -> None:
    message = Transfer("all_gather", 6 * MB, 4)
    # A B A B: both of A's devices send out, at half of 1 MB/s each: three hops of 12 s. A A B B: one of them does.
    assert transfer_s(message, link([at(0, 1, 4), at(1, 2, 4)] * 2)) == pytest.approx(3 * 12.0)
    assert transfer_s(message, link([at(0, 1, 4)] * 2 + [at(1, 2, 4)] * 2)) == pytest.approx(3 * 6.0)
    # All at one place: nothing leaves it.
    assert transfer_s(message, link([at(0, 1, 4)] * 4)) == pytest.approx(3 * 0.06)


def test_messages_between_all_pairs_wait_for_the_slowest_line() -> None:
    # 4 devices: 3 parts of 0.1 MB leave over 1 MB/s up; the longest delay is that of the lines of 20 and 40 ms.
    wires = link([line(1, 9, 0.02), line(9, 9, 0.04), line(9, 9, 0.0), line(9, 9, 0.0)], collectives="gloo")
    slow = 2 * 0.03 + 0.3
    assert transfer_s(Transfer("all_gather", MB // 10, 4), wires) == pytest.approx(slow)
    # Two and two at places of 1 MB/s: of six parts that both send, four leave, in 0.4 s.
    pairs = link([at(0, 1, 9), at(0, 1, 9), at(1, 9, 9), at(1, 9, 9)], collectives="gloo")
    assert transfer_s(Transfer("all_gather", MB // 10, 4), pairs) == pytest.approx(0.4)


def test_a_server_waits_for_each_devices_own_line_and_for_its_own() -> None:
    lines = [line(1, 2, 0.02), line(4, 3, 0.04), line(5, 5, 0.0)]
    rented = link(lines, server_up_bytes_per_s=100e6, server_down_bytes_per_s=100e6)
    # 4 MB take device 0 4 s, device 1 1 s; pulled, they take 2 s and 4/3 s.
    assert transfer_s(Transfer("push", 4 * MB, 3), rented) == pytest.approx(0.02 + 4.0)
    assert transfer_s(Transfer("pull", 4 * MB, 3), rented) == pytest.approx(0.02 + 2.0)
    # A slow server: 12 MB at 2 MB/s are 6 s for all, and the longest delay comes on top.
    slow = link(lines, server_up_bytes_per_s=2e6, server_down_bytes_per_s=2e6)
    assert transfer_s(Transfer("push", 4 * MB, 3), slow) == pytest.approx(0.04 + 6.0)


def test_without_a_rented_server_device_0_serves_over_its_own_line() -> None:
    slow_first = link([line(1, 2), line(4, 3), line(5, 5)])
    # 12 MB come in at 2 MB/s, 12 MB go out at 1 MB/s.
    assert transfer_s(Transfer("push", 4 * MB, 3), slow_first) == pytest.approx(6.0)
    assert transfer_s(Transfer("pull", 4 * MB, 3), slow_first) == pytest.approx(12.0)
    # Who pushes to the own place does not cross its line: 4 MB of one device elsewhere come in at 4 MB/s.
    together = link([at(0, 1, 4), at(0, 1, 4), line(50, 50)])
    assert transfer_s(Transfer("push", 4 * MB, 3), together) == pytest.approx(1.0)


def test_a_copy_goes_down_the_tree_over_each_ones_line() -> None:
    # Device 0 sends 1 MB to 1 and 2 at once over 4 MB/s up: 0.5 s; device 2 takes it in at 1 MB/s; 1 sends on to 3.
    gloo = link([line(4, 4), line(2, 4), line(9, 1), line(9, 9)], collectives="gloo")
    assert transfer_s(Transfer("broadcast", MB, 4), gloo) == pytest.approx(1.0)
    assert transfer_s(Transfer("broadcast", MB, 4), link([line(4, 4)] * 3 + [line(1, 1)])) == pytest.approx(2 * 1.0)


OPERATIONS: tuple[Operation, ...] = ("all_reduce", "all_gather", "all_to_all", "broadcast", "push", "pull")
RATE = st.floats(1e3, 1e9)


@given(
    st.sampled_from(OPERATIONS), st.integers(1, 10**8), st.integers(2, 9), RATE, RATE, st.floats(0, 1),
    st.sampled_from(("nccl", "gloo")), st.sampled_from((None, 5e5)),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_equal_lines_are_a_link_to_the_last_bit(
    operation: Operation,
    payload: int,
    devices: int,
    up: float,
    down: float,
    delay: float,
    by: str,
    shared: float | None,
) -> None:
    figures = {"up_bytes_per_s": up, "down_bytes_per_s": down, "latency_s": delay, "collectives": by}
    plain = link([], **figures, **({} if shared is None else {"shared_bytes_per_s": shared}))
    lines = tuple([DeviceLine(up, down, delay)] * devices)
    transfer = Transfer(operation, payload, devices)
    assert transfer_s(transfer, plain.with_lines(lines)) == transfer_s(transfer, plain)
    # A place that one device has to itself is a line, however fast its room.
    alone = tuple(DeviceLine(1e12, 1e12, 0.0, place, up, down, delay) for place in range(devices))
    rented = {"server_up_bytes_per_s": up, "server_down_bytes_per_s": down}
    served = plain.model_copy(update=rented)
    assert transfer_s(transfer, served.with_lines(alone)) == transfer_s(transfer, served)


@given(st.sampled_from(OPERATIONS), st.lists(st.tuples(RATE, RATE, st.floats(0, 1)), min_size=2, max_size=7))
def test_a_faster_line_never_makes_a_message_slower(
    operation: Operation, figures: list[tuple[float, float, float]]
) -> None:
    lines = [DeviceLine(*one) for one in figures]
    faster = [lines[0].times(2, 2, 0.5), *lines[1:]]
    message = Transfer(operation, MB, len(lines))
    assert transfer_s(message, link(faster)) <= transfer_s(message, link(lines))
