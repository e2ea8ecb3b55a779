"""Top-k gradients with error feedback (Stich et al. 2018, arXiv 1809.07599, algorithm 1).

    p_n = g_n + e_n,   C(p)_i = p_i where |p_i| is among the k largest, else 0,   e_n ← p_n − C(p_n)

k is a share of each parameter's entries; values and their positions travel. AdamW steps with the mean over devices; the
error is in units of gradients, as without a learning rate inside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulate.methods.gathered_gradients import GatheredGradients
from simulate.methods.topk.options import TopkOptions


class Topk(GatheredGradients):
    """Dense training in which only the largest entries of gradients travel."""

    def compress(self, corrected_LX: Tensor) -> list[Tensor]:
        assert isinstance(self.run.method, TopkOptions)
        count = self.run.method.entries(corrected_LX.shape[1])
        index = corrected_LX.abs().topk(count, dim=1).indices
        values = corrected_LX.gather(1, index)
        corrected_LX.scatter_(1, index, 0.0)
        return [values, index.to(torch.int32)]

    def mean(self, messages: list[Tensor], elements: int) -> Tensor:
        values, index = messages
        total_X = values.new_zeros(elements)
        for value, where in zip(values, index, strict=True):  # one device after the other: the order of sums is fixed
            total_X.index_add_(0, where.long(), value)
        return total_X / len(values)
