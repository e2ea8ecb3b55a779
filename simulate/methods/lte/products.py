"""Sums of the heads' products B·A, and the teams of heads of one rank in which a merge adds them up.

simulate.methods.lte.merge calls these for heads that are here and for those that have been gathered.

Legend: N devices, K heads of a device, H heads, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulate.layers.columns import Columns
from simulate.methods.lte.options import LteOptions


@dataclass(frozen=True)
class Team:
    """Heads of consecutive devices that have one rank."""

    devices: range
    heads: range
    """Their global indices."""
    share: float
    """s/(N·K): what a head counts in the mean over all devices of means over their K heads, where devices weigh alike.
    """

    @classmethod
    def all_of(cls, options: LteOptions, devices: int) -> list[Team]:
        """Return the teams of all devices; one where they hold equal heads."""
        return [
            cls(one.devices, options.heads_of(one.devices), options.alpha / one.rank / (devices * one.heads_per_device))
            for one in options.teams(devices)
        ]


def add_products(
    base_OI: Tensor, a_HRI: Tensor | Columns, b_HOR: Tensor, share: float, out: Tensor | None = None
) -> None:
    """Write base + share·Σ_h B_h·A_h to `out`, (O, I), or to the base: no dense delta stands beside it."""
    out = base_OI if out is None else out
    if isinstance(a_HRI, Columns):
        if out is not base_OI:
            out.copy_(base_OI)
        a_HRI.add_products(out, b_HOR, share)
    else:
        torch.addmm(base_OI, *_stacked(a_HRI, b_HOR), alpha=share, out=out)


def weighted(b_HOR: Tensor, weights_H: Tensor | None) -> Tensor:
    """Return B times each head's weight; where all count alike, as it is."""
    return b_HOR if weights_H is None else b_HOR * weights_H.view(-1, 1, 1)


def sum_of_products(a_HRI: Tensor | Columns, b_HOR: Tensor) -> Tensor:
    """Return Σ_h B_h·A_h, (O, I): the sum of products, which a product of sums is not."""
    if isinstance(a_HRI, Columns):
        sum_OI = b_HOR.new_zeros(b_HOR.shape[1], a_HRI.inputs)
        a_HRI.add_products(sum_OI, b_HOR, 1.0)
        return sum_OI
    b_OX, a_XI = _stacked(a_HRI, b_HOR)
    return b_OX @ a_XI


def _stacked(a_HRI: Tensor, b_HOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return (O, H*R) and (H*R, I), whose product is the sum over heads of B_h·A_h."""
    return b_HOR.transpose(0, 1).reshape(b_HOR.shape[1], -1), a_HRI.reshape(-1, a_HRI.shape[2])
