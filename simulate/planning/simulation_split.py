"""Choose how many processes simulate a run's devices on this machine, and with how many threads each; torch-free.

Threads of one process share each operation and wait for each other after it: small operations gain little by them. A
process a core shares nothing but merges; it costs a start, memory, and exchanges that one process need not make.
`lte train` asks before it simulates. The constants were fitted to measurements (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

START_S = 4.0
"""Processor seconds that a further process takes to start: Python, torch, the network."""
WORTH = 1.5
"""Least seconds saved for each second of starting."""
SERIAL_SHARE = 0.2
"""Share of a small network's step that further threads do not shorten."""
LARGE_STEP_S = 0.5
"""Seconds of one device's step on one core from which on threads share it nearly evenly."""
LOOPBACK_BYTES_PER_S = 0.5e9
"""Bytes that a process sends, receives and adds in a second by gloo on loopback."""
MESSAGE_S = 0.5e-3
"""Seconds of the shortest exchange, in which processes also wait for each other."""


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
    """Seconds of one device's step on all cores."""
    sent_bytes: float
    """Bytes that one device sends in a step, on average."""
    messages: float
    """Exchanges in a step, on average."""


def split_of(processes: int, cores: int) -> Split:
    """Return a split whose processes together use each core once."""
    return Split(processes, max(1, cores // processes))


def choose_split(work: Work, cores: int, is_possible: Callable[[int], bool]) -> Split:
    """Return the fastest split, the one of fewest processes among equals; `is_possible` says which counts are."""
    counts = [processes for processes in range(2, min(work.devices, cores) + 1) if is_possible(processes)]
    return min((split_of(processes, cores) for processes in (1, *counts)), key=lambda s: run_s(work, cores, s))


def run_s(work: Work, cores: int, split: Split) -> float:
    """Return the predicted seconds of the steps that are left, with the start of further processes."""
    if split.processes == 1:
        return work.steps * work.devices * work.step_s
    serial = serial_share(work.step_s, cores)
    largest = -(-work.devices // split.processes)
    of_device = work.step_s * _time_share(serial, split.threads) / _time_share(serial, cores)
    exchange_s = work.messages * MESSAGE_S + work.sent_bytes / LOOPBACK_BYTES_PER_S
    # The started processes import torch at the same time, each on a core of its own.
    return work.steps * (largest * of_device + exchange_s) + WORTH * START_S


def serial_share(step_s: float, cores: int) -> float:
    """Return the share of a step that threads do not shorten, from the seconds that it takes on all cores."""
    return SERIAL_SHARE * max(0.0, 1 - step_s * cores / LARGE_STEP_S)


def _time_share(serial: float, threads: int) -> float:
    """Return the time with so many threads as a share of that with one (Amdahl)."""
    return serial + (1 - serial) / threads
