"""What a plan minimises, and the time that it may take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from simulate.common.errors import InputError, near_match
from simulate.config.hardware import Profile
from simulate.costs.samples import Efficiency

if TYPE_CHECKING:
    from simulate.planning.candidate import Candidate
    from simulate.planning.probe_ranks import PlanProbe

Objective = Literal["time", "bytes", "memory", "cost"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
MEANINGS = {
    "time": "time to equal loss",
    "bytes": "bytes that a device sends to equal loss",
    "memory": "memory of a device",
    "cost": "price to equal loss",
}
UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class SelectionCriteria:
    """How to choose among candidates."""

    objective: Objective = "time"
    efficiency: Efficiency | None = None
    """The samples model; None: the shipped one."""
    within_s: float | None = None
    """Longest time to equal loss; what takes longer is rejected."""
    with_rivals: bool = True
    """Whether to plan the methods, too, that are only shown beside."""
    probe: PlanProbe | None = None
    """What was probed of the network, if anything."""


def parse_objective(text: str) -> Objective:
    """Return an objective by name; raises InputError."""
    if text not in OBJECTIVES:
        raise InputError(f"--objective {text}: is not known; {near_match(text, OBJECTIVES)}")
    return text  # type: ignore[return-value]


def parse_duration_s(text: str) -> float:
    """Return the seconds of `90s`, `30min`, `8h` or `3d`; raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    seconds = float(match[1]) * UNITS_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise InputError(f"--within {text}: must be a time above 0 with its unit, for example 90s, 30min, 8h or 3d")
    return seconds


def hourly_price(profile: Profile, devices: int) -> float | None:
    """Return what an hour of all devices and the server costs; None where a device has no price."""
    prices = [device.price_per_hour for device in profile.devices(devices)]
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
