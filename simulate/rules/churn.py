"""Expected cost of devices that leave and come back, in closed form.

p is the chance that a device leaves within a round. It loses all of that round, returns `join_s` after it left (or
another device in its place) and takes part from the next round on: with j = join_s / round_s, and a time of leaving
that is uniform over the round, it misses j + 1 rounds on average.
"""

from __future__ import annotations


def leave_probability(leave_per_hour: float, round_s: float) -> float:
    """Return the chance p that a device leaves within a round, from the chance that it leaves within an hour."""
    return 1.0 - (1.0 - leave_per_hour) ** (round_s / 3600) if leave_per_hour < 1 else 1.0


def away_share(leave_per_hour: float, join_s: float, round_s: float) -> float:
    """Return the share of its rounds that a device misses where the others continue: p·(j + 1) / (1 + p·j)."""
    p, j = leave_probability(leave_per_hour, round_s), join_s / round_s
    return p * (j + 1) / (1 + p * j)


def redo_factor(leave_per_hour: float, join_s: float, round_s: float, devices: int) -> float:
    """Return the factor on a run's time where every round in which a device leaves is repeated, as launched runs do.

    None of N devices leaves with the chance (1 − p)^N = 1 − q; each of the q / (1 − q) failed attempts costs half a
    round and `join_s`. Infinite where no round ever succeeds.
    """
    q = 1.0 - (1.0 - leave_probability(leave_per_hour, round_s)) ** devices
    return float("inf") if q >= 1 - 1e-12 else 1 + q / (1 - q) * (0.5 + join_s / round_s)
