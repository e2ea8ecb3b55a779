"""What devices that leave and come back cost, in expectation.

p is the chance that a device leaves within a round. It loses all of that round, comes back `join_s` after it left (or
another in its place) and takes part from the next round on: with j = join_s / round_s, and leaving at any moment of
the round alike, it misses j + 1 rounds on average.
"""

from __future__ import annotations


def leave_probability(leave_per_hour: float, round_s: float) -> float:
    """Return the chance p that a device leaves within a round, from the chance that it leaves within an hour."""
    return 1.0 - (1.0 - leave_per_hour) ** (round_s / 3600) if leave_per_hour < 1 else 1.0


def away_share(leave_per_hour: float, join_s: float, round_s: float) -> float:
    """Return the share of its rounds that a device misses where the others go on: p·(j + 1) / (1 + p·j)."""
    p, j = leave_probability(leave_per_hour, round_s), join_s / round_s
    return p * (j + 1) / (1 + p * j)


def redo_factor(leave_per_hour: float, join_s: float, round_s: float, devices: int) -> float:
    """Return how many times as long a run takes that repeats every round in which anybody leaves, as launched runs do.

    Of N devices none leaves with the chance (1 − p)^N = 1 − q; each of the q / (1 − q) attempts in vain costs half a
    round and `join_s`. Infinite where no round ever ends.
    """
    q = 1.0 - (1.0 - leave_probability(leave_per_hour, round_s)) ** devices
    return float("inf") if q >= 1 - 1e-12 else 1 + q / (1 - q) * (0.5 + join_s / round_s)
