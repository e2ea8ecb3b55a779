"""Measure the gap between a launched run and its simulation after 60 steps: none in float64, rounding in float32.

python -m bench.studies.worlds --dtype fp32 fp64 --processes 4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from simulate.config.run import build_run
from tests import tiny
from tests.processes import DEVICES, train_in_processes, variant_table

STEPS = 60


def gaps(name: str, launched: tiny.History, dtype: str) -> tuple[float, float]:
    """Return the largest relative gap of a loss, and of a weight tensor by its norm."""
    run = build_run(tiny.variant_run(name, DEVICES, train=variant_table(STEPS, dtype)).model_dump())
    simulated = tiny.train(tiny.build(run))
    loss = ((launched.losses - simulated.losses.double()).abs() / simulated.losses).max()
    weights = (
        (launched.weights[key] - weight).norm() / weight.norm()
        for key, weight in simulated.weights.items()
        if weight.norm() > 0
    )
    return float(loss), float(max(weights))


def main() -> None:
    """Print a table, a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "fp64"), default=["fp32", "fp64"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--variants", nargs="+", default=list(tiny.VARIANTS), choices=list(tiny.VARIANTS))
    arguments = parser.parse_args()
    print("| method | dtype | loss gap | weight gap |\n|---|---|---|---|")
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory() as folder:
            launched = train_in_processes(Path(folder), arguments.variants, arguments.processes, STEPS, dtype)
            for name, (history, _) in launched.items():
                loss, weight = gaps(name, history, dtype)
                print(f"| {name} | {dtype} | {loss:.1e} | {weight:.1e} |", flush=True)


if __name__ == "__main__":
    main()
