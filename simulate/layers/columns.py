"""Heads whose A picks columns: each row of A is sqrt(I/R) at one input and 0 elsewhere, so that no product needs it.

x·Aᵀ is a gather of R columns of x, and B·A is B, written into R columns of a weight: a head trains a slice of each
weight (Partial Parameter Updates, arXiv 2509.22418). Only the columns' numbers are kept. Columns that follow one
another are a slice, which a CPU reads and writes without a gather. simulate.layers.lora draws them and calls
`column_function` in the layers that have them; merges add by `Columns`.

Legend: H heads, M rows of one head, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from simulate.layers.dtypes import product_dtype
from simulate.layers.folding import writes_columns
from simulate.layers.products import sum_of_rows
from simulate.layers.quantized import QuantizedWeight, dense


@dataclass(frozen=True)
class Columns:
    """A of some heads, by the input that each of its rows picks."""

    columns_HR: Tensor
    inputs: int
    sliced: bool = False
    """Whether the columns of each head follow one another."""

    @property
    def scale(self) -> float:
        """The one entry of a row that is not 0: rows have the norm of other draws', sqrt(I/R)."""
        return math.sqrt(self.inputs / self.columns_HR.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the columns' numbers are."""
        return self.columns_HR.device

    def __getitem__(self, heads: slice | Tensor) -> Columns:
        return Columns(self.columns_HR[heads], self.inputs, self.sliced)

    def slices(self) -> list[slice] | None:
        """Return each head's columns as a slice; None where they are none, or where numbers cannot be read at once.

        A GPU would have to be waited for, and fake tensors have none; both take the columns one by one.
        """
        first_H = self.columns_HR[:, 0]
        if not self.sliced or isinstance(first_H, FakeTensor) or first_H.device.type != "cpu":
            return None
        return [slice(first, first + self.columns_HR.shape[1]) for first in first_H.tolist()]

    def dense(self, like: Tensor) -> Tensor:
        """Return A as a matrix of each head, (H, R, I), with dtype and device of `like`."""
        a_HRI = like.new_zeros(*self.columns_HR.shape, self.inputs)
        return a_HRI.scatter_(2, self.columns_HR.unsqueeze(2), self.scale)

    def add_products(self, target_OI: Tensor, b_HOR: Tensor, share: float) -> None:
        """Add share·Σ_h B_h·A_h to `target_OI`."""
        # Head by head: no column stands twice in one call, so that sums come in one order on every device.
        for columns_R, b_OR in zip(self.columns_HR, b_HOR, strict=True):
            target_OI.scatter_add_(1, columns_R.expand(b_OR.shape), b_OR * (share * self.scale))


def column_order(random: np.random.Generator, inputs: int, rank: int) -> np.ndarray:
    """Return a random order of the inputs, of which heads take `rank` after `rank`."""
    return random.permutation(inputs)


def slice_order(random: np.random.Generator, inputs: int, rank: int) -> np.ndarray:
    """Return the inputs of each slice of `rank` that follow one another, slices in a random order.

    What is left over where the rank does not divide the inputs lies between two slices, or at an end.
    """
    fit = inputs // rank
    slices, gap = random.permutation(fit), int(random.integers(fit + 1))
    starts = slices * rank + (slices >= gap) * (inputs - fit * rank)
    return (starts[:, None] + np.arange(rank)).ravel()


class _ColumnLinear(torch.autograd.Function):
    """y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ + bias for H heads that share W, where A picks columns; saves the picked columns of x.

    Heads with many rows write s·B into a copy of W, so that each pass is the dense layer's own product; for those with
    few rows the thin product costs less than the copy (simulate.layers.folding). The gradient of B is a product of R
    columns either way. W is unpacked and cast anew in both passes, as in simulate.layers.lora.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen_OI: Tensor | QuantizedWeight, bias_LO: Tensor | None, columns: Columns,
        b_HOR: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        heads, outputs, rank = b_HOR.shape
        x_HMI = x.to(product_dtype(x)).contiguous().view(heads, -1, columns.inputs)
        rows, scale = x_HMI.shape[1], scale * columns.scale
        picked_HMR = x_HMI.new_empty(heads, rows, rank)
        slices = columns.slices()
        if slices is None:
            for picked_MR, x_MI, columns_R in zip(picked_HMR, x_HMI, columns.columns_HR, strict=True):
                torch.index_select(x_MI, 1, columns_R, out=picked_MR)
        else:
            for picked_MR, x_MI, own in zip(picked_HMR, x_HMI, slices, strict=True):
                picked_MR.copy_(x_MI[:, own])
        y = x_HMI.new_empty(*x.shape[:-1], outputs)  # no view is returned, or nobody could write to it in place
        y_HMO, beta = y.view(heads, rows, outputs), 0 if bias_LO is None else 1
        if bias_LO is not None:  # written first, so that the product adds to it without a separate pass
            y_HMO.view(bias_LO.shape[0], -1, outputs).copy_(bias_LO.unsqueeze(1))
        _multiply(y_HMO, x_HMI, frozen_OI, columns, b_HOR, scale, beta, picked_HMR)
        plain_OI = frozen_OI if isinstance(frozen_OI, Tensor) else None
        ctx.save_for_backward(picked_HMR, plain_OI, columns.columns_HR, b_HOR)
        ctx.inputs, ctx.sliced = columns.inputs, columns.sliced
        # A module cannot be saved as a tensor. Only merges change it, and these happen between steps.
        ctx.quantized_OI = frozen_OI if plain_OI is None else None
        ctx.scale, ctx.num_bias, ctx.x_dtype = scale, 0 if bias_LO is None else bias_LO.shape[0], x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        picked_HMR, plain_OI, columns_HR, b_HOR = ctx.saved_tensors
        heads, rows = picked_HMR.shape[:2]
        grad_y = grads[0].contiguous()  # copied once here, or else in each of the products
        g_HMO = grad_y.view(heads, rows, -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            frozen_OI = plain_OI if ctx.quantized_OI is None else ctx.quantized_OI
            gx_HMI = g_HMO.new_empty(heads, rows, frozen_OI.shape[1])
            _multiply(gx_HMI, g_HMO, frozen_OI, Columns(columns_HR, ctx.inputs, ctx.sliced), b_HOR, ctx.scale)
            grad_x = gx_HMI.view(*grad_y.shape[:-1], -1).to(ctx.x_dtype)
        rows_of_bias = g_HMO.view(ctx.num_bias, -1, g_HMO.shape[2]) if ctx.needs_input_grad[2] else None
        grad_bias = None if rows_of_bias is None else sum_of_rows(rows_of_bias).to(b_HOR.dtype)
        grad_b = picked_HMR.new_empty(b_HOR.shape).baddbmm_(g_HMO.mT, picked_HMR, beta=0, alpha=ctx.scale)
        return grad_x, None, grad_bias, None, grad_b.to(b_HOR.dtype), None


def _multiply(
    out_HMX: Tensor, in_HMY: Tensor, frozen_OI: Tensor | QuantizedWeight, columns: Columns, b_HOR: Tensor,
    scale: float, beta: int = 0, picked_HMR: Tensor | None = None,
) -> None:  # fmt: skip
    """Set out to beta·out + in times each head's weight: transposed, where `picked` columns of x come with x; for a
    gradient of y as it is.
    """
    heads, rows = in_HMY.shape[:2]
    weight_OI, b_HOR = dense(frozen_OI).to(in_HMY.dtype), b_HOR.to(in_HMY.dtype)
    if writes_columns(rows, b_HOR.shape[2], weight_OI.shape[1]):
        written = _written(weight_OI, weight_OI is not frozen_OI, columns, b_HOR, scale)
        for out_MX, in_MY, own_OI in zip(out_HMX, in_HMY, written, strict=True):
            out_MX.addmm_(in_MY, own_OI if picked_HMR is None else own_OI.t(), beta=beta)
        return
    weight_YX = weight_OI if picked_HMR is None else weight_OI.t()
    out_HMX.flatten(0, 1).addmm_(in_HMY.flatten(0, 1), weight_YX, beta=beta)
    if picked_HMR is not None:
        out_HMX.baddbmm_(picked_HMR, b_HOR.mT, alpha=scale)
        return
    vs_HMR = in_HMY.new_empty(heads, rows, b_HOR.shape[2]).baddbmm_(in_HMY, b_HOR, beta=0, alpha=scale)
    slices = columns.slices()
    if slices is None:
        out_HMX.scatter_add_(2, columns.columns_HR.unsqueeze(1).expand(vs_HMR.shape), vs_HMR)
        return
    for out_MX, vs_MR, own in zip(out_HMX, vs_HMR, slices, strict=True):
        out_MX[:, own].add_(vs_MR)


def _written(weight_OI: Tensor, is_copy: bool, columns: Columns, b_HOR: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield each head's weight, W with scale·B added to its columns, in one tensor for all heads in turns.

    W itself is never written to, not even for the length of a product: a delayed merge may read it meanwhile. A lone
    head may have a W that `is_copy` already, unpacked or cast for this pass.
    """
    own_OI = weight_OI if is_copy and len(b_HOR) == 1 else torch.empty_like(weight_OI)
    slices = columns.slices()
    if slices is None:
        for columns_R, b_OR in zip(columns.columns_HR, b_HOR, strict=True):
            if own_OI is not weight_OI:
                own_OI.copy_(weight_OI)
            yield own_OI.scatter_add_(1, columns_R.expand(b_OR.shape), b_OR * scale)
        return
    if own_OI is not weight_OI:
        own_OI.copy_(weight_OI)
    for index, (own, b_OR) in enumerate(zip(slices, b_HOR, strict=True)):
        if index > 0:  # the head before leaves what W has
            own_OI[:, slices[index - 1]] = weight_OI[:, slices[index - 1]]
        own_OI[:, own].add_(b_OR, alpha=scale)
        yield own_OI


column_function = _ColumnLinear.apply
