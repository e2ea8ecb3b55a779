"""Planned memory against the allocator's peak, over random shapes that no constant was fitted to.

python bench/memory.py --shapes 24 --seed 3
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch

from simulate.accuracy import ROOMY
from simulate.config import Run, build_run
from simulate.costs.memory import peak_memory
from simulate.measure import measure_memory_bytes


def random_model(draw: random.Random, family: str) -> dict[str, Any]:
    """Return a network whose every size is drawn."""
    heads = draw.choice([2, 4, 8])
    sizes: dict[str, Any] = {"layers": draw.choice([2, 3, 4, 6, 8]), "width": heads * draw.choice([16, 32, 48, 64])}
    if family in ("gpt", "llama"):
        sizes |= {"context": draw.choice([32, 64, 128, 256]), "vocab": draw.choice([256, 1024, 4096])}
    else:
        patch = draw.choice([4, 8])
        sizes |= {"patch": patch, "image": patch * draw.choice([4, 6, 8]), "classes": draw.choice([10, 100, 1000])}
    if family != "mixer":
        sizes["attention_heads"] = heads
    if family == "llama":
        sizes["mlp_width"] = sizes["width"] * draw.choice([2, 3]) + draw.choice([0, 8])
    if family == "mixer":
        sizes |= {"tokens_width": draw.choice([32, 64, 128]), "channels_width": sizes["width"] * draw.choice([2, 4])}
    return {"name": {"mixer": "mixer_s16"}.get(family, family), **sizes}


def random_run(draw: random.Random, family: str, autocast: str = "none") -> Run:
    """Return a run whose every size is drawn."""
    model, heads = random_model(draw, family), draw.choice([1, 1, 2])
    method: dict[str, Any] = {"name": "ddp"}
    if draw.random() < 0.7:
        method = {
            "name": "lte",
            "rank": draw.choice([4, 8, 16]),
            "heads_per_device": heads,
            "merge_transport": draw.choice(["gather", "reduce", "server"]),
            "reset": draw.choice(["none", "b", "ab"]),
        }
    train = {
        "steps": 100,
        "micro_batch": heads * draw.choice([1, 2, 4, 8]),
        "activation_checkpointing": draw.random() < 0.4,
        "autocast": autocast,
    }
    return build_run({"model": model, "method": method, "train": train, "cluster": {"devices": draw.choice([2, 4, 8])}})


def _describe(run: Run) -> str:
    method = {key: value for key, value in run.method.model_dump(exclude_defaults=True).items() if key != "name"}
    train = {key: getattr(run.train, key) for key in ("micro_batch", "activation_checkpointing")}
    return f"{run.method.name} {method} {train} {run.model.model_dump()}"


def main() -> None:
    """Print one line a shape, then the mean and the worst error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="gpt", choices=["gpt", "llama", "vit", "mixer"])
    parser.add_argument("--autocast", default="none", choices=["none", "bf16", "fp16"])
    arguments = parser.parse_args()
    draw, errors = random.Random(arguments.seed), []
    for _ in range(arguments.shapes):
        run = random_run(draw, arguments.family, arguments.autocast)
        measured = measure_memory_bytes(run, torch.device("cpu"))
        planned = peak_memory(run, run.model.shape(), ROOMY).total
        errors.append(planned / measured - 1)
        print(
            f"planned {planned / 1e6:8.2f} MB  measured {measured / 1e6:8.2f} MB  {errors[-1]:+7.2%}  {_describe(run)}",
            flush=True,
        )
    absolute = [abs(error) for error in errors]
    under = min(min(errors), 0.0)
    print(f"mean {sum(absolute) / len(errors):.2%}, worst {max(absolute):.2%}, furthest under {under:.2%}")


if __name__ == "__main__":
    main()
