"""Formats of tensors: of the run, and of matrix products under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
CPU = torch.device("cpu")


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the format in which matrix products of x run here: for functions that autograd cannot see into."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)
