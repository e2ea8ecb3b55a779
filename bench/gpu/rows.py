"""The rows that `make gpu` measures, part by part: what each one runs, and what it needs that may be missing.

A row is one line of the table: a module of this folder, its arguments, and the packages without which it is left out by
name. Rows of a group share a process, one after the other; a group of one row has an allocator that starts empty.
bench/gpu/__main__.py runs them by bench/gpu/worker.py. Imports nothing but the standard library, so that a machine
without our libraries can still be told what it lacks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Table = dict[str, Any]
LAYERS = ("numpy",)
"""Packages that simulate.layers and simulate.comm import beside torch."""
ENGINE = (*LAYERS, "pydantic", "tomli_w", *(() if sys.version_info >= (3, 11) else ("tomli",)))
DATA, MACHINE = (*ENGINE, "PIL"), (*ENGINE, "psutil")
COMMAND = (*DATA, "psutil", "rich", "safetensors", "tensorboard", "typer")
EIGHT_BIT = "bitsandbytes"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    part: str
    name: str
    module: str
    """Module of bench.gpu whose `measure` is called."""
    arguments: Table = field(hash=False)
    needs: tuple[str, ...]
    """Packages, by the names that are imported."""
    group: str
    limit_s: float = 120.0
    """Longest time for the row, the start of its process included where it is the group's first."""
    gpu_only: bool = False


PARTS = {
    "a": "Every method and precision: 30 steps of a GPT as wide as GPT-2, losses against the CPU's in fp32",
    "b": "Memory: planned, followed without numbers, and what the allocator held",
    "c": "Seconds of a step: LTE over dense, and 32 devices over one, in turns in one process",
    "d": "Seconds of a step: planned by a profile that was measured here, and taken",
    "e": "Two processes on one GPU, and one",
    "f": "GPT-2 small on the standard library's source: LTE beside dense, equally long",
}
AIMS = {
    "a": "each step's loss within the bound of its precision",
    "b": "planned and followed bytes within 5 % of those reserved, and never more than 1 % below them",
    "c": "LTE's step in bf16 takes at most 0.95 of the dense one",
    "d": "mean error at most 10 %",
    "e": "a launched run's losses within 0.1 % of its simulation's; a refusal is a result",
}

METHODS: dict[str, Table] = {
    "ddp": {"name": "ddp"},
    "lte": {"name": "lte", "rank": 16},
    "lte reset-less": {"name": "lte", "rank": 16, "reset": "none"},
    "lte reset ab, both factors": {"name": "lte", "rank": 16, "reset": "ab", "frozen_a": False},
    "local-sgd": {"name": "local-sgd"},
    "diloco": {"name": "diloco"},
    "sparseloco": {"name": "sparseloco"},
    "lora": {"name": "lora", "rank": 16},
    "relora": {"name": "relora", "rank": 16, "merge_every": 10, "rewarm_steps": 3},
    "mhlora": {"name": "mhlora", "rank": 16, "heads_per_device": 2},
    "daso": {"name": "daso", "merge_every": 5, "delay_steps": 2},
    "sapipe": {"name": "sapipe"},
    "adamix": {"name": "adamix", "rank": 16, "experts": 3},
    "powersgd": {"name": "powersgd", "rank": 4},
    "topk": {"name": "topk", "density": 0.1},
    "signsgd": {"name": "signsgd"},
    "lte int8": {"name": "lte", "rank": 16, "quantize": "int8"},
    "lte nf4": {"name": "lte", "rank": 16, "quantize": "nf4"},
    "lte muon": {"name": "lte", "rank": 16},
    "ddp muon": {"name": "ddp"},
    "ddp 8-bit moments": {"name": "ddp"},
}
"""Every method of this program, and what changes its arithmetic: quantised weights, Muon, moments in 8 bits."""


def losses(size: str) -> Iterator[Row]:
    """Yield part a."""
    wide = {"layers": 2, "width": 768, "attention_heads": 12, "context": 64}
    tiny = {"layers": 1, "width": 32, "attention_heads": 2, "context": 16}
    for name, method in METHODS.items():
        train = {"optimizer": "muon"} if name.endswith("muon") else {}
        train |= {"optimizer_state": "8bit"} if name.endswith("moments") else {}
        needs = (*DATA, EIGHT_BIT) if name in ("lte nf4", "ddp 8-bit moments") else DATA
        for precision in PRECISIONS:
            given = {
                "model": {"name": "gpt", **(wide if size == "full" else tiny)},
                "method": method, "train": train, "precision": precision, "reference": name,
                "steps": 30 if size == "full" else 11,
            }  # fmt: skip
            # The smoke's rows share a process, whose start would take longer than they.
            group = name if size == "full" else "all"
            yield Row("a", f"{name}, {precision}", "losses", given, needs, group, gpu_only=precision == "tf32")


MEMORY: dict[str, Table] = {
    "gpt2 ddp, batch 4": {"model": "gpt2", "method": {"name": "ddp"}, "batch": 4},
    "gpt2 lte rank 64, batch 4": {"model": "gpt2", "method": {"name": "lte", "rank": 64}, "batch": 4},
    "gpt2 lte rank 64 in bf16, batch 8": {
        "model": "gpt2", "method": {"name": "lte", "rank": 64}, "batch": 8, "autocast": "bf16",
    },
    "gpt2 diloco, batch 4": {"model": "gpt2", "method": {"name": "diloco"}, "batch": 4},
    "vit_s16 ddp, batch 64": {"model": "vit_s16", "method": {"name": "ddp"}, "batch": 64},
    "vit_b16 lte rank 64, batch 32": {"model": "vit_b16", "method": {"name": "lte", "rank": 64}, "batch": 32},
    "mixer_b16 lte reset-less, batch 32": {
        "model": "mixer_b16", "method": {"name": "lte", "rank": 64, "reset": "none"}, "batch": 32,
    },
    "llama_60m powersgd, batch 16": {"model": "llama_60m", "method": {"name": "powersgd", "rank": 4}, "batch": 16},
    "gpt2_medium lte rank 64 in bf16, batch 4": {
        "model": "gpt2_medium", "method": {"name": "lte", "rank": 64}, "batch": 4, "autocast": "bf16",
    },
    "gpt2_medium ddp, checkpointing, batch 4": {
        "model": "gpt2_medium", "method": {"name": "ddp"}, "batch": 4, "checkpointing": True,
    },
    "llama_1b lte int8 rank 16, batch 4": {
        "model": "llama_1b", "method": {"name": "lte", "rank": 16, "quantize": "int8"}, "batch": 4,
    },
    "llama_1b lte nf4 rank 16, batch 4": {
        "model": "llama_1b", "method": {"name": "lte", "rank": 16, "quantize": "nf4"}, "batch": 4,
    },
}  # fmt: skip


def memory(size: str) -> Iterator[Row]:
    """Yield part b: one process a row, and the allocator's rules alone."""
    requests = 20_000 if size == "full" else 2_000
    yield Row(
        "b", "the allocator's rules, made-up requests", "memory", {"requests": requests}, (), "rules", gpu_only=True
    )
    for name, given in MEMORY.items():
        needs = (*DATA, EIGHT_BIT) if "nf4" in name else DATA
        if size == "tiny":
            given = {**given, "batch": 2, "tiny": True}
        yield Row("b", name, "memory", given, needs, name, limit_s=180)


HEADS = {"8 x rank 64": (8, 64), "32 x rank 32": (32, 32)}


def step_ratios(size: str) -> Iterator[Row]:
    """Yield part c: without torch.compile first, since that takes longest."""
    batch, pairs = (32, 12) if size == "full" else (32, 3)
    shared = {"batch": batch, "pairs": pairs, "tiny": size == "tiny"}
    for compiled in (False, True):
        how = ", compiled" if compiled else ""
        # Of the smoke, one of each: compilers take most of its time.
        few = compiled and size == "tiny"
        heads_of = dict([*HEADS.items()][:1]) if few else HEADS
        precisions, models = (("bf16",), ("vit_s16",)) if few else (PRECISIONS[:3], ("vit_s16", "gpt2"))
        # One layer needs no library but numpy: a machine that has nothing else still measures the kernels.
        for (heads, (devices, rank)), precision in product(heads_of.items(), precisions):
            given = {"devices": devices, "rank": rank, "precision": precision, "compiled": compiled, **shared}
            name = f"one layer, {heads}, {precision}{how}"
            yield Row(
                "c", name, "layer_ratios", given, LAYERS, f"layer{how}", limit_s=180, gpu_only=precision == "tf32"
            )
        for model, (heads, (devices, rank)) in product(models, heads_of.items()):
            for precision in precisions:
                method = {"name": "lte", "rank": rank}
                given = {"model": model, "method": method, "devices": devices, "over": "dense", "precision": precision}
                given |= {"compiled": compiled, **shared}
                name = f"{model} lte, {heads}, {precision}{how}"
                group = f"{model} {heads}{how}" if size == "full" else f"steps{how}"
                yield Row("c", name, "step_ratios", given, ENGINE, group, limit_s=300, gpu_only=precision == "tf32")
        if compiled:
            continue
        for model, name in product(models, ("lte", "ddp")):
            method = {"name": name, "rank": 2} if name == "lte" else {"name": name}
            over = {"name": name, "rank": 64} if name == "lte" else {"name": name}
            given = {"model": model, "method": method, "devices": 32, "over": over, "precision": "bf16"}
            given |= {"compiled": False, **shared}
            title = "32 x rank 2 over 1 x rank 64" if name == "lte" else "32 devices over 1"
            yield Row("c", f"{model} {name}, {title}, bf16", "step_ratios", given, ENGINE, "devices", limit_s=300)


def held_out(size: str) -> Iterator[Row]:
    """Yield part d: the measurement, then steps that it did not use."""
    yield Row("d", "profile measured", "held_out", {"case": None, "size": size}, MACHINE, "profile", limit_s=300)
    for case in range(8):
        name = f"held-out step {case + 1}"
        yield Row("d", name, "held_out", {"case": case, "size": size}, MACHINE, "steps")


def launched(size: str) -> Iterator[Row]:
    """Yield part e: what torch does by itself, then `lte train --launch`."""
    sizes = {"layers": 4, "width": 256, "attention_heads": 4, "context": 128}
    tiny = {"layers": 1, "width": 16, "attention_heads": 2, "context": 8}
    model = sizes if size == "full" else tiny
    for backend in ("nccl", "gloo"):
        name = f"torch alone, two ranks, {backend}"
        yield Row("e", name, "launched", {"backend": backend, "alone": True}, LAYERS, name, gpu_only=backend == "nccl")
    for backend, processes in (("nccl", 1), ("gloo", 1), ("nccl", 2), ("gloo", 2)):
        name = f"lte train --launch --processes {processes}, {backend}"
        given = {"backend": backend, "processes": processes, "model": model}
        yield Row("e", name, "launched", given, COMMAND, name, limit_s=180, gpu_only=backend == "nccl")


def training(size: str) -> Iterator[Row]:
    """Yield part f."""
    for name in ("dense", "lte, 8 x rank 64"):
        given = {"method": name, "seconds": 180.0 if size == "full" else 2.0, "tiny": size == "tiny"}
        yield Row("f", name, "training", given, DATA, name, limit_s=270)


ROWS = {"a": losses, "b": memory, "c": step_ratios, "d": held_out, "e": launched, "f": training}
