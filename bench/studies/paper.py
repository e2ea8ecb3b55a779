"""The paper's small studies (arXiv 2402.16828): least squares on one matrix, and sweeps of heads, rank, T and alpha.

    python bench/studies/paper.py least-squares
    python bench/studies/paper.py heads-rank --data tinyshakespeare.txt [--heads 4 --steps 100]
    python bench/studies/paper.py merge-every --data tinyshakespeare.txt
    python bench/studies/paper.py alpha --data tinyshakespeare.txt

Each prints a Markdown table. Every device has its own data; all runs of a table see equally many samples. They repeat
the paper's claims on a small scale, for docs/results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from training import CPU, train_table

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.seeding import address
from simulate.config.run import build_run
from simulate.methods.base import Method
from simulate.methods.registry import build_method

SIDE, SAMPLES, STEPS, RATE = 64, 128, 600, 0.02
"""Settings of the least squares: W* is 64 x 64; 128 samples a step over all devices."""
RANK = 4
TOTAL_BATCH, TEXT_STEPS, TEXT_RATE, ADAPTED_WIDTH = 32, 200, 6e-3, 128


def least_squares(arguments: argparse.Namespace) -> Iterator[str]:
    """min over W of mean |x·Wᵀ − x·W*ᵀ|², with W* of full rank, from W = 0."""
    yield f"| method, {STEPS} steps | \\|W − W*\\| / \\|W*\\| | rank of W |"
    yield "|---|---|---|"
    methods: dict[str, tuple[int, dict[str, Any]]] = {
        "dense": (1, {"name": "ddp"}),
        f"one LoRA of rank {RANK}": (1, {"name": "lora", "rank": RANK, "alpha": float(RANK)}),
    }
    for heads in (2, 4, 16):
        options = {"name": "lte", "rank": RANK, "alpha": float(RANK)}
        methods[f"LTE, {heads} heads of rank {RANK}, T = 10"] = (heads, {**options, "reset": "none"})
        drawn_anew = {**options, "reset": "ab", "frozen_a": False}
        methods[f"LTE, {heads} heads of rank {RANK}, T = 10, reset ab"] = (heads, drawn_anew)
    target = draw(0, "target", SIDE, SIDE) / SIDE**0.5
    for name, (devices, options) in methods.items():
        found = solved(devices, options, target)
        error = float((found - target).norm() / target.norm())
        yield f"| {name} | {error:.4f} | {int(torch.linalg.matrix_rank(found, rtol=1e-3))} |"


def draw(seed: int, purpose: str, *shape: int) -> Tensor:
    """Return normal numbers with an address."""
    random = torch.Generator().manual_seed(address(seed, purpose))
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def solved(devices: int, options: dict[str, Any], target_OI: Tensor) -> Tensor:
    """Return W after training."""
    layer = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    sizes = {"width": SIDE, "attention_heads": 1, "layers": 1}
    train = {
        "steps": STEPS,
        "micro_batch": SAMPLES // devices,
        "learning_rate": RATE,
        "dtype": "fp64",
        "clip_norm": 1e9,
    }
    run = build_run({"model": sizes, "method": options, "train": train, "cluster": {"devices": devices}})
    method = build_method(run, VirtualCommunicator(devices), CPU, nn.Sequential(layer))
    # Methods compute losses over classes; least squares needs another.
    method.loss.row_losses = squared_errors  # type: ignore[method-assign]
    for step in range(STEPS):
        inputs = draw(step, "inputs", SAMPLES, SIDE)
        method.step(inputs, inputs @ target_OI.t(), step)
        if method.merge_due(step):
            method.merge(step)
    return merged(method)


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of each row."""
    return (outputs - targets).square().mean(1)


def merged(method: Method) -> Tensor:
    """Return the one matrix there is."""
    (weight,) = method.merged_state().values()
    return weight


def text_loss(data: str, devices: int, steps: int = TEXT_STEPS, **method: Any) -> str:
    """Return the validation loss of a short run on text, TOTAL_BATCH samples a step."""
    trained = train_table(
        {
            "model": {"context": 64},
            "data": {"path": data},
            "method": {"name": "lte", **method},
            "train": {
                "steps": steps,
                "micro_batch": TOTAL_BATCH // devices,
                "learning_rate": TEXT_RATE,
                "warmup_steps": steps // 20,
                "evaluate_every": steps,
                "evaluate_samples": 256,
                "checkpoint_every": steps,
            },
            "cluster": {"devices": devices},
        }
    )
    return "diverged" if trained.val_loss is None else f"{trained.val_loss:.4f}"


def heads_rank(arguments: argparse.Namespace) -> Iterator[str]:
    """Heads H, one a device, against rank r; the network is 128 wide."""
    ranks = (4, 8, 16, 32, 64)
    yield "| heads | " + " | ".join(f"r = {rank}" for rank in ranks) + " |"
    yield "|---|" + "---|" * len(ranks)
    for heads in arguments.heads:
        losses = (text_loss(arguments.data, heads, arguments.steps, rank=rank, reset="none") for rank in ranks)
        yield f"| {heads} | " + " | ".join(losses) + " |"


def merge_every(arguments: argparse.Namespace) -> Iterator[str]:
    """Steps T between merges, 4 heads of rank 32."""
    kinds = {"frozen A": {}, "reset-less": {"reset": "none"}, "reset ab": {"reset": "ab", "frozen_a": False}}
    yield f"| T | {' | '.join(kinds)} |"
    yield "|---|" + "---|" * len(kinds)
    for steps in (1, 5, 10, 25, 50, 100):
        losses = (text_loss(arguments.data, 4, merge_every=steps, **options) for options in kinds.values())
        yield f"| {steps} | " + " | ".join(losses) + " |"


def alpha(arguments: argparse.Namespace) -> Iterator[str]:
    """Scale s = alpha / r, 4 heads of rank 32, with the adapters' learning rate norm-matched and as at s = 64."""
    yield "| alpha | s | learning rate / s | learning rate / 64 |"
    yield "|---|---|---|---|"
    for scale in (4, 16, 64, 256):
        fixed = text_loss(arguments.data, 4, alpha=32.0 * scale, adapter_learning_rate=TEXT_RATE / 64)
        yield f"| {32 * scale} | {scale} | {text_loss(arguments.data, 4, alpha=32.0 * scale)} | {fixed} |"


STUDIES: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "least-squares": least_squares,
    "heads-rank": heads_rank,
    "merge-every": merge_every,
    "alpha": alpha,
}


def main() -> None:
    """Parse, run, print line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--data", help="UTF-8 text file, for all but least-squares")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8], help="of heads-rank")
    parser.add_argument("--steps", type=int, default=TEXT_STEPS, help="of heads-rank")
    arguments = parser.parse_args()
    if arguments.data is None and arguments.study != "least-squares":
        parser.error(f"{arguments.study} needs --data")
    for line in STUDIES[arguments.study](arguments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
