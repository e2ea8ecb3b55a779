"""Measurement of one connection's latency and rate: small echoes, and chunks whose size adapts to the link's rate.

The receiver times each chunk, from its announcement to its last byte, because the sender's clock would count bytes that
only fill its own buffers. Chunks are random bytes, which a compressing VPN cannot shorten, and are thrown away; they go
beside TLS, as echoes do. Announcements and times are messages over it. LinkTester uses it within a
run, link_pair.py without one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from simulate.common import toml_io
from simulate.launch.preflight.channel import BadFrameError, Channel
from simulate.launch.preflight.deadline import Deadline

FIRST_CHUNK_BYTES = 64 << 10
CHUNKS = 5
"""Chunks that share the time of a measurement; MIN_CHUNKS are sent in any case."""
MIN_CHUNKS = 3
GROWTH = 8
MAX_ECHOES, MIN_ECHOES = 21, 5
_PIECE_BYTES = 1 << 20
_MORE, _END = b"+", b"."


class Limits(toml_io.Schema):
    """Time and bytes that one measurement may take."""

    aim_s: float = 1.0
    """Seconds after which a measurement ends; a slow link may need longer for MIN_CHUNKS."""
    budget_bytes: int = 256 << 20
    """Bytes that a measurement may send; exceeded only where MIN_CHUNKS of FIRST_CHUNK_BYTES are more."""

    @property
    def largest_chunk_bytes(self) -> int:
        """Largest chunk; those on the way to it sum to a seventh of it, so more than CHUNKS fit into the budget."""
        return max(FIRST_CHUNK_BYTES, self.budget_bytes // (2 * CHUNKS))


@dataclass(frozen=True)
class Rate:
    """Measured rate of a connection."""

    bytes_per_s: float
    """Median over the chunks since the size stopped growing."""
    sent_bytes: int
    """Bytes of all chunks, also of those that only found the size."""
    chunk_bytes: int
    """Final size of a chunk."""


def measure_latency_s(channel: Channel, limits: Limits, deadline: Deadline) -> float:
    """Return the one-way latency: half the median time of an echo. Raises PeerError."""
    channel.send({"kind": "echo"}, deadline)
    begin_s, round_trips_s, reply = time.perf_counter(), list[float](), memoryview(bytearray(1))
    while len(round_trips_s) < MAX_ECHOES:
        sent_s = time.perf_counter()
        # A slow link gets fewer echoes, never too few for a median.
        if len(round_trips_s) >= MIN_ECHOES and sent_s - begin_s > limits.aim_s:
            break
        channel.send_raw(_MORE, deadline)
        channel.receive_raw(reply, deadline)
        round_trips_s.append(time.perf_counter() - sent_s)
    channel.send_raw(_END, deadline)
    return median(round_trips_s) / 2


def measure_rate(channel: Channel, limits: Limits, deadline: Deadline, first_bytes: int = FIRST_CHUNK_BYTES) -> Rate:
    """Send chunks, growing until one takes its share of the time; returns the later ones' rate. Raises PeerError."""
    # Random, since a VPN that compresses would show the rate of zeros.
    piece = memoryview(os.urandom(_PIECE_BYTES))
    begin_s, size, sent_bytes, rates = time.perf_counter(), first_bytes, 0, list[float]()
    share_s, largest = limits.aim_s / CHUNKS, max(limits.largest_chunk_bytes, first_bytes)
    while not _enough(rates, time.perf_counter() - begin_s, sent_bytes + size, limits):
        seconds = _send_chunk(channel, piece, size, deadline)
        sent_bytes += size
        if seconds < share_s / 2 and size < largest:
            rates.clear()  # too short for a rate: TCP's slow start and buffers on the way dominate
            size = min(largest, int(size * min(GROWTH, share_s / max(seconds, 1e-9))))
        else:
            rates.append(size / max(seconds, 1e-9))
            if seconds > 2 * share_s:  # a traffic shaper let the first bytes through too fast
                size = max(FIRST_CHUNK_BYTES, int(size * share_s / seconds))
    return Rate(median(rates), sent_bytes, size)


def _enough(rates: list[float], elapsed_s: float, next_bytes: int, limits: Limits) -> bool:
    return len(rates) >= MIN_CHUNKS and (elapsed_s >= limits.aim_s or next_bytes > limits.budget_bytes)


def _send_chunk(channel: Channel, piece: memoryview, size: int, deadline: Deadline) -> float:
    """Send a chunk; returns the seconds that the receiver needed for it."""
    channel.send({"kind": "chunk", "bytes": size}, deadline)
    for begin in range(0, size, len(piece)):
        channel.send_raw(piece[: min(len(piece), size - begin)], deadline)
    answer = channel.receive(deadline)
    seconds = answer.get("seconds")
    if answer["kind"] != "chunk" or not isinstance(seconds, float) or not seconds >= 0:
        raise BadFrameError("did not say how long a chunk took")
    return seconds


def serve(channel: Channel, limits: Limits, deadline: Deadline) -> None:
    """Answer a peer's measurements until it says that it is done. Raises PeerError."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while (message := channel.receive(deadline))["kind"] != "done":
        if message["kind"] == "echo":
            _serve_echoes(channel, deadline)
        elif message["kind"] == "chunk":
            _take_chunk(channel, _chunk_bytes(message, limits), buffer, deadline)
        else:
            raise BadFrameError(f"asked for {message['kind']!r}, which is no measurement")


def _serve_echoes(channel: Channel, deadline: Deadline) -> None:
    byte = bytearray(1)
    while channel.receive_raw(memoryview(byte), deadline) and byte == _MORE:
        channel.send_raw(_MORE, deadline)
    if byte != _END:
        raise BadFrameError("sent something else than an echo")


def _chunk_bytes(message: dict[str, Any], limits: Limits) -> int:
    size = message.get("bytes")
    if not isinstance(size, int) or not 0 < size <= limits.largest_chunk_bytes:
        raise BadFrameError(f"announced a chunk of {size!r} bytes, over the limit of {limits.largest_chunk_bytes:,}")
    return size


def _take_chunk(channel: Channel, size: int, buffer: memoryview, deadline: Deadline) -> None:
    begin_s, left = time.perf_counter(), size
    while left:
        left -= channel.receive_raw(buffer[: min(len(buffer), left)], deadline)
    channel.send({"kind": "chunk", "seconds": time.perf_counter() - begin_s}, deadline)
