"""Measuring a link: the sizes that adapt, against links whose speed is known, and what is made of the figures."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from simulate.config.hardware import Link
from simulate.launch.preflight import link_probe as probe
from simulate.launch.preflight.channel import BadFrameError, Channel, PeerError
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.link_figures import LinkFigures, measured_link, parse_link, rate_text, slow_links
from simulate.launch.preflight.link_probe import (
    FIRST_CHUNK_BYTES,
    MIN_CHUNKS,
    Limits,
    measure_latency_s,
    measure_rate,
    serve,
)
from tests.simulate.launch.preflight.nodes import SECRET, channel_pair, tcp_pair

PLANNED = Link(topology="star", up_bytes_per_s=100e6, down_bytes_per_s=80e6, latency_s=1e-3, source="datasheet")


class MadeLink:
    """A link by formula, with a clock of its own, that lets `burst_bytes` through at once."""

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0, burst_bytes: int = 0) -> None:
        self.bytes_per_s, self.latency_s, self.burst_left = bytes_per_s, latency_s, burst_bytes
        self.now_s, self.chunks = 0.0, list[int]()

    def send_chunk(self, channel: Channel, piece: memoryview, size: int, deadline: Deadline) -> float:
        free = min(size, self.burst_left)
        self.burst_left -= free
        seconds = (size - free) / self.bytes_per_s
        self.now_s += 2 * self.latency_s + seconds
        self.chunks.append(size)
        return seconds


def measure_made(link: MadeLink, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> probe.Rate:
    monkeypatch.setattr(probe, "_send_chunk", link.send_chunk)
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: link.now_s))
    with channel_pair() as (one, _):
        return measure_rate(one, limits, Deadline(5))


@pytest.mark.parametrize("bytes_per_s", [50e3, 1e6, 12e6, 118e6, 1.2e9, 20e9])
@pytest.mark.parametrize("latency_s", [0.0, 0.1])
def test_any_rate_is_found_in_about_a_second(
    bytes_per_s: float, latency_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, limits = MadeLink(bytes_per_s, latency_s), Limits()
    rate = measure_made(link, limits, monkeypatch)
    assert rate.bytes_per_s == pytest.approx(bytes_per_s)
    assert rate.sent_bytes == sum(link.chunks) <= limits.budget_bytes
    slowest_s = MIN_CHUNKS * (FIRST_CHUNK_BYTES / bytes_per_s + 2 * latency_s)
    assert link.now_s < max(2.5 * limits.aim_s, 1.1 * slowest_s)
    assert len(link.chunks) >= MIN_CHUNKS


def test_the_budget_bounds_a_fast_link(monkeypatch: pytest.MonkeyPatch) -> None:
    link = MadeLink(10e9)
    rate = measure_made(link, Limits(budget_bytes=10_000_000), monkeypatch)
    assert rate.sent_bytes <= 10_000_000
    assert max(link.chunks) <= 1_000_000


def test_a_burst_that_a_shaper_lets_through_is_not_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    link = MadeLink(100e3, burst_bytes=64 << 10)
    rate = measure_made(link, Limits(), monkeypatch)
    assert rate.bytes_per_s == pytest.approx(100e3)
    assert link.chunks[1] > link.chunks[2] == FIRST_CHUNK_BYTES  # grew on the burst, and shrank again
    assert link.now_s < 10


def relay(
    source: socket.socket, target: socket.socket, delay: Callable[[int], float], slack_s: float
) -> threading.Thread:
    """Pass bytes on in small pieces, after `delay(bytes)` seconds each; late wake-ups catch up within the slack."""

    def run() -> None:
        due_s = time.monotonic()
        try:
            while piece := source.recv(8192):
                due_s = max(due_s, time.monotonic() - slack_s) + delay(len(piece))
                time.sleep(max(0.0, due_s - time.monotonic()))
                target.sendall(piece)
        except OSError:
            pass

    thread = threading.Thread(target=run, name="relay")
    thread.start()
    return thread


def over_relay(delay: Callable[[int], float], slack_s: float, act: Callable[[Channel], float]) -> float:
    """Return what `act` measures on a channel that goes through relays with that delay, both ways."""
    keys = SECRET.derived("one", b""), SECRET.derived("other", b"")
    (near, near_relay), (far_relay, far) = tcp_pair(), tcp_pair()
    for sock in (near, near_relay, far_relay, far):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(5)
    one, other = Channel(near, 1, *keys), Channel(far, 0, *keys[::-1])
    threads = [relay(near_relay, far_relay, delay, slack_s), relay(far_relay, near_relay, delay, slack_s)]
    server = threading.Thread(target=serve, args=(other, Limits(), Deadline(10)))
    server.start()
    try:
        figure = act(one)
        one.send({"kind": "done"}, Deadline(1))
        server.join(5)
        assert not server.is_alive()
        return figure
    finally:
        for sock in (near, near_relay, far_relay, far):
            sock.close() if sock in (near, far) else _hang_up(sock)
        for thread in threads:
            thread.join(5)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


TRIES = 5
"""Measurements of which one must be right: other programs on the machine delay the relay, and never hasten it."""


def test_a_link_of_known_rate() -> None:
    found = (
        over_relay(
            lambda size: size / 4e6,
            0.01,
            lambda channel: measure_rate(channel, Limits(aim_s=0.3), Deadline(5)).bytes_per_s,
        )
        for _ in range(TRIES)
    )
    assert any(rate == pytest.approx(4e6, rel=0.15) for rate in found)


def test_a_link_of_known_latency() -> None:
    found = (
        over_relay(lambda size: 0.01, 0, lambda channel: measure_latency_s(channel, Limits(aim_s=0.1), Deadline(5)))
        for _ in range(TRIES)
    )
    assert any(0.01 <= latency_s < 0.015 for latency_s in found)


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "chunk", "bytes": 2**40},
        {"kind": "chunk", "bytes": 0},
        {"kind": "chunk", "bytes": "many"},
        {"kind": "shell"},
    ],
)
def test_a_measurement_beyond_the_limits_is_refused(message: dict[str, object]) -> None:
    with channel_pair() as (one, other):
        one.send(message, Deadline(1))
        with pytest.raises(BadFrameError):
            serve(other, Limits(), Deadline(1))


def test_an_answer_that_makes_no_sense_is_refused() -> None:
    for answer in ({"kind": "chunk", "seconds": -1.0}, {"kind": "chunk"}, {"kind": "done", "seconds": 1.0}):
        with channel_pair() as (one, other):
            other.send(answer, Deadline(1))
            with pytest.raises(BadFrameError):
                measure_rate(one, Limits(), Deadline(1))


def test_a_successor_that_goes_silent_ends_a_measurement_in_time() -> None:
    with channel_pair() as (one, _):
        begin = time.monotonic()
        with pytest.raises(PeerError):
            measure_latency_s(one, Limits(), Deadline(0.1))
        with pytest.raises(PeerError):
            measure_rate(one, Limits(), Deadline(0.1))
        assert time.monotonic() - begin < 1


def figures(sender: int, receiver: int, loaded: float, latency_s: float = 1e-3) -> LinkFigures:
    return LinkFigures(sender, receiver, latency_s, 2 * loaded, loaded, 1000)


def test_figures_survive_json() -> None:
    link = figures(0, 1, 5e6)
    assert parse_link(json.loads(json.dumps(link.to_json()))) == link
    assert set(link.to_json()) == {
        *("sender", "receiver", "latency_s", "bytes_per_s", "loaded_bytes_per_s", "sent_bytes")
    }


@pytest.mark.parametrize(
    "changed", [{"latency_s": float("nan")}, {"bytes_per_s": 0}, {"sender": None}, {"latency_s": "x"}]
)
def test_figures_are_checked_as_they_arrive(changed: dict[str, object]) -> None:
    with pytest.raises(BadFrameError):
        parse_link({**figures(0, 1, 5e6).to_json(), **changed})
    with pytest.raises(BadFrameError):
        parse_link(None)


def test_a_ring_is_as_fast_as_its_slowest_edge() -> None:
    links = [figures(0, 1, 9e6), figures(1, 2, 4e6, 2e-3), figures(2, 0, 7e6, 5e-3)]
    planned = PLANNED.model_copy(update={"node_bytes_per_s": 5e9, "node_latency_s": 1e-6})
    link = measured_link(links, planned)
    assert (link.up_bytes_per_s, link.down_bytes_per_s, link.latency_s) == (4e6, 4e6, 5e-3)
    assert (link.source, link.topology, link.node_bytes_per_s) == ("measured", "star", 5e9)
    assert "node 1 to node 2" in link.sources["up_bytes_per_s"]
    assert "node 2 to node 0" in link.sources["latency_s"]
    assert "not measured" in link.sources["node_bytes_per_s"]
    with pytest.raises(ValueError, match="no link"):
        measured_link([], planned)


def test_a_link_five_times_slower_than_planned_is_warned_about() -> None:
    assert slow_links([figures(0, 1, 16.1e6)], PLANNED) == []
    (line,) = slow_links([figures(0, 1, 8e6)], PLANNED)
    assert line == (
        "node 0 to node 1 carries 8 MB/s with all links busy, 10 times less than the 80 MB/s planned (datasheet); "
        "plan again with what this run measured, by lte plan --link-from RUN"
    )


def test_a_latency_five_times_longer_than_planned_is_warned_about() -> None:
    assert slow_links([figures(0, 1, 80e6, 4.9e-3)], PLANNED) == []
    (line,) = slow_links([figures(0, 1, 80e6, 20e-3)], PLANNED)
    assert "has a latency of 20 ms, planned were 1 ms" in line
    quick = PLANNED.model_copy(update={"latency_s": 10e-6})
    assert slow_links([figures(0, 1, 80e6, 0.5e-3)], quick) == []  # that may be this program's own


def test_rates_for_people() -> None:
    assert [rate_text(rate) for rate in (95e3, 2.4e6, 118e6, 3e9)] == ["95 kB/s", "2.4 MB/s", "118 MB/s", "3,000 MB/s"]
