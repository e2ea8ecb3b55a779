"""Part c: a method's step on N devices in this process over plain PyTorch's, or over the same method on one device.

The plain step is nn.Linear layers, F.cross_entropy and fused AdamW on the same batch, as in bench/step.py, under the
same autocast. With `compiled` both networks go through torch.compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import autocast, use_precision
from bench.gpu.timing import paired_ratio
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.layers.accelerator import synchronize
from simulate.methods.build_network import build_model
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch

Table = dict[str, Any]
Batch = tuple[Tensor, Tensor]
GOOD = 0.95
"""Largest ratio of LTE's step in bf16 over the dense one that is good enough."""
SIZES: dict[str, Table] = {"vit_s16": {}, "gpt2": {"context": 256}}
TINY: dict[str, Table] = {
    "vit_s16": {"layers": 1, "width": 32, "attention_heads": 2, "image": 32, "classes": 10},
    "gpt2": {"layers": 1, "width": 32, "attention_heads": 2, "context": 16, "vocab": 256},
}


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return the median ratio of paired steps."""
    train_autocast = use_precision(given["precision"])
    run = _run(given, given["method"], given["devices"], train_autocast)
    inputs, targets = (tensor.to(device) for tensor in example_batch(run.model, given["batch"]))
    batch, is_dense = (inputs, targets), given["over"] == "dense"
    ours = _step(run, batch, device, given["compiled"])
    if is_dense:
        other = _dense_step(run, batch, given, device)
    else:
        other = _step(_run(given, given["over"], 1, train_autocast), batch, device, given["compiled"])
    started = time.perf_counter()
    ours(), other()  # kernels are loaded or compiled, and optimizers' states allocated
    synchronize(device)
    first_s = time.perf_counter() - started
    figures = {**paired_ratio(ours, other, given["pairs"], device), "first_calls_s": first_s}
    if is_dense and given["precision"] == "bf16" and device.type != "cpu":
        figures["within"] = figures["ratio"] <= GOOD
    return figures


def _run(given: Table, method: Table, devices: int, train_autocast: str) -> Run:
    sizes, text = (TINY if given["tiny"] else SIZES)[given["model"]], given["model"].startswith("gpt")
    if given["tiny"] and "rank" in method:
        method = {**method, "rank": min(method["rank"], 8)}
    return build_run(
        {
            "model": {"name": given["model"], **sizes}, "data": {"name": "stdlib" if text else "digits"},
            "method": method,
            "train": {
                "steps": 10**6, "micro_batch": given["batch"] // devices, "learning_rate": 1e-4,
                "autocast": train_autocast,
            },
            "cluster": {"devices": devices},
        }
    )  # fmt: skip


def _step(run: Run, batch: Batch, device: torch.device, compiled: bool) -> Callable[[], object]:
    method = build_method(run, VirtualCommunicator(run.cluster.devices), device)
    if compiled:
        method.model.compile()
    return lambda: method.step(*batch, 1)  # step 1 stands for all, which differ in the learning rate alone


def _dense_step(run: Run, batch: Batch, given: Table, device: torch.device) -> Callable[[], object]:
    model = build_model(run).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if given["compiled"]:
        model.compile()
    inputs, targets = batch

    def step() -> None:
        with autocast(device, given["precision"]):
            outputs = model(inputs)
            loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
