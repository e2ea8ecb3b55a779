"""Simulated rounds of 10,000 devices: two queues of moments beside a heap of events and SimPy's processes.

    python -m bench.studies.timeline                    # pip install simpy
    python -m bench.studies.timeline --devices 1000 --rounds 3

Each round, every device computes for a time of its own, pushes to a server whose link all share, and waits for all.
SimPy gets a process for each device and one for the link, which goes from event to event as ours does. All are timed
by processor time, and must agree on every moment. It is why simulate.timeline has queues of its own and no library;
docs/planning.md has the figures.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import simpy

from simulate.rules.jitter import slowness
from simulate.timeline.shared_link import shared_ends

STEP_S, JITTER, PAYLOAD_BYTES, OWN, WHOLE = 10.0, 0.3, 4e6, 1e6, 125e6


def compute_s(devices: int, index: int) -> np.ndarray[Any, Any]:
    """Return what each device computes in a round."""
    ids_N = np.arange(devices)
    return STEP_S * slowness(0, ids_N, index, np.ones(devices), np.full(devices, JITTER))


def ours(devices: int, rounds: int) -> list[float]:
    """Return the ends of rounds by simulate.timeline."""
    now_s, ends = 0.0, []
    for index in range(rounds):
        now_s = float(shared_ends(now_s + compute_s(devices, index), PAYLOAD_BYTES, OWN, WHOLE).max())
        ends.append(now_s)
    return ends


def with_heap(devices: int, rounds: int) -> list[float]:
    """Return them by a general list of events, a heap: what transfers of unequal size would need."""
    now_s, ends = 0.0, []
    for index in range(rounds):
        events = [(float(moment), device) for device, moment in enumerate(now_s + compute_s(devices, index))]
        heapq.heapify(events)
        goals: list[tuple[float, int]] = []
        served, now_s = 0.0, events[0][0]
        while events or goals:
            rate = min(OWN, WHOLE / len(goals)) if goals else 0.0
            end_s = now_s + (goals[0][0] - served) / rate if goals else float("inf")
            if events and events[0][0] <= end_s:
                moment, device = heapq.heappop(events)
                served += rate * (moment - now_s)
                now_s = moment
                heapq.heappush(goals, (served + PAYLOAD_BYTES, device))
            else:
                served, now_s = heapq.heappop(goals)[0], end_s
        ends.append(now_s)
    return ends


class SharedLink:
    """A link that SimPy's processes share; one of its own wakes whoever is through."""

    def __init__(self, environment: simpy.Environment) -> None:
        self.environment = environment
        self.waiting: list[tuple[float, int, simpy.Event]] = []
        self.served, self.since_s, self.number = 0.0, 0.0, 0
        self.process = environment.process(self.serve())

    def _rate(self) -> float:
        return min(OWN, WHOLE / len(self.waiting)) if self.waiting else 0.0

    def _catch_up(self) -> None:
        self.served += self._rate() * (self.environment.now - self.since_s)
        self.since_s = self.environment.now

    def send(self) -> simpy.Event:
        """Return an event that happens when a payload is through."""
        self._catch_up()
        done = self.environment.event()
        self.number += 1
        heapq.heappush(self.waiting, (self.served + PAYLOAD_BYTES, self.number, done))
        self.process.interrupt()
        return done

    def serve(self) -> Iterator[simpy.Event]:
        """Wait for the next to be through; start again whenever somebody joins."""
        while True:
            try:
                if not self.waiting:
                    yield self.environment.event()
                left_s = (self.waiting[0][0] - self.served) / self._rate()
                yield self.environment.timeout(max(0.0, left_s))
                self._catch_up()
                heapq.heappop(self.waiting)[2].succeed()
            except simpy.Interrupt:
                continue


def with_simpy(devices: int, rounds: int) -> list[float]:
    """Return the ends of rounds by SimPy."""
    environment, ends = simpy.Environment(), []
    link = SharedLink(environment)

    def device(seconds: float) -> Iterator[simpy.Event]:
        yield environment.timeout(seconds)
        yield link.send()

    def run() -> Iterator[simpy.Event]:
        for index in range(rounds):
            yield environment.all_of([environment.process(device(float(s))) for s in compute_s(devices, index)])
            ends.append(environment.now)

    environment.run(environment.process(run()))
    return ends


def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    reference: list[float] = []
    ways: dict[str, Callable[[int, int], list[float]]] = {"two queues": ours, "heap": with_heap, "simpy": with_simpy}
    for name, simulate in ways.items():
        started_s = time.process_time()
        ends = simulate(arguments.devices, arguments.rounds)
        seconds = (time.process_time() - started_s) / arguments.rounds
        # The first way is ours, and the others must agree with it.
        reference = reference or ends
        apart = max(abs(a - b) / a for a, b in zip(reference, ends, strict=True))
        print(f"{name}: {seconds * 1e3:.1f} ms of processor time a round; ends of rounds apart by {apart:.1e}")


if __name__ == "__main__":
    main()
