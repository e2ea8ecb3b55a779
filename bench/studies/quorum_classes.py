"""Measure seconds to a loss where devices are unequal and links slow: with batches for each, without waiting, and both.

    python bench/studies/quorum_classes.py --data tinyshakespeare.txt

Four devices, one of them five times slower, each with 20 Mbit/s and 20 ms: a small GPT, trained with LTE in a
simulation whose clock takes seconds of compute from the profile and of exchanges from the messages really made. A
device has a part of a Raspberry Pi's speed, so that a round computes for longer than it exchanges, as of a far larger
network. The learning rate is the same throughout a run, so that a curve does not depend on how long its run is planned
to be.

docs/mixed.md has what was measured.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from pace import profile_of
from training import Trained, train_table

from simulate.config.hardware import Profile
from simulate.config.run import build_run
from simulate.costs.step_time import device_step_s

SLOWER, WEAKER = 5, 60
MODEL = {"name": "gpt", "layers": 2, "width": 32, "attention_heads": 2, "context": 32, "vocab": 256}
BYTES_PER_S, LATENCY_S = 20e6 / 8, 0.02
FAST, SLOW = 3, 1
"""Devices of each kind, in the profile's order."""
RATE = 1e-2
RECOVER_EVERY = 20
"""Merges between recovery points, as a plan spaces them; at every merge their writing would be a third of the time."""


@dataclass(frozen=True)
class Way:
    """Keys of one way to train, and the steps that are enough for it."""

    name: str
    steps: int
    method: dict[str, Any]
    cluster: dict[str, Any]


def classes_of(fast: int, slow: int) -> list[dict[str, int]]:
    """Return [[cluster.class]] with so many samples a step of the fast devices and of the slow one."""
    return [{"devices": FAST, "micro_batch": fast}, {"devices": SLOW, "micro_batch": slow}]


INT8 = {"wire": "int8"}
WAYS = (
    Way("lockstep", 300, {}, {}),
    Way("a batch for each: 20 and 4", 300, {}, {"class": classes_of(20, 4)}),
    Way("deadline", 400, {"pace": "deadline"}, {}),
    Way("quorum of 3", 400, {}, {"quorum": 3}),
    Way("quorum of 3, a batch for each: 8 and 2", 400, {}, {"quorum": 3, "class": classes_of(8, 2)}),
    Way("quorum of 3, int8", 400, INT8, {"quorum": 3}),
    Way("quorum of 3, a batch for each: 8 and 2, int8", 400, INT8, {"quorum": 3, "class": classes_of(8, 2)}),
)


def home_profile() -> Profile:
    """Return the profile: three devices and a slower one, at homes with slow links."""
    profile = profile_of(SLOWER)
    devices = [
        device.model_copy(
            update={
                "flop_per_s": type(device.flop_per_s)(
                    **{key: value and value / WEAKER for key, value in device.flop_per_s.model_dump().items()}
                ),
                "memory_bytes_per_s": device.memory_bytes_per_s / WEAKER,
            }
        )
        for device in profile.device
    ]
    link = profile.link.model_copy(
        update={"up_bytes_per_s": BYTES_PER_S, "down_bytes_per_s": BYTES_PER_S, "latency_s": LATENCY_S}
    )
    return profile.model_copy(update={"device": devices, "link": link})


def table_of(way: Way, data: str, seed: int) -> dict[str, Any]:
    """Return a run's table."""
    train = {
        "steps": way.steps, "micro_batch": 4, "learning_rate": RATE, "warmup_steps": 20, "seed": seed,
        "schedule": "constant", "evaluate_every": 20, "evaluate_samples": 128,
    }  # fmt: skip
    method = {"name": "lte", "rank": 16, "heads_per_device": 1, "merge_every": 10, **way.method}
    cluster = {"devices": FAST + SLOW, "recover_every": RECOVER_EVERY, **way.cluster}
    return {"model": MODEL, "data": {"path": data}, "method": method, "train": train, "cluster": cluster}


def seconds_to(run: Trained, loss: float) -> float | None:
    """Return the simulated seconds of training until the loss, between two evaluations by interpolation."""
    before = None
    for now in run.seconds:
        if now[1] <= loss:
            if before is None:
                return now[0]
            share = (before[1] - loss) / (before[1] - now[1])
            return before[0] + share * (now[0] - before[0])
        before = now
    return None


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--loss", type=float, default=2.7)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS], choices=[way.name for way in WAYS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    profile = home_profile()
    print("| way | samples a step | step, fast and slow | bytes a device and round | s to the loss, each seed | mean |")
    print("|---|---|---|---|---|---|")
    for way in (way for way in WAYS if way.name in arguments.ways):
        tables = [table_of(way, arguments.data, seed) for seed in range(arguments.seeds)]
        run = build_run(tables[0])
        step_s = device_step_s(run, run.shape(), profile.devices(run.cluster.devices))
        trained = [train_table(table, profile) for table in tables]
        best = [seconds_to(one, arguments.loss) or float("nan") for one in trained]
        sent_bytes = trained[0].sent_bytes_per_device / -(-way.steps // 10)
        each = ", ".join(f"{seconds:.0f}" for seconds in best)
        print(
            f"| {way.name} | {run.samples_per_step} | {step_s[0] * 1e3:.0f} and {step_s[-1] * 1e3:.0f} ms | "
            f"{sent_bytes / 1e3:.0f} kB | {each} | {statistics.mean(best):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
