"""Precision of a row's products, and the allocator of its device."""

from __future__ import annotations

import gc
from typing import Any

import torch

from simulate.layers.accelerator import synchronize

AUTOCASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def use_precision(name: str) -> str:
    """Let fp32 products round their inputs to TF32 or not; returns what `train.autocast` is for the precision."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"  # convolutions use it by default
    return name if name in AUTOCASTS else "none"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a plain network's forward pass."""
    return torch.autocast(device.type, AUTOCASTS.get(precision, torch.bfloat16), enabled=precision in AUTOCASTS)


def forget(device: torch.device) -> Any:
    """Return freed memory to the driver and start the count of peaks anew; returns the device's module."""
    gc.collect()
    api = torch.get_device_module(device)
    synchronize(device)
    api.empty_cache()
    api.reset_peak_memory_stats(device)
    return api
