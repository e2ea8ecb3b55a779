"""The most that torch's CPU allocator holds while a function runs."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def cpu_peak_bytes(program: Callable[[], object]) -> int:
    """Return the CPU allocator's peak, in bytes, of what a program allocates over what was there before."""
    gc.collect()  # what is freed late would be counted as if the program had freed it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        program()
    current = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak
