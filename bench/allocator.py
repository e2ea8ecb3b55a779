"""Planned, closed-form memory of CUDA's allocator beside its replay, over runs of real size.

python bench/allocator.py                 # a table; about five minutes on two idle cores
python bench/allocator.py --fit           # and the best constants of simulate/costs/allocator.py for these runs

The constants of the closed form come from here; run it again when the program or its networks allocate otherwise.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs import allocator
from simulate.costs.memory import peak_memory
from simulate.measure.fake_tensors import tracked_memory

LTE, DDP, NF4 = {"name": "lte", "rank": 64}, {"name": "ddp"}, {"name": "lte", "rank": 64, "quantize": "nf4"}
HALF, RECOMPUTED = {"autocast": "fp16"}, {"activation_checkpointing": True}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("gpt2", method, {"micro_batch": batch}) for method in (LTE, DDP) for batch in (1, 4, 16)),
    *(("gpt2", method, {"micro_batch": batch, **HALF}) for method in (LTE, DDP) for batch in (2, 8)),
    ("gpt2", LTE, {"micro_batch": 16, **RECOMPUTED}),
    ("gpt2", {**LTE, "reset": "none"}, {"micro_batch": 4}),
    ("gpt2", NF4, {"micro_batch": 4}),
    ("gpt2", {"name": "diloco"}, {"micro_batch": 4}),
    ("gpt2", {"name": "powersgd"}, {"micro_batch": 2}),
    *((name, LTE, {"micro_batch": batch}) for name in ("vit_b16", "mixer_b16") for batch in (4, 32)),
    *((name, DDP, {"micro_batch": 16}) for name in ("vit_b16", "mixer_b16")),
    *((name, LTE, {"micro_batch": 16, **HALF}) for name in ("vit_b16", "mixer_b16")),
    *((name, LTE, {"micro_batch": 32, **RECOMPUTED}) for name in ("vit_b16", "mixer_b16")),
    ("llama_1b", NF4, {"micro_batch": 1}),
    ("llama_1b", NF4, {"micro_batch": 4, **RECOMPUTED}),
    ("llama_1b", DDP, {"micro_batch": 2, **RECOMPUTED}),
]
"""Network, [method] and [train] of each run."""
GRID = {"USED_AGAIN": (0.25, 0.5, 0.75, 1.0), "MISFIT": (0.5, 0.75, 1.0, 1.5), "FRAGMENTS": (0.0, 0.01, 0.02, 0.03)}


def main() -> None:
    """Print the table, and with --fit the constants of least error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    runs, held = [], []
    fits = parser.parse_args().fit
    print("| run | tensors | closed form | replay | difference |\n|---|---|---|---|---|")
    for run in _runs():
        runs.append(run)
        held.append(tracked_memory(run, with_host=False).allocator_bytes + allocator.WORKSPACE_BYTES)
        tensors, planned = _planned(run)
        print(
            f"| {_name(run)} | {tensors / 1e9:.2f} GB | {planned / 1e9:.2f} GB | {held[-1] / 1e9:.2f} GB | "
            f"{planned / held[-1] - 1:+.1%} |",
            flush=True,
        )
    if fits:
        _fit(runs, held)


def _runs() -> Iterator[Run]:
    for model, method, train in CASES:
        table = {"model": {"name": model}, "method": method, "train": {"steps": 40, **train}}
        yield build_run({**table, "cluster": {"devices": 8}})


def _planned(run: Run) -> tuple[int, int]:
    """Return the planned bytes of tensors, and with what the allocator holds beside them."""
    memory = peak_memory(run, run.model.shape(), load_profile("gtx1080ti_x8").device[0])
    return memory.tensors, memory.tensors + memory.allocator


def _name(run: Run) -> str:
    train, frozen = run.train, run.method.frozen_format
    words = [run.model.shape().name, run.method.name, f"batch {train.micro_batch}"]
    words += [frozen] * (frozen != "none") + [train.autocast] * (train.autocast != "none")
    return ", ".join(words + ["checkpointing"] * train.activation_checkpointing)


def _fit(runs: list[Run], held: list[int]) -> None:
    """Print the constants whose largest error is smallest, where too low counts three times."""
    errors: dict[tuple[float, ...], tuple[float, float]] = {}
    for values in itertools.product(*GRID.values()):
        for key, value in zip(GRID, values, strict=True):
            setattr(allocator, key, value)
        differences = [_planned(run)[1] / most - 1 for run, most in zip(runs, held, strict=True)]
        errors[values] = min(differences), max(differences)
    best = min(errors, key=lambda values: max(-3 * errors[values][0], errors[values][1]))
    print(f"{dict(zip(GRID, best, strict=True))}: {errors[best][0]:+.1%} to {errors[best][1]:+.1%}")


if __name__ == "__main__":
    main()
