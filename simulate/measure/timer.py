"""Time a repeated program: by processor time where one thread does the work, else by the wall clock.

Processor time leaves out other programs of a busy machine, and equals the wall clock's on an idle one; with several
threads it leaves out the time in which they wait for each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from simulate.layers.accelerator import synchronize

WARM_UP = 2
LEAST_IN_A_HURRY = 3


@dataclass
class Stopwatch:
    """Times programs on one device and keeps the results by name."""

    device: torch.device
    budget_s: float
    """Seconds for the repetitions of one program; the least number of repetitions may take more."""
    ends_s: float | None = None
    """Reading of time.monotonic after which nothing is timed any more; where it is set, programs are repeated less."""
    median_s: dict[str, float] = field(default_factory=dict)
    p90_s: dict[str, float] = field(default_factory=dict)

    @property
    def clock(self) -> str:
        """Name of the clock that seconds are read from."""
        return "processor time of one thread" if self._is_processor_time else "wall clock"

    @property
    def _is_processor_time(self) -> bool:
        return self.device.type == "cpu" and torch.get_num_threads() == 1

    def seconds(self, name: str, program: Callable[[], object], least: int = 5, most: int = 50) -> float:
        """Return the median of `least` to `most` repetitions after a warm-up, and keep it with the 90th percentile.

        Raises TimeoutError once the time for all programs is over.
        """
        if self.ends_s is not None:
            least = min(least, LEAST_IN_A_HURRY)
        for _ in range(WARM_UP):
            self._once(program, 1)
        # Short programs run several times between two readings, so that the clock's resolution does not count.
        calls = max(1, int(1e-3 / max(self._once(program, 1), 1e-7)))
        seen: list[float] = []
        started = time.monotonic()
        while len(seen) < least or (len(seen) < most and time.monotonic() - started < self.budget_s):
            seen.append(self._once(program, calls))
        self.median_s[name] = statistics.median(seen)
        self.p90_s[name] = sorted(seen)[min(len(seen) - 1, int(0.9 * len(seen)))]
        return self.median_s[name]

    def _once(self, program: Callable[[], object], calls: int) -> float:
        if self.ends_s is not None and time.monotonic() > self.ends_s:
            raise TimeoutError
        read = time.process_time if self._is_processor_time else time.perf_counter
        synchronize(self.device)  # kernels of a GPU run behind the program that starts them
        started = read()
        for _ in range(calls):
            program()
        synchronize(self.device)
        return max((read() - started) / calls, 1e-9)
