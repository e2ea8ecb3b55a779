"""Peak memory of torch's CPU allocator while a function runs; users' networks are measured by it."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def cpu_peak_bytes(program: Callable[[], object]) -> int:
    """Return the peak of bytes that a program allocates on the CPU, above those allocated before it."""
    gc.collect()  # garbage from before, if freed while the program runs, would lower its count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        program()
    current = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":  # an allocation, or with negative bytes a release
            current += event.nbytes()
            peak = max(peak, current)
    return peak
