"""Part c: one linear layer with the adapters of N devices over a plain one, without an optimizer.

It needs torch and numpy alone, so it tells what the kernels do on a machine without our other libraries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu.device import autocast, use_precision
from bench.gpu.timing import paired_ratio
from simulate.layers.accelerator import synchronize
from simulate.layers.lora import AdapterSpec, LoraLinear

Table = dict[str, Any]
ROWS, INPUTS, OUTPUTS = 8192, 768, 3072


def measure(given: Table, device: torch.device, folder: Path) -> Table:
    """Return the median ratio of paired calls."""
    use_precision(given["precision"])
    rows, inputs, outputs = (256, 64, 64) if given["tiny"] else (ROWS, INPUTS, OUTPUTS)
    heads, rank = given["devices"], min(given["rank"], inputs // 2)
    spec = AdapterSpec(rank, 1.0, 1, False, 0, 0, frozen_a=True, keeps_start=False)
    bias = nn.Parameter(torch.zeros(heads, outputs))
    adapted = LoraLinear(torch.randn(outputs, inputs) / inputs**0.5, bias, "layer", spec, heads).to(device)
    layers = {"ours": adapted, "plain": nn.Linear(inputs, outputs).to(device)}
    x = torch.randn(rows, inputs, device=device, requires_grad=True)

    def call_of(layer: nn.Module) -> Callable[[], None]:
        if given["compiled"]:
            layer.compile()

        def call() -> None:
            with autocast(device, given["precision"]):
                y = layer(x)
            y.backward(torch.ones_like(y))
            for parameter in layer.parameters():
                parameter.grad = None
            x.grad = None

        return call

    started = time.perf_counter()
    calls = [call_of(layer) for layer in layers.values()]
    for call in calls:
        call()
    synchronize(device)
    return {**paired_ratio(*calls, given["pairs"], device), "first_calls_s": time.perf_counter() - started}
