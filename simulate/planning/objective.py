"""Define the quantity that a plan minimises, the time that a run may take, and how users write both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from simulate.common.errors import InputError, near_match
from simulate.costs.samples import Efficiency

if TYPE_CHECKING:
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
    """The criteria by which a plan chooses among candidates."""

    objective: Objective = "time"
    efficiency: Efficiency | None = None
    """The samples model; None: the shipped one."""
    within_s: float | None = None
    """Longest time to equal loss; candidates that take longer are rejected."""
    with_rivals: bool = True
    """Whether to plan also the methods that are only shown for comparison."""
    probe: PlanProbe | None = None
    """Probe of the network (`lte probe`), if there is one."""


def parse_objective(text: str) -> Objective:
    """Return an objective by name; raises InputError."""
    if text not in OBJECTIVES:
        raise InputError(f"--objective {text}: is not known; {near_match(text, OBJECTIVES)}")
    return text  # type: ignore[return-value]


def parse_duration_s(text: str) -> float:
    """Return the seconds of `90s`, `30min`, `8h` or `3d`; raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    # Without a unit 8 could mean hours or seconds, a factor of 3600, so one is required.
    seconds = float(match[1]) * UNITS_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise InputError(f"--within {text}: must be a time above 0 with its unit, for example 90s, 30min, 8h or 3d")
    return seconds
