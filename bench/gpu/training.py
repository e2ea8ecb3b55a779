"""Part f: GPT-2 small on the Python standard library's source, dense or LTE, for equally many seconds.

Both take 32 windows of 256 bytes a step, under autocast to bf16 where the device multiplies it, else to fp16. LTE's
batch is divided among 8 devices in this process, which merge every 10 steps. Evaluations are not part of the seconds.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import forget
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.data.batches import TextBatches
from simulate.data.text import load_text
from simulate.layers.accelerator import has_bf16, synchronize
from simulate.measure.one_device import evaluate_batch
from simulate.methods.base import Method
from simulate.methods.build_network import empty_model
from simulate.methods.registry import build_method

Table = dict[str, Any]
SAMPLES, VALIDATION, ROUND = 32, 64, 10
MODEL = {"name": "gpt2", "vocab": 256, "context": 256}
TINY = {"name": "gpt", "layers": 1, "width": 64, "attention_heads": 2, "context": 32}
METHODS: dict[str, tuple[int, Table]] = {
    "dense": (1, {"name": "ddp"}),
    "lte, 8 x rank 64": (8, {"name": "lte", "rank": 64, "merge_every": ROUND}),
}
RATE, WARM_UP_STEPS = 1e-3, 100


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return tokens a second and losses; `losses` has (tokens, mean training loss of a round) of each round."""
    devices, options = METHODS[given["method"]]
    run = _run(devices, options, device, given["tiny"])
    batches = TextBatches.of(run, load_text(run.data))
    api = None if device.type == "cpu" else forget(device)
    method = build_method(run, VirtualCommunicator(devices), device)
    losses: list[tuple[int, float]] = []
    _round(run, method, batches, 0, device)  # untimed: it allocates and loads kernels
    spent_s, step = 0.0, ROUND
    while spent_s < given["seconds"]:
        started = time.perf_counter()
        mean = _round(run, method, batches, step, device)
        spent_s += time.perf_counter() - started
        step += ROUND
        losses.append((step * SAMPLES * batches.context, mean))
        if not math.isfinite(mean):
            raise RuntimeError(f"the loss is {mean} at step {step}")
    tokens_per_s = (step - ROUND) * SAMPLES * batches.context / spent_s
    peak = {} if api is None else {"allocated_bytes": api.max_memory_allocated(device)}
    return {
        "precision": run.train.autocast, "steps": step, "tokens": losses[-1][0], "tokens_per_s": tokens_per_s,
        "train_loss": losses[-1][1], "val_loss": _validation_loss(run, method, batches, device), **peak,
        "losses": losses,
    }  # fmt: skip


def _run(devices: int, options: Table, device: torch.device, is_tiny: bool) -> Run:
    lower = "bf16" if device.type == "cpu" or has_bf16(device) else "fp16"
    return build_run(
        {
            "model": TINY if is_tiny else MODEL, "method": options,
            "train": {
                "steps": 10**6, "micro_batch": SAMPLES // devices, "learning_rate": RATE,
                "warmup_steps": WARM_UP_STEPS, "autocast": lower,
            },
            "cluster": {"devices": devices},
        }
    )  # fmt: skip


def _round(run: Run, method: Method, batches: TextBatches, first: int, device: torch.device) -> float:
    """Take a round's steps and its merge; returns their mean loss."""
    losses = []
    for step in range(first, first + ROUND):
        inputs, targets = batches.batch(step, range(run.cluster.devices))
        losses.append(method.step(inputs.to(device), targets.to(device), step).mean())
        if method.merge_due(step):
            method.merge(step)
    mean = float(torch.stack(losses).mean())
    synchronize(device)
    return mean


def _validation_loss(run: Run, method: Method, batches: TextBatches, device: torch.device) -> float:
    model, sums, count = empty_model(run, device), 0.0, 0
    for inputs, targets in batches.validation(VALIDATION, 8):
        row_losses = evaluate_batch(method, model, inputs.to(device), targets.to(device))
        sums, count = sums + float(row_losses.double().sum()), count + row_losses.numel()
    return sums / count
