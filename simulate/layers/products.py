"""Matrix products that several kinds of layers share, in the form that a CPU computes fastest.

Each has the value of the plain operation that its docstring names, to rounding.

Legend: C copies or H heads, M rows of one, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

THIN_ROWS = 1024
"""Rows of a product with few columns that a CPU takes at once: 6,304 rows of 1,536 inputs by 64 columns took 43 ms of a
thread of an AMD EPYC (Zen 3) in one call, and 26 ms in eight."""
MOST_PARTS = 64


def sum_of_rows(g_CMO: Tensor) -> Tensor:
    """Return the sum of each copy's rows, (C, O).

    On a CPU it is a product with ones, which reads g at twice the speed of torch's sum over a leading dimension.
    """
    if g_CMO.device.type != "cpu" or g_CMO.dtype not in (torch.float32, torch.float64):
        return g_CMO.sum(1)
    ones_C1M = g_CMO.new_ones(1, 1, g_CMO.shape[1]).expand(len(g_CMO), 1, -1)
    return torch.bmm(ones_C1M, g_CMO).squeeze(1)


def thin_product(x_HMI: Tensor, columns_HIR: Tensor, scale: float) -> Tensor:
    """Return scale·x·columns, (H, M, R), for few columns; a lone head's many rows are taken in parts on a CPU."""
    heads, rows, inputs = x_HMI.shape
    small_HMR = x_HMI.new_empty(heads, rows, columns_HIR.shape[2])
    parts = row_parts(rows) if heads == 1 and x_HMI.device.type == "cpu" else 1
    # baddbmm with beta = 0 applies the scale within the product, instead of in a pass of its own.
    small_HMR.view(heads * parts, rows // parts, -1).baddbmm_(
        x_HMI.view(heads * parts, rows // parts, inputs), columns_HIR.expand(heads * parts, -1, -1), beta=0, alpha=scale
    )
    return small_HMR


def row_parts(rows: int) -> int:
    """Return the fewest equal parts of at most THIN_ROWS rows; 1 where there are none but many small ones."""
    fewest = -(-rows // THIN_ROWS)
    return next((parts for parts in range(fewest, MOST_PARTS + 1) if rows % parts == 0), 1)


class _CopiesLinear(torch.autograd.Function):
    """y = x·Wᵀ + bias for C copies of a layer; the gradient of W is computed in W's own layout.

    Autograd's product would leave it transposed, and accumulating would copy it: all of a layer's weights, C times.
    """

    @staticmethod
    def forward(ctx: Any, x_CMI: Tensor, weight_COI: Tensor, bias_CO: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_CMI, weight_COI)
        if bias_CO is None:
            return torch.bmm(x_CMI, weight_COI.mT)
        return torch.baddbmm(bias_CO.unsqueeze(1), x_CMI, weight_COI.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_CMI, weight_COI = ctx.saved_tensors
        g_CMO = grads[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = torch.bmm(g_CMO, weight_COI) if needs_x else None
        grad_weight = torch.bmm(g_CMO.mT, x_CMI) if needs_weight else None
        return grad_x, grad_weight, sum_of_rows(g_CMO) if needs_bias else None


copies_linear = _CopiesLinear.apply
