"""Sign gradients with error feedback (Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1).

    p_n = g_n + e_n,   C(p) = (‖p‖₁/d)·sign(p) with sign(0) = 1,   e_n ← p_n − C(p_n)

for each parameter of d entries; one bit an entry and one number travel. AdamW steps with the mean over devices; the
error is in units of gradients, as without a learning rate inside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulate.methods.gathered_gradients import GatheredGradients, pack_bits, unpack_bits


class Signsgd(GatheredGradients):
    """Dense training in which only signs of gradients travel, with one magnitude a parameter."""

    def compress(self, corrected_LX: Tensor) -> list[Tensor]:
        scale_L1 = corrected_LX.abs().mean(1, keepdim=True)
        positive_LX = corrected_LX >= 0
        corrected_LX.sub_(torch.where(positive_LX, scale_L1, -scale_L1))
        return [pack_bits(positive_LX), scale_L1]

    def mean(self, messages: list[Tensor], elements: int) -> Tensor:
        packed, scale_N1 = messages
        return torch.where(unpack_bits(packed, elements), scale_N1, -scale_N1).mean(0)
