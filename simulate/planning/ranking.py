"""Order a plan's candidates by its objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulate.common.errors import InputError
from simulate.config.hardware import Profile
from simulate.planning.candidate import Candidate, Rejected
from simulate.planning.objective import Objective

Rank = Callable[[Candidate], tuple[float, ...]]
"""Returns the key that candidates are sorted by, the best one first."""


def hourly_price(profile: Profile, devices: int) -> float | None:
    """Return the price of an hour of all devices and the server; None where a device has no price."""
    prices = [device.price_per_hour for device in profile.devices(devices)]
    # One unknown price makes the sum unknown; a server without one is taken for free.
    known = [price for price in prices if price is not None]
    server = profile.server.price_per_hour if profile.server else None
    return sum(known) + (server or 0.0) if len(known) == len(prices) else None


def value_of(objective: Objective, profile: Profile, devices: int) -> Callable[[Candidate], float]:
    """Return the function that is minimised; raises InputError for cost without prices."""
    if objective == "cost":
        price = hourly_price(profile, devices)
        if price is None:
            raise InputError(
                f"--objective cost needs price_per_hour in every [[device]] of profile {profile.name}; add it to a "
                f"copy (lte profile show {profile.name} > mine.toml), or choose another objective"
            )
        return lambda candidate: price * candidate.equivalent_wall_s / 3600
    if objective == "bytes":
        return lambda candidate: candidate.equivalent_sent_bytes
    if objective == "memory":
        return lambda candidate: float(candidate.memory.total)
    return lambda candidate: candidate.equivalent_wall_s


def rank_by(value: Callable[[Candidate], float]) -> Rank:
    """Return the key to sort by; ties go to less time, then memory, then bytes, so the grid's order never decides."""
    return lambda c: (value(c), c.equivalent_wall_s, c.memory.total, c.sent_bytes_per_round)


def best(results: Sequence[Candidate | Rejected], rank: Rank) -> Candidate | Rejected | None:
    """Return the best candidate that fits, or else the nearest miss."""
    fitting = [r for r in results if isinstance(r, Candidate)]
    misses = [r for r in results if isinstance(r, Rejected)]
    nearest = min(misses, key=lambda r: r.missing, default=None)
    return min(fitting, key=rank, default=None) or nearest
