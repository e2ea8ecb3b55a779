"""Choose the order of devices: who follows whom in the ring, and who is first and serves.

A launched run's rings follow the numbers of its nodes, and node 0 serves pushes and pulls where no server is rented.
With lines that differ, an order keeps the devices of one place beside each other, so that their line carries each
message once, and puts lines of long delays beside those of short ones. A profile in another order is all that the rest
of the program needs: plans, the simulated clock, the timeline and launched runs take device i as node i's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulate.common.units import seconds_text
from simulate.config.hardware import Device, Profile
from simulate.config.lines import DeviceLine
from simulate.config.run import Run
from simulate.costs.message_schedule import schedule
from simulate.costs.step_time import round_exchange_s, round_time

MOST_TRIED_GROUPS = 6
"""Most places, or devices without a place, whose every order is tried: 120 rings."""
MOST_FIRST = 8
"""Most devices that are tried as the first one: those with the fastest lines."""
LEAST_GAIN = 0.01
"""Share of a round's exchange by which another order must be shorter to be worth it."""

Order = tuple[int, ...]


@dataclass(frozen=True)
class NodeOrder:
    """Devices in a better order, and the seconds of exchange in a round that it saves."""

    order: Order
    """The profile's devices, by node."""
    names: tuple[str, ...]
    profile: Profile
    """The profile with its devices in that order."""
    listed_s: float
    """Seconds of exchange in a round in the profile's own order."""
    exchange_s: float

    def of_run(self, run: Run, listed: Profile) -> NodeOrder:
        """Return the same order with another run's seconds; `listed` is the profile in its own order."""
        seconds = _seconds_of(run, listed, listed.link.lines[: len(self.order)])
        return replace(self, listed_s=seconds(tuple(range(len(self.order)))), exchange_s=seconds(self.order))

    def to_dict(self) -> dict[str, Any]:
        """Return the order as the plan's JSON has it."""
        return {
            "devices": list(self.order),
            "names": list(self.names),
            "exchange_s": self.exchange_s,
            "exchange_as_listed_s": self.listed_s,
        }

    def __str__(self) -> str:
        nodes = ", ".join(f"node {node} {name}" for node, name in enumerate(self.names))
        return (
            f"nodes are planned in the order {nodes}: a round's exchange takes {seconds_text(self.exchange_s)}, in the "
            f"profile's own order {seconds_text(self.listed_s)}; -o run.toml keeps it, and a launched run has it only "
            "where its nodes are started by these numbers"
        )


def _movable(run: Run, profile: Profile) -> tuple[DeviceLine, ...]:
    """Return the lines of devices whose order matters and may change; empty where it does not, or must not."""
    devices, lines = run.cluster.devices, profile.link.lines
    # Shards and given steps name devices by their numbers.
    fixed = run.data.shards is not None or run.method.given_steps is not None
    if fixed or not 2 <= devices <= len(lines) or len(set(lines[:devices])) == 1:
        return ()
    return lines[:devices]


def likely_order(run: Run, profile: Profile) -> Profile:
    """Return the profile with each place's devices together and the fastest line first; as it is where all are alike.

    No method is chosen yet; the ring's order follows from the choice.
    """
    lines = _movable(run, profile)
    if not lines:
        return profile
    ring = _joined(_groups(lines))
    start = ring.index(_fastest(ring, lines)[0])
    order = ring[start:] + ring[:start]
    return profile if order == tuple(range(len(lines))) else reordered(profile, order)


def _fastest(ring: Order, lines: Sequence[DeviceLine]) -> list[int]:
    """Return the devices by the slower way of their lines, the fastest first."""
    return sorted(ring, key=lambda index: -min(lines[index].outer_rates))


def better_order(run: Run, profile: Profile) -> NodeOrder | None:
    """Return a better order of the devices than the profile's; None where lines are alike, or none is worth it."""
    lines = _movable(run, profile)
    if not lines:
        return None
    seconds = _seconds_of(run, profile, lines)
    listed = tuple(range(len(lines)))
    best = min(_orders(lines, seconds), key=seconds, default=listed)
    # The profile's order stays where another gains next to nothing: nodes may already be started by it.
    if seconds(best) > (1 - LEAST_GAIN) * seconds(listed):
        return None
    names = tuple(profile.label(index) for index in best)
    return NodeOrder(best, names, reordered(profile, best), seconds(listed), seconds(best))


def reordered(profile: Profile, order: Order) -> Profile:
    """Return the profile with its first devices in an order; the others follow as they are."""
    single = [device.model_copy(update={"count": 1}) for device in profile.device for _ in range(device.count)]
    devices: list[Device] = []
    for index in (*order, *range(len(order), len(single))):
        if devices and single[index] == devices[-1].model_copy(update={"count": 1}):
            devices[-1] = devices[-1].model_copy(update={"count": devices[-1].count + 1})
        else:
            devices.append(single[index])
    return profile.with_devices(devices)


def _seconds_of(run: Run, profile: Profile, lines: tuple[DeviceLine, ...]) -> Callable[[Order], float]:
    """Return the function that gives the seconds of exchange in a round of an order."""
    shape, known = run.shape(), dict[Order, float]()
    time = round_time(run, shape, profile.devices(run.cluster.devices), profile.link)
    parts = schedule(run, shape)

    def seconds(order: Order) -> float:
        if order not in known:
            link = profile.link.with_lines(tuple(lines[index] for index in order))
            known[order] = round_exchange_s(run, parts, link, time.compute_s, time.merge_s)
        return known[order]

    return seconds


def _orders(lines: tuple[DeviceLine, ...], seconds: Callable[[Order], float]) -> Iterator[Order]:
    """Yield orders worth a try: rings of whole places, and the best of them begun at each of the fastest lines."""
    rings = list(_rings(lines))
    ring = min(rings, key=seconds)
    yield from rings
    for first in _fastest(ring, lines)[:MOST_FIRST]:
        start = ring.index(first)
        yield ring[start:] + ring[:start]


def _rings(lines: tuple[DeviceLine, ...]) -> Iterator[Order]:
    groups = _groups(lines)
    if len(groups) <= MOST_TRIED_GROUPS:
        for others in itertools.permutations(groups[1:]):
            yield _joined([groups[0], *others])
        return
    yield _joined(groups)
    # The largest mean of two neighbours is least where the longest delay has the two shortest beside it, and so on.
    ranked = sorted(groups, key=lambda group: lines[group[0]].outer_latency_s)
    short, long = ranked[: (len(ranked) + 1) // 2], ranked[: (len(ranked) - 1) // 2 : -1]
    zigzag = [group for pair in itertools.zip_longest(short, long) for group in pair if group is not None]
    yield _joined(zigzag)
    yield _joined([*zigzag[::4], *zigzag[1::2], *zigzag[2::4]])


def _groups(lines: Sequence[DeviceLine]) -> list[Order]:
    """Return the devices of each place together, and all others alone, in the profile's order."""
    groups: dict[Any, list[int]] = {}
    for index, line in enumerate(lines):
        groups.setdefault(("alone", index) if line.place is None else line.place, []).append(index)
    return [tuple(group) for group in groups.values()]


def _joined(groups: Sequence[Order]) -> Order:
    return tuple(itertools.chain.from_iterable(groups))
