"""Dtypes of a run's tensors, and of matrix products under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
CPU = torch.device("cpu")


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products of x run under the current autocast.

    Custom autograd functions need it, since autocast casts the inputs of torch's own operations only.
    """
    kind = x.device.type
    # Autocast leaves float64 alone, and so must we.
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)
