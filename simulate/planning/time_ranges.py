"""Compute the ranges of planned times, from the profile's margins and the range of the samples model."""

from __future__ import annotations

import math

from simulate.common.units import Unit, order_text, range_text
from simulate.costs.samples import samples_factor
from simulate.planning.candidate import Candidate


def time_range(candidate: Candidate, compute_s: float, exchange_s: float) -> tuple[float, float]:
    """Return the shortest and the longest that compute and an exchange may take together."""
    margins = candidate.margins
    # Compute and links are measured apart, so each has a margin of its own.
    low_s = compute_s / margins.compute + exchange_s / margins.exchange
    return low_s, compute_s * margins.compute + exchange_s * margins.exchange


def time_text(candidate: Candidate, seconds: tuple[float, float], unit: Unit | None = None) -> str:
    """Return a range of seconds as text, their order of magnitude where no more is known; the unit fits by default."""
    if candidate.margins.is_order:
        return order_text(math.sqrt(max(seconds[0], 1e-9) * max(seconds[1], 1e-9)))
    return range_text(*seconds, unit)


def simulated_here_text(candidate: Candidate) -> str:
    """Return the time of simulating a run on one of its devices, as text."""
    return time_text(candidate, simulated_here_range(candidate))


def simulated_here_range(candidate: Candidate) -> tuple[float, float]:
    """Return the time of simulating a run on one of its devices: all devices' compute, evaluations and saves."""
    # One machine evaluates and saves once, as every device of a launched run does at the same time.
    time, devices = candidate.time, len(candidate.context.devices)
    compute_s = (time.device_steps * time.compute_s + devices * time.merge_s) * candidate.rounds
    seconds = compute_s + candidate.eval_and_save.total_s
    return time_range(candidate, seconds, 0.0)


def wall_range(candidate: Candidate) -> tuple[float, float]:
    """Return the range of the whole run's seconds."""
    exchange_s = candidate.time.exchange_s * candidate.rounds
    return time_range(candidate, candidate.wall_s - exchange_s, exchange_s)


def samples_range(candidate: Candidate) -> tuple[float, float]:
    """Return the range of the assumed samples over dense's."""
    run, shape = candidate.run, candidate.run.shape()
    low, high = (samples_factor(run, shape, candidate.tokens, candidate.efficiency, end) for end in ("low", "high"))
    return low, high


def equivalent_range(candidate: Candidate) -> tuple[float, float]:
    """Return the range of the seconds to equal loss: times and samples both at their low, or both at their high."""
    return _equivalent_range(candidate, wall_range(candidate), samples_range(candidate))


def _equivalent_range(
    candidate: Candidate, wall_s: tuple[float, float], samples: tuple[float, float]
) -> tuple[float, float]:
    # Skipped steps, and tokens that whole steps round up, change the time by a factor without uncertainty.
    share = candidate.equivalent_wall_s / (candidate.wall_s * candidate.samples_factor)
    return wall_s[0] * samples[0] * share, wall_s[1] * samples[1] * share


def range_keys(candidate: Candidate) -> dict[str, float]:
    """Return `_low` and `_high` of every time and of the samples, for the plan's JSON."""
    time = candidate.time
    compute_s = time.steps * time.compute_s + time.merge_s
    wall_s, samples = wall_range(candidate), samples_range(candidate)
    ranges = {
        "compute_s": time_range(candidate, time.compute_s, 0.0),
        "exchange_s": time_range(candidate, 0.0, time.exchange_s),
        "step_s": time_range(candidate, compute_s / time.steps, time.exchange_s / time.steps),
        "round_s": time_range(candidate, compute_s, time.exchange_s),
        "wall_s": wall_s,
        "assumed_samples_factor": samples,
        "equivalent_wall_s": _equivalent_range(candidate, wall_s, samples),
    }
    return {
        f"{key}_{end}": value for key, both in ranges.items() for end, value in zip(("low", "high"), both, strict=True)
    }
