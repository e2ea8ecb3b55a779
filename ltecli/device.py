"""The device that --device names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulate.common.errors import InputError

if TYPE_CHECKING:
    import torch


def torch_device(name: str) -> torch.device:
    """Return the torch device of auto, cpu or cuda; raises InputError for cuda without a GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
