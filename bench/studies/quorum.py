"""Measure the cost of late changes: four devices, one five times slower or away at times, by who takes part in merges.

    python bench/studies/quorum.py

A small GPT on the standard library's source, merged every ten steps. All ways but lockstep take equally many steps, in
rounds of what a fast device needs for ten, so they take equal simulated seconds; lockstep takes as many as fit into
those. `away` and `late` train on equal samples: the fourth device's ten steps count for every fifth merge, taken on the
newest weights or on ones that are four merges old. docs/methods.md has what was measured.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from pace import profile_of
from training import train_table

MODEL = {"name": "gpt", "layers": 2, "width": 32, "attention_heads": 2, "context": 32, "vocab": 256}
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 16, "heads_per_device": 1},
    "diloco": {"name": "diloco"},
    "local-sgd": {"name": "local-sgd"},
}
LATE = [[10, 10, 10, 0]] * 4 + [[10, 10, 10, 10]]
AWAY = [[10, 10, 10, -1]] * 4 + [[10, 10, 10, 10]]
MISSING = [[10, 10, 10, 10], [10, 10, 10, 0]]
WAYS: dict[str, dict[str, Any]] = {
    "lockstep": {"devices": 4},
    "three alone": {"devices": 3},
    "deadline": {"devices": 4, "merges_given": [[10, 10, 10, 2]]},
    "away 4 of 5": {"devices": 4, "merges_given": AWAY},
    "late by 4, p = 0": {"devices": 4, "merges_given": LATE, "age_exponent": 0.0},
    "late by 4, p = 0.5": {"devices": 4, "merges_given": LATE, "age_exponent": 0.5},
    "late by 4, p = 1": {"devices": 4, "merges_given": LATE, "age_exponent": 1.0},
    "late by 1, p = 0": {"devices": 4, "merges_given": MISSING, "age_exponent": 0.0},
    "late by 1, p = 0.5": {"devices": 4, "merges_given": MISSING, "age_exponent": 0.5},
    "away 1 of 2": {"devices": 4, "merges_given": [[10, 10, 10, 10], [10, 10, 10, -1]]},
    "all": {"devices": 4, "merges_given": [[10, 10, 10, 10]]},
}
"""Keys of [cluster]."""
RATES = (5e-3,)
SHORT_RATES = (2e-3, 5e-3, 1e-2)
SLOWER = 5


def table_of(method: dict[str, Any], cluster: dict[str, Any], steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Return a run's table."""
    train = {
        "steps": steps, "micro_batch": 4, "learning_rate": rate, "warmup_steps": steps // 20, "seed": seed,
        "evaluate_every": steps, "evaluate_samples": 128,
    }  # fmt: skip
    return {
        "model": MODEL, "data": {"name": "stdlib"}, "method": {"merge_every": 10, **method}, "train": train,
        "cluster": cluster,
    }  # fmt: skip


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    profile = profile_of(SLOWER)
    print("| method | who takes part | steps | samples | validation loss, each seed | mean |")
    print("|---|---|---|---|---|---|")
    for name in arguments.methods:
        for way in arguments.ways:
            cluster = WAYS[way]
            is_short = way == "lockstep"
            steps, rates = (arguments.steps // SLOWER, SHORT_RATES) if is_short else (arguments.steps, RATES)
            best = []
            for seed in range(arguments.seeds):
                runs = [train_table(table_of(METHODS[name], cluster, steps, rate, seed), profile) for rate in rates]
                best.append(min(runs, key=lambda run: run.val_loss or float("inf")))
            losses = [run.val_loss or float("nan") for run in best]
            each = ", ".join(f"{loss:.3f}" for loss in losses)
            print(
                f"| {name} | {way} | {steps} | {best[0].samples:,} | {each} | {statistics.mean(losses):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
