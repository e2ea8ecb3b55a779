"""Peak memory of torch's CPU allocator while a function runs; users' networks are measured by it."""

from __future__ import annotations

import os
from collections.abc import Callable

# torch.profiler's form of it imports torch.compile's tracer, in seconds.
from torch.autograd.profiler import profile

from simulate.common.gc_paused import earlier_garbage_kept


def cpu_peak_bytes(program: Callable[[], object]) -> int:
    """Return the peak of bytes that a program allocates on the CPU, above those allocated before it."""
    # Kineto prints lines of its own at every start and stop, at level 5, whatever else is silenced.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # Garbage from before, if freed while the program runs, would lower its count.
    with earlier_garbage_kept(), profile(profile_memory=True) as trace:
        program()
    results = trace.kineto_results
    assert results is not None
    current = peak = 0
    for event in results.events():
        if event.name() == "[memory]":  # an allocation, or with negative bytes a release
            current += event.nbytes()
            peak = max(peak, current)
    return peak
