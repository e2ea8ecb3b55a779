"""Three fast devices and a slow one: what lockstep, a deadline, and leaving the slow one at home make of the same time.

    python bench/studies/pace.py

A small GPT on the standard library's source. Lockstep takes `--steps` steps; the others take as many as the simulated
clock gives them in the same seconds. Each is trained at three learning rates, its schedule over its own steps, and
shown at the best, for each of `--seeds` seeds. docs/methods.md advises on `pace` by it.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from training import Trained, train_table

from simulate.config.hardware import Device, Profile
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.step_time import round_time

SLOWER = 5
RATES = (2e-3, 5e-3, 1e-2)
MODEL = {"name": "gpt", "layers": 2, "width": 64, "attention_heads": 4, "context": 64, "vocab": 256}
METHODS: dict[str, dict[str, Any]] = {
    "lte, frozen A": {"name": "lte", "rank": 16, "heads_per_device": 1},
    "lte, reset b": {"name": "lte", "rank": 16, "heads_per_device": 1, "frozen_a": False},
    "local-sgd": {"name": "local-sgd"},
    "diloco": {"name": "diloco"},
}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "lockstep": (4, {}),
    "deadline": (4, {"pace": "deadline"}),
    "three fast ones alone": (3, {}),
}
"""Devices, and the method's keys."""


def profile_of(slower: float) -> Profile:
    """Return four of a shipped profile's devices, the last one slower."""
    profile = load_profile("raspberry_x8")
    fast = profile.device[0].model_copy(update={"count": 3})
    rates = {key: value and value / slower for key, value in fast.flop_per_s.model_dump().items()}
    figures = {
        **fast.model_dump(), "count": 1, "kind": f"{slower:g}x slower", "flop_per_s": rates,
        "memory_bytes_per_s": fast.memory_bytes_per_s / slower,
    }  # fmt: skip
    return profile.model_copy(update={"device": [fast, Device.model_validate(figures)]})


def table_of(devices: int, method: dict[str, Any], steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Return a run's table."""
    train = {
        "steps": steps, "micro_batch": 4, "learning_rate": rate, "warmup_steps": steps // 20, "seed": seed,
        "evaluate_every": steps, "evaluate_samples": 128,
    }  # fmt: skip
    return {
        "model": MODEL, "data": {"name": "stdlib"}, "method": {"merge_every": 10, **method}, "train": train,
        "cluster": {"devices": devices},
    }  # fmt: skip


def seconds_of(run: Run, profile: Profile) -> float:
    """Return the seconds of one of a run's rounds."""
    return round_time(run, run.model.shape(), profile.devices(run.cluster.devices), profile.link).round_s


def best_of(devices: int, method: dict[str, Any], steps: int, profile: Profile, seed: int) -> Trained:
    """Return the run at the rate that ends best."""
    runs = [train_table(table_of(devices, method, steps, rate, seed), profile) for rate in RATES]
    # A diverged run counts as the worst.
    return min(runs, key=lambda run: run.val_loss or float("inf"))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    profile = profile_of(SLOWER)
    print("| method | pace | steps | simulated | samples | validation loss |\n|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        rounds_s = {
            way: seconds_of(build_run(table_of(devices, {**method, **keys}, 80, 1e-3, 0)), profile)
            for way, (devices, keys) in WAYS.items()
        }
        for way, (devices, keys) in WAYS.items():
            # Equal simulated seconds for all, so a faster round gives more of them.
            rounds = round(arguments.steps / 10 * rounds_s["lockstep"] / rounds_s[way])
            runs = [best_of(devices, {**method, **keys}, rounds * 10, profile, seed) for seed in range(arguments.seeds)]
            losses = [run.val_loss for run in runs if run.val_loss is not None]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            mean = f"{statistics.mean(losses):.3f}{spread}" if losses else "diverged"
            print(
                f"| {name} | {way} | {rounds * 10} | {runs[0].simulated_s:.1f} s | {runs[0].samples:,} | {mean} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
