"""Launched runs with uneven steps: measured beside the closed form and the timeline that draws them.

    python -m bench.studies.jitter                                   # needs root, `ip` and `tc`

Two nodes, a core each, and on each core a neighbour that computes in bursts. How long steps take there, and how much
they differ, is read off runs of one device alone; then both nodes train together, with PowerSGD, which exchanges a
little at every step, so that both wait for whoever was disturbed. The closed form knows the mean step; the timeline
draws each device's. It shows when a plan needs `--timeline`; bench/README.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.studies.links import LinkSetting, guessed_node, launch, planned_step_s, run_table, write_profile
from simulate.config.run import build_run, dump_run
from simulate.costs.step_time import device_step_s
from simulate.timeline.engine import simulate
from tests.network.lab import Lab, why_not

NODES, MBIT, SKIPPED = 2, 1000.0, 3
CASE = "powersgd rank 4"
BURST_S, CALM_S = 0.6, 0.9
"""Means of a neighbour's bursts and of the calm between them, exponentially distributed."""


def disturb(seed: int) -> None:
    """Compute in bursts until somebody ends this process."""
    draws = random.Random(seed)
    while True:
        until = time.monotonic() + draws.expovariate(1 / BURST_S)
        # It spins, since a neighbour that sleeps would leave its core to the run.
        while time.monotonic() < until:
            pass
        time.sleep(draws.expovariate(1 / CALM_S))


@contextmanager
def neighbours(cores: list[int]) -> Iterator[None]:
    """Keep a neighbour on every core."""
    command = [sys.executable, "-m", "bench.studies.jitter", "--disturb"]
    started = [
        subprocess.Popen(["taskset", "-c", str(core), *command, str(index)], cwd=Path(__file__).parents[2])
        for index, core in enumerate(cores)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def alone(folder: Path, table: dict[str, Any], cores: list[int]) -> list[float]:
    """Return the seconds of steps of one device, one run on each core at once."""
    run_file = folder / "alone.toml"
    table = {**table, "cluster": {**table["cluster"], "devices": 1, "profile": "local"}}
    run_file.write_text(dump_run(build_run(table)), encoding="utf-8")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    train = [sys.executable, "-m", "ltecli", "train", str(run_file), "--quiet", "--out"]
    started = [
        subprocess.Popen(["taskset", "-c", str(core), *train, str(folder / f"alone{core}")], env=environment, cwd=root)
        for core in cores
    ]
    ended = [process.wait() for process in started]
    if any(ended):
        raise SystemExit("a run alone failed")
    seconds = []
    for core in cores:
        lines = (folder / f"alone{core}" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        seconds += step_seconds([json.loads(line) for line in lines])
    return seconds


def step_seconds(events: list[dict[str, Any]]) -> list[float]:
    """Return what each step took, but for the first."""
    ends = [event["wall_s"] for event in events if event["kind"] == "step"]
    # The first steps still load kernels and allocate.
    return [after - before for before, after in pairwise(ends[SKIPPED:])]


def main() -> None:
    """Parse, then measure; or be a neighbour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", help="UTF-8 text file; default: the standard library's source")
    parser.add_argument("--disturb", type=int, metavar="SEED", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.disturb is not None:
        disturb(arguments.disturb)
    if reason := why_not():
        raise SystemExit(reason)
    setting, cores = LinkSetting(NODES, 0.0, arguments.data), sorted(os.sched_getaffinity(0))[:NODES]
    with tempfile.TemporaryDirectory() as name, neighbours(cores):
        folder = Path(name)
        table = run_table(CASE, folder / "lab.toml", arguments.steps, setting)
        taken = alone(folder, table, cores)
        mean_s = statistics.mean(taken)
        profile = write_profile(folder / "lab.toml", guessed_node(1e10), MBIT, setting)
        run, flop_per_s, jitter = build_run(table), 1e10, statistics.stdev(taken) / mean_s
        for _ in range(20):  # until the planned step is the mean one; part of it goes by the memory's rate
            flop_per_s *= device_step_s(run, run.model.shape(), profile.devices(1))[0] / mean_s
            node = {**guessed_node(flop_per_s), "step_jitter": jitter}
            profile = write_profile(folder / "lab.toml", node, MBIT, setting)
        with Lab(NODES, bytes_per_s=MBIT * 1e6 / 8) as lab:
            measured_s = statistics.mean(step_seconds(launch(lab, folder, table, setting)))
    drawn_s = simulate(run, profile.devices(NODES), profile.link).round_s
    closed_s = planned_step_s(run, profile)
    print(f"alone: {mean_s:.3f} s a step, deviation {jitter:.2f} of it; together, {arguments.steps} steps:")
    print("| | seconds a step | measured over it |")
    print("|---|---|---|")
    print(f"| measured | {measured_s:.3f} | |")
    for label, seconds in (("closed form", closed_s), ("timeline", drawn_s)):
        print(f"| {label} | {seconds:.3f} | {measured_s / seconds:.2f} |")


if __name__ == "__main__":
    main()
