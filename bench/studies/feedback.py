"""Changes that small merges leave in NF4 weights without a full-precision master, by what keeps the rest.

python bench/studies/feedback.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simulate.layers.formats import NF4_BLOCK
from simulate.layers.quantized import QuantizedWeight, nf4_levels

CHANGES, CHANGE, SPREAD = 1000, 1e-4, 0.1
INT8 = 127


def _scales(x_OI: Tensor) -> Tensor:
    return x_OI.view(-1, NF4_BLOCK).abs().amax(1, keepdim=True).clamp(min=1e-30)


def int8(x_OI: Tensor) -> Tensor:
    """Return 127ths of each block's largest."""
    step_B1 = _scales(x_OI) / INT8
    return ((x_OI.view(-1, NF4_BLOCK) / step_B1).round() * step_B1).view_as(x_OI)


def int8_at_random(x_OI: Tensor) -> Tensor:
    """Return 127ths, up or down with the chances that make the mean right."""
    step_B1 = _scales(x_OI) / INT8
    relative = x_OI.view(-1, NF4_BLOCK) / step_B1
    return ((relative + torch.rand_like(relative)).floor() * step_B1).view_as(x_OI)


def nf4_at_random(x_OI: Tensor) -> Tensor:
    """Return NF4's level above or below, likewise."""
    levels, scale_B1 = nf4_levels(), _scales(x_OI)
    relative = (x_OI.view(-1, NF4_BLOCK) / scale_B1).clamp(-1, 1)
    above = torch.bucketize(relative, levels).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    up = torch.rand_like(relative) < (relative - low) / (high - low)
    return (torch.where(up, high, low) * scale_B1).view_as(x_OI)


RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "int8": int8,
    "int8, at random": int8_at_random,
    "bf16": lambda x: x.bfloat16().float(),
    "fp16": lambda x: x.half().float(),
    "fp32": lambda x: x,
}


def with_residual(start_OI: Tensor, residual: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what weights in NF4 and their residual add up to after all changes."""
    packed = QuantizedWeight(start_OI, "nf4")
    rest_OI = residual(start_OI - packed.dense())
    for _ in range(CHANGES):
        # Error feedback: the change goes onto weights and residual together; the residual keeps what NF4 rounds away.
        exact_OI = packed.dense() + rest_OI + CHANGE
        packed.quantize(exact_OI)
        rest_OI = residual(exact_OI - packed.dense())
    return packed.dense() + rest_OI


def rounded_at_random(start_OI: Tensor) -> Tensor:
    """Return weights in NF4 after all changes, without a residual."""
    weight_OI = nf4_at_random(start_OI)
    for _ in range(CHANGES):
        weight_OI = nf4_at_random(weight_OI + CHANGE)
    return weight_OI


def main() -> None:
    """Print the share of all changes that arrived, and the mean error as a share of them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start_OI, whole = torch.randn(64, 64) * SPREAD, CHANGES * CHANGE
    results = {name: with_residual(start_OI, residual) for name, residual in RESIDUALS.items()}
    results["none, NF4 at random"] = rounded_at_random(start_OI)
    for name, weight_OI in results.items():
        change_OI = weight_OI - start_OI
        error = (change_OI - whole).abs().mean() / whole
        print(f"{name:20} arrived {change_OI.mean() / whole:7.2%}, mean error {error:8.3%}")


if __name__ == "__main__":
    main()
