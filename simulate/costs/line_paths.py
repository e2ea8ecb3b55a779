"""Rates and delays between devices whose lines differ: of a ring's edges, of each device's messages, to the server.

simulate.costs.message_time knows how a message moves over links that are all alike. Where they are not, it asks here
for the paths that the message takes, and the slowest one paces it. A path that several devices of one place share has
each one's part of the place's line. The timeline takes each device's path to the server from here, too.

N devices have the lines 0 to N-1, in the order of their ranks; device 0 serves pushes and pulls where the profile has
no server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from simulate.config.hardware import Link
from simulate.config.lines import DeviceLine, repeated


@dataclass(frozen=True)
class Path:
    """The line, or lines one after the other, that a device's message crosses."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float


@lru_cache(maxsize=256)
def ring_paths(link: Link, devices: int) -> tuple[Path, ...]:
    """Return the edges of a ring, equal ones once: a sender's way up, its receiver's way down.

    Of a place's line each edge that leaves it, and each that enters it, has its part.
    """
    lines = repeated(link.lines, devices)
    edges = [(lines[i], lines[(i + 1) % devices]) for i in range(devices)]
    crossing = [(sender, receiver) for sender, receiver in edges if not sender.shares_place(receiver)]
    leaving, entering = Counter(a.place for a, _ in crossing), Counter(b.place for _, b in crossing)
    return _distinct(
        Path(a.up_bytes_per_s, b.down_bytes_per_s, a.delay_s(b))
        if a.shares_place(b)
        else Path(_outward(a, leaving[a.place]), _inward(b, entering[b.place]), a.delay_s(b))
        for a, b in edges
    )


@lru_cache(maxsize=256)
def swap_paths(link: Link, devices: int) -> tuple[Path, ...]:
    """Return each device's path of messages that all send to all others, equal ones once.

    The longest delay is to the device with the slowest line. Of N - 1 parts that a device sends, those to its own place
    do not leave it.
    """
    lines = repeated(link.lines, devices)
    members, farthest_s = _members(lines), max(line.outer_latency_s for line in lines)

    def path(line: DeviceLine) -> Path:
        count = members[line.place] if line.place is not None else 1
        if count == devices:  # all at one place
            return Path(line.up_bytes_per_s, line.down_bytes_per_s, line.latency_s)
        crossing = count * (devices - count) / (devices - 1)
        delay_s = (line.outer_latency_s + farthest_s) / 2
        return Path(_outward(line, crossing), _inward(line, crossing), delay_s)

    return _distinct(map(path, lines))


@lru_cache(maxsize=256)
def tree_paths(link: Link, devices: int) -> tuple[Path, ...]:
    """Return every device's path, in order, of copies that go down a tree; each has its place's whole line."""
    lines = repeated(link.lines, devices)
    return tuple(Path(_outward(line, 1), _inward(line, 1), line.outer_latency_s) for line in lines)


@dataclass(frozen=True)
class ServerPath:
    """The way of one device's bytes to the server, or from it."""

    own_bytes_per_s: float
    place: int | None
    """The place whose line it crosses with all devices of that place; None: none."""
    place_bytes_per_s: float
    delay_s: float
    """One-way delay."""


@lru_cache(maxsize=256)
def server_paths(push: bool, devices: int, link: Link) -> tuple[tuple[ServerPath, ...], float]:
    """Return each device's path to the server (`push`) or from it, and the bytes/s of the server's own line.

    A server that the profile gives no rates is device 0, as in launched runs, with that device's line.
    """
    lines = repeated(link.lines, devices)
    server = lines[0]
    rate = link.server_down_bytes_per_s if push else link.server_up_bytes_per_s
    is_device = rate is None
    if rate is None:
        rate = server.down_bytes_per_s if push else server.up_bytes_per_s
        outside = sum(not line.shares_place(server) for line in lines)
        if server.place is not None and outside:  # what its place's line carries is for the devices elsewhere alone
            place_rate = server.place_down_bytes_per_s if push else server.place_up_bytes_per_s
            rate = min(rate, place_rate * devices / outside)
    if push and link.shared_bytes_per_s is not None:
        rate = min(rate, link.shared_bytes_per_s)

    def path(line: DeviceLine) -> ServerPath:
        own = line.up_bytes_per_s if push else line.down_bytes_per_s
        place_rate = line.place_up_bytes_per_s if push else line.place_down_bytes_per_s
        inside = is_device and line.shares_place(server)
        delay_s = line.delay_s(server) if is_device else line.outer_latency_s
        return ServerPath(own, None if inside else line.place, place_rate, delay_s)

    return tuple(map(path, lines)), rate


@lru_cache(maxsize=256)
def slowest_server_paths(push: bool, devices: int, link: Link) -> tuple[tuple[tuple[float, float], ...], float]:
    """Return the (bytes/s, one-way delay) of all devices that use the server at once, equal ones once, and its rate."""
    paths, rate = server_paths(push, devices, link)
    sharing = Counter(path.place for path in paths)
    shares = (
        (path.own_bytes_per_s, path.delay_s)
        if path.place is None
        else (min(path.own_bytes_per_s, path.place_bytes_per_s / sharing[path.place]), path.delay_s)
        for path in paths
    )
    return tuple(dict.fromkeys(shares)), rate


def _outward(line: DeviceLine, crossing: float) -> float:
    """Return the bytes/s up of one of so many messages that leave the line's place at once."""
    if line.place is None:
        return line.up_bytes_per_s
    return min(line.up_bytes_per_s, line.place_up_bytes_per_s / crossing)


def _inward(line: DeviceLine, crossing: float) -> float:
    if line.place is None:
        return line.down_bytes_per_s
    return min(line.down_bytes_per_s, line.place_down_bytes_per_s / crossing)


def _members(lines: tuple[DeviceLine, ...]) -> Counter[int | None]:
    return Counter(line.place for line in lines)


def _distinct(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(paths))
