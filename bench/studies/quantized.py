"""Frozen weights in fewer bytes: what they save by the plan, and what they cost in time and in loss.

python bench/studies/quantized.py memory
python bench/studies/quantized.py fits --models llama_1b llama_7b --verify
python bench/studies/quantized.py step --pairs 6
python bench/studies/quantized.py loss PATH_OF_A_TEXT
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import cache
from typing import Any

import torch

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.costs.memory import peak_memory
from simulate.measure.accuracy import ROOMY
from simulate.measure.fake_tensors import tracked_memory
from simulate.methods.base import Method
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch

FORMATS = ("none", "bf16", "int8", "nf4", "nf4-double")
MODELS = {"vit_l16": 32, "gpt2_xl": 32, "llama_7b": 64}
"""Rank of LTE's one head on a device, by model."""
STEP_MODEL = {"layers": 4, "width": 256, "attention_heads": 4, "context": 128}
LOSS_MODEL = {"layers": 4, "width": 128, "attention_heads": 4, "context": 64}
GPU_GIBIBYTES, RESERVED_BYTES = (8, 11, 24), 700_000_000
"""Memory of common GPUs, and the part that the system and its context take (a guess, as in the profiles)."""
RANKS = (8, 16, 32, 64, 128, 256)
SEPARATE = ROOMY.model_copy(update={"host_memory_bytes": 10**12})
"""A device beside a host, which keeps full-precision weights."""


def static_bytes(model: str, method: dict[str, Any]) -> int:
    """Return the planned bytes of one device without what activations and messages take."""
    table = {"model": {"name": model}, "method": method, "train": {"micro_batch": 1}, "cluster": {"devices": 8}}
    run = build_run(table)
    memory = peak_memory(run, run.model.shape(), SEPARATE)
    trained = memory.optimizer // 2  # a gradient for each pair of moments
    return memory.weights + memory.adapters + memory.optimizer + trained


def print_memory() -> None:
    """Print planned bytes, and how many times dense training's they are."""
    for model, rank in MODELS.items():
        dense = static_bytes(model, {"name": "ddp"})
        print(f"{model}, rank {rank}: dense AdamW {dense / 1e9:.2f} GB")
        for quantize in FORMATS:
            ours = static_bytes(model, {"name": "lte", "rank": rank, "quantize": quantize})
            print(f"  {quantize:10} {ours / 1e9:6.2f} GB, 1/{dense / ours:.2f}", flush=True)


def small_run(model: str, rank: int, method: str, context: int | None) -> Run:
    """Return a run of eight devices that saves memory by NF4, autocast, checkpointing and moments in 8 bits."""
    sizes = {"name": model} if context is None else {"name": model, "context": context}
    train = {"micro_batch": 1, "activation_checkpointing": True, "autocast": "fp16", "optimizer_state": "8bit"}
    table = {"model": sizes, "method": {"name": method, "rank": rank, "quantize": "nf4"}, "train": train}
    return build_run({**table, "cluster": {"devices": 8}})


def print_fits(models: list[str], method: str, ranks: list[int], context: int | None, verify: bool) -> None:
    """Print the highest rank that fits GPUs of some sizes, or how far the lowest is from it."""
    tracked = cache(tracked_memory)
    for model, gibibytes in itertools.product(models, GPU_GIBIBYTES):
        room = gibibytes * 2**30 - RESERVED_BYTES
        ranks = sorted(ranks, reverse=True)
        runs = [small_run(model, rank, method, context) for rank in ranks]
        planned = [peak_memory(run, run.model.shape(), SEPARATE).total for run in runs]
        index = next((i for i, total in enumerate(planned) if total <= room), len(runs) - 1)
        rank, run, total = ranks[index], runs[index], planned[index]
        where = f"{model} on {gibibytes} GiB, {run.method.name} {run.method.frozen_format}, rank {rank}"
        print(f"{where}: planned {total / 1e9:.3f} GB, {_verdict(room - total)}", flush=True)
        if verify:
            seen = tracked(run, with_host=False)
            error, reserved = total / seen.tracked_bytes - 1, seen.allocator_bytes
            print(f"  tracked {seen.tracked_bytes / 1e9:.3f} GB: planned {error:+.2%}", flush=True)
            print(f"  CUDA's caching allocator {reserved / 1e9:.3f} GB, {_verdict(room - reserved)}", flush=True)


def _verdict(left_bytes: int) -> str:
    return f"{abs(left_bytes) / 1e9:.2f} GB {'left' if left_bytes >= 0 else 'short'}"


def step_method(quantize: str) -> Method:
    """Return LTE on one device over a small GPT."""
    table = {
        "model": STEP_MODEL,
        "method": {"name": "lte", "rank": 32, "quantize": quantize},
        "train": {"steps": 10**6, "micro_batch": 8},
        "cluster": {"devices": 1},
    }
    return build_method(build_run(table), VirtualCommunicator(1), torch.device("cpu"))


def print_steps(pairs: int) -> None:
    """Print the processor time of a step over the unquantised one's: the median of pairs."""
    methods = {quantize: step_method(quantize) for quantize in FORMATS}
    batch = example_batch(methods["none"].run.model, 8)
    spent: dict[str, list[float]] = {quantize: [] for quantize in FORMATS}
    for pair in range(pairs + 1):
        for quantize, method in methods.items():
            started = time.process_time()
            method.step(*batch, 1)
            if pair:  # the first warms up
                spent[quantize].append(time.process_time() - started)
    for quantize in FORMATS:
        ratios = [ours / plain for ours, plain in zip(spent[quantize], spent["none"], strict=True)]
        print(f"{quantize:10} {statistics.median(spent[quantize]) * 1e3:7.1f} ms, {statistics.median(ratios):.2f}")


def print_losses(text: str, steps: int, formats: list[str]) -> None:
    """Print the final validation loss with every format."""
    from training import train_table

    for quantize in formats:
        method = {"name": "lte", "rank": 32, "merge_every": 10, "quantize": quantize}
        train = {
            "steps": steps, "micro_batch": 8, "learning_rate": 3e-3, "warmup_steps": steps // 10,
            "evaluate_every": steps, "evaluate_samples": 512, "checkpoint_every": steps, "log_every": steps,
        }  # fmt: skip
        started = time.process_time()
        table = {"model": LOSS_MODEL, "data": {"path": text}, "method": method, "train": train}
        trained = train_table({**table, "cluster": {"devices": 4}})
        print(f"{quantize:10} {trained.val_loss}, {time.process_time() - started:.0f} s", flush=True)


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("memory")
    verbs.add_parser("step").add_argument("--pairs", type=int, default=6)
    fits = verbs.add_parser("fits")
    fits.add_argument("--models", nargs="+", default=["llama_1b", "llama_7b"])
    fits.add_argument("--method", default="lte")
    fits.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    fits.add_argument("--context", type=int)
    fits.add_argument("--verify", action="store_true")
    loss = verbs.add_parser("loss")
    loss.add_argument("text")
    loss.add_argument("--steps", type=int, default=200)
    loss.add_argument("--formats", nargs="+", default=["none", "int8", "nf4"])
    arguments = parser.parse_args()
    if arguments.verb == "memory":
        print_memory()
    elif arguments.verb == "fits":
        print_fits(arguments.models, arguments.method, arguments.ranks, arguments.context, arguments.verify)
    elif arguments.verb == "step":
        print_steps(arguments.pairs)
    else:
        print_losses(arguments.text, arguments.steps, arguments.formats)


if __name__ == "__main__":
    main()
