"""Does LTE train as well as dense? Validation losses after equal tokens, for each method's learning rates.

    python bench/convergence.py --data tinyshakespeare.txt --steps 300 --rates 1e-3 3e-3 6e-3 1e-2

Prints one line a run and the best of each method; every device trains on its own shard, batch and order are equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from simulate.clock import SimulatedClock
from simulate.communicator import VirtualCommunicator
from simulate.config import build_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.hardware import load_profile
from simulate.loop import Session, train
from simulate.methods import build_method

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "ddp"},
    "lte, reset-less": {"name": "lte"},
    "lte, reset b": {"name": "lte", "reset": "b"},
}


def final_loss(method: dict[str, Any], rate: float, arguments: argparse.Namespace) -> float:
    """Train one run and return its validation loss."""
    run = build_run(
        {
            "data": {"path": arguments.data},
            "method": method,
            "train": {
                "steps": arguments.steps,
                "learning_rate": rate,
                "warmup_steps": arguments.steps // 20,
                "evaluate_every": arguments.steps,
                "checkpoint_every": arguments.steps,
                "micro_batch": 8,
            },
            "cluster": {"devices": 4},
        }
    )
    profile, text = load_profile("gtx1080ti_x8"), load_text(run.data)
    clock = SimulatedClock(run, profile.devices(4), profile.link)
    communicator = VirtualCommunicator(4, clock.charge_transfer, clock.wait)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            run=run,
            method=build_method(run, communicator, torch.device("cpu")),
            batches=TextBatches.of(run, text),
            communicator=communicator,
            clock=clock,
            emit=lambda event: None,
            checkpoints=Path(folder),
            device=torch.device("cpu"),
        )
        train(session)
    assert session.val_loss is not None
    return session.val_loss


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="UTF-8 text file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--merge-every", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3, 1e-2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    best: dict[str, dict[str, float]] = {}
    for name in arguments.methods:
        method = METHODS[name]
        if method["name"] == "lte":
            method = {**method, "rank": arguments.rank, "merge_every": arguments.merge_every}
        losses = {}
        for rate in arguments.rates:
            losses[rate] = final_loss(method, rate, arguments)
            print(
                f"{name}: learning rate {rate:g}, {arguments.steps} steps: validation loss {losses[rate]:.4f}",
                flush=True,
            )
        rate = min(losses, key=lambda r: losses[r])
        best[name] = {"learning_rate": rate, "val_loss": losses[rate]}
    print(json.dumps(best, indent=1))


if __name__ == "__main__":
    main()
