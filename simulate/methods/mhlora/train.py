"""Multi-head LoRA (Huh et al. 2024, arXiv 2402.16828, section 3): what LTE approximates, synchronised at every step.

    y = W·x + (s/H)·Σ_h B_h·A_h·x

Every device holds all H heads and sees their mean in every pass; gradients are averaged as in data parallelism. The H
pairs, stacked, are one pair of rank H·r at scale s/H; every head's A is a draw of its own.
"""

from __future__ import annotations

from dataclasses import replace

from simulate.layers.lora import AdapterSpec
from simulate.methods.lora.train import Lora, adapter_options


class Mhlora(Lora):
    """All heads on all devices."""

    def spec(self) -> AdapterSpec:
        heads = self.run.heads
        return replace(super().spec(), scale=adapter_options(self).scale / heads, draws_per_head=heads)
