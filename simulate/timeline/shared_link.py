"""End times of transfers that share one link.

Every active transfer gets the same rate: its own link's, or its part of the shared one where that is less (TCP
connections of equal delay converge to that). Transfers are equally large and equally fast, so the first to start is the
first to end, and two queues of times replace a general event list: the next event is an arrival or the oldest
transfer's end. `python -m bench.studies.timeline` compares that on 10,000 devices with a heap of events, which
transfers of unequal size would need, and with SimPy's processes: all three agree to rounding, and a round took 12, 31
and 309 ms of processor time. SimPy makes an event and wakes a process for each change of the rate, which nothing here
needs.
"""

from __future__ import annotations

import numpy as np

from simulate.rules.jitter import Floats


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
