"""End times of transfers that share one link.

Every active transfer gets the same rate: its own link's, or its part of the shared one where that is less (TCP
connections of equal delay converge to that). Transfers are equally large and equally fast, so the first to start is the
first to end, and two queues of times replace a general event list: the next event is an arrival or the oldest
transfer's end. `python -m bench.studies.timeline` compares that on 10,000 devices with a heap of events, which
transfers of unequal size would need, and with SimPy's processes: all three agree to rounding, and a round took 12, 31
and 309 ms of processor time. SimPy makes an event and wakes a process for each change of the rate, which nothing here
needs.

Where devices have lines of their own, and places lines that several share, rates differ: `unequal_ends` fills the links
like TCP does, each transfer getting as much as its narrowest link leaves (max-min fairness), and goes from event to
event with all transfers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulate.rules.jitter import Floats, Integers


def shared_ends(starts_N: Floats, payload_bytes: float, own_bytes_per_s: float, all_bytes_per_s: float) -> Floats:
    """Return the end of each transfer of `payload_bytes` by its start, both in seconds; starts need not be sorted."""
    count = len(starts_N)
    if count == 0:
        return starts_N.copy()
    first, last = float(starts_N.min()), float(starts_N.max())
    if first == last:
        return np.full(count, first + max(payload_bytes / own_bytes_per_s, count * payload_bytes / all_bytes_per_s))
    if count * own_bytes_per_s <= all_bytes_per_s:  # the shared link never limits any
        return starts_N + payload_bytes / own_bytes_per_s
    order_N = np.argsort(starts_N, kind="stable")
    ends_N = np.empty(count)
    ends_N[order_N] = _in_order(starts_N[order_N].tolist(), payload_bytes, own_bytes_per_s, all_bytes_per_s)
    return ends_N


def _in_order(starts: list[float], payload: float, own_bytes_per_s: float, all_bytes_per_s: float) -> list[float]:
    """Return the ends of transfers with sorted starts, event by event.

    `served` counts the bytes that a transfer active since the first event would have got; a transfer ends when `served`
    has grown by its payload.
    """
    ends: list[float] = []
    goals: list[float] = []
    now_s, served, arrived, through, count = starts[0], 0.0, 0, 0, len(starts)
    while through < count:
        active = arrived - through
        rate = min(own_bytes_per_s, all_bytes_per_s / active) if active else 0.0
        end_s = now_s + (goals[through] - served) / rate if active else float("inf")
        # The next event: a transfer starts, which slows all, or the one that has waited longest ends.
        if arrived < count and starts[arrived] <= end_s:
            served += rate * (starts[arrived] - now_s)
            now_s = starts[arrived]
            goals.append(served + payload)
            arrived += 1
        else:
            served, now_s = goals[through], end_s
            ends.append(end_s)
            through += 1
    return ends


@dataclass(frozen=True)
class UnequalLinks:
    """The links of N transfers: each one's own, those that the ones of a place share, and the one that all share."""

    own_N: Floats
    """Bytes/s."""
    place_N: Integers
    """Number of the place whose line a transfer crosses; -1: none."""
    place_rates: dict[int, float]
    """Bytes/s of the places' lines."""
    all_bytes_per_s: float

    def rates(self, active_N: NDArray[np.bool_]) -> Floats:
        """Return the bytes/s of the active transfers, all others 0: links fill until one of each transfer's is full."""
        rates_N = np.zeros(len(self.own_N))
        links = [active_N, *(active_N & (self.place_N == place) for place in self.place_rates)]
        left = [self.all_bytes_per_s, *self.place_rates.values()]
        open_N = active_N.copy()
        while open_N.any():
            # Every open transfer grows alike until its own link is full, or one that it shares.
            grown = float((self.own_N - rates_N)[open_N].min())
            counts = [int((users_N & open_N).sum()) for users_N in links]
            shares = [room / count if count else np.inf for room, count in zip(left, counts, strict=True)]
            step = min(grown, *shares)
            rates_N[open_N] += step
            left = [room - step * count for room, count in zip(left, counts, strict=True)]
            full_N = open_N & (self.own_N - rates_N <= 1e-12 * self.own_N)
            for users_N, share in zip(links, shares, strict=True):
                if share <= step * (1 + 1e-12):
                    full_N |= users_N & open_N
            open_N &= ~full_N
        return rates_N


def unequal_ends(starts_N: Floats, payload_bytes: float, links: UnequalLinks) -> Floats:
    """Return the end of each transfer of `payload_bytes` by its start, both in seconds, over links that differ."""
    left_N, ends_N = np.full(len(starts_N), float(payload_bytes)), np.full(len(starts_N), np.inf)
    now_s = float(starts_N.min()) if len(starts_N) else 0.0
    while np.isinf(ends_N).any():
        active_N = (starts_N <= now_s) & np.isinf(ends_N)
        rates_N = links.rates(active_N)
        done_N = np.full(len(starts_N), np.inf)
        done_N[active_N] = now_s + left_N[active_N] / rates_N[active_N]
        event_s = min(float(done_N.min()), float(starts_N[starts_N > now_s].min(initial=np.inf)))
        left_N[active_N] -= rates_N[active_N] * (event_s - now_s)
        # Transfers that end together up to rounding end in one event.
        through_N = active_N & (done_N <= event_s + 1e-12 * abs(event_s - now_s))
        ends_N[through_N], now_s = done_N[through_N], event_s
    return ends_N
