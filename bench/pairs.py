"""Time two programs in turns: pairs of calls, and the median of their ratios. bench/step.py and bench/gpu time by it.

Other programs on a machine lengthen single calls; in turns, both are hit alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP_STEPS = 2
"""The first step allocates the optimizer's state."""
Step = Callable[[], object]


@dataclass(frozen=True)
class Seconds:
    """Seconds of one call."""

    wall: float
    processor: float
    """Sum over all threads: other programs on the cores hardly lengthen it, threads that wait for each other may."""


def at_once() -> None:
    """Wait for nothing: a CPU has done its work when a call returns."""


def seconds(step: Step, wait: Step = at_once) -> Seconds:
    """Time one call; `wait` returns when a device has done what was queued on it."""
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    step()
    wait()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def paired_seconds(step: Step, reference: Step, pairs: int, wait: Step = at_once) -> list[tuple[Seconds, Seconds]]:
    """Time both in turns."""
    for _ in range(WARM_UP_STEPS):
        # The first steps allocate the optimizers' states.
        step(), reference()
    return [(seconds(step, wait), seconds(reference, wait)) for _ in range(pairs)]


def median_and_quartiles(ratios: list[float]) -> tuple[float, list[float]]:
    """Return the median, and the quartiles around it."""
    # Medians, since other programs lengthen single steps; quartiles show by how much.
    ordered = sorted(ratios)
    return statistics.median(ordered), [ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]]
