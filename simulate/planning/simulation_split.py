"""Choose how many processes simulate a run's devices on this machine, and with how many threads each; torch-free.

Threads of one process share each operation and wait for each other after it: small operations gain little by them. A
process a core shares nothing but merges; it costs a start, memory, and exchanges that one process need not make.
`lte train` asks before it simulates (ltecli.runs.simulation_split). Where each constant was measured is in
docs/performance.md.

Letters: N devices, P processes, t threads of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SERIAL_LAYER_FLOPS, MOST_SERIAL = 4e7, 0.2
"""Threads leave √(SERIAL_LAYER_FLOPS / a layer's operations) of a step as it is, at most MOST_SERIAL."""
LOOPBACK_BYTES_PER_S = 1e9
"""Bytes that a process sends in a second of gloo's exchanges on loopback."""
MESSAGE_S = 0.5e-3
"""Seconds of the shortest exchange, for which processes also wait for each other."""
LEAST_GAIN = 0.05
"""Share of the time that several processes must save, since they take more memory."""
LEAST_SAVED_S = 6.0
"""Seconds that they must save: starting a process takes 3 to 4 of the processor's time."""
PEAK_SHARE = 0.62
"""Share of the processor's peak that the step of a small network reaches; larger ones reach more, and for these what is
saved is taken half again too long at most, which is still more than a start takes."""


@dataclass(frozen=True)
class Split:
    """Processes of a simulation, and the threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{processes} of {self.threads} thread{'' if self.threads == 1 else 's'}"


@dataclass(frozen=True)
class Work:
    """A run as far as the choice depends on it."""

    devices: int
    steps: int
    """Steps that are left."""
    step_s: float
    """Seconds of a step of all devices in one process with a thread a core, at PEAK_SHARE of the processor's peak."""
    layer_flops: float
    """Operations of one layer in a step of all devices."""
    sent_bytes: float
    """Bytes that one device sends in a step, on average."""
    messages: float
    """Exchanges in a step, on average."""


def split_of(processes: int, cores: int) -> Split:
    """Return a split whose processes together use each core once."""
    return Split(processes, max(1, cores // processes))


def choose_split(work: Work, cores: int, is_possible: Callable[[int], bool]) -> Split:
    """Return the split with the shortest steps, of the fewest processes among equals; one process unless others pay.

    `is_possible` says whether so many processes can simulate the run here.
    """
    alone = split_of(1, cores)
    counts = (processes for processes in range(2, min(work.devices, cores) + 1) if is_possible(processes))
    best = min((alone, *(split_of(processes, cores) for processes in counts)), key=lambda s: step_s(work, cores, s))
    saved_s = work.step_s - step_s(work, cores, best)
    return best if saved_s >= LEAST_GAIN * work.step_s and work.steps * saved_s >= LEAST_SAVED_S else alone


def step_s(work: Work, cores: int, split: Split) -> float:
    """Return the predicted seconds of a step of all devices."""
    if split.processes == 1:
        return work.step_s
    serial = min(MOST_SERIAL, math.sqrt(SERIAL_LAYER_FLOPS / work.layer_flops))
    # By Amdahl: of the seconds with one thread, the step takes this share with a thread a core.
    with_one_s = work.step_s / (serial + (1 - serial) / cores)
    share = -(-work.devices // split.processes) / work.devices
    exchanges_s = work.messages * MESSAGE_S + work.sent_bytes / LOOPBACK_BYTES_PER_S
    return with_one_s * share * (serial + (1 - serial) / split.threads) + exchanges_s
