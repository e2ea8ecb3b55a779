"""Cost of simulating N devices over simulating one, at the same total batch; paired steps, medians of ratios.

python bench/devices.py --pairs 12
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import build_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.methods.base import Method
from simulate.methods.registry import build_method

TOTAL_BATCH = 32
DEVICES = (1, 4, 16)


def prepare(method: str, devices: int, rank: int) -> tuple[Method, TextBatches]:
    """Return a method with its data, TOTAL_BATCH samples a step over all devices."""
    options = {"name": method} if method == "ddp" else {"name": method, "rank": rank}
    run = build_run(
        {
            "method": options,
            "train": {"steps": 10**6, "micro_batch": TOTAL_BATCH // devices},
            "cluster": {"devices": devices},
        }
    )
    communicator = VirtualCommunicator(devices)
    text = load_text(run.data)
    batches = TextBatches.of(run, text)
    return build_method(run, communicator, torch.device("cpu")), batches


def step_s(method: Method, batches: TextBatches, step: int) -> float:
    """Take one step, and the merge where it is due; return its seconds."""
    inputs, targets = batches.batch(step, range(batches.devices))
    start = time.perf_counter()
    method.step(inputs, targets, step)
    if method.merge_due(step):
        method.merge(step)
    return time.perf_counter() - start


def main() -> None:
    """Interleave the steps of all N, so that whatever else the machine does hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="paired steps; whole rounds of 10 include merges fairly")
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    for name in ("lte", "ddp"):
        parts = {devices: prepare(name, devices, arguments.rank) for devices in DEVICES}
        seconds: dict[int, list[float]] = {devices: [] for devices in DEVICES}
        # The first two steps allocate the optimizers' states and are not counted.
        for step in range(arguments.pairs + 2):
            for devices, (method, batches) in parts.items():
                seconds[devices].append(step_s(method, batches, step))
        for devices in DEVICES[1:]:
            ratios = [n / one for n, one in zip(seconds[devices][2:], seconds[1][2:], strict=True)]
            # The median hides merges, which take one step in ten, so the mean is printed too.
            mean = sum(seconds[devices][2:]) / sum(seconds[1][2:])
            print(
                f"{name}: {devices} devices over 1, total batch {TOTAL_BATCH}: "
                f"median step {statistics.median(ratios):.2f}x, all steps with merges {mean:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
