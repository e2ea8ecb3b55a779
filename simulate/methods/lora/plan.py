"""Forecast of LoRA under data parallelism: the gradients of one pair a layer at every step; torch-free."""

from __future__ import annotations

from simulate.methods.lora.options import LoraOptions
from simulate.methods.plans import AdapterPlan


class LoraPlan(AdapterPlan[LoraOptions]):
    """The plan of one shared adapter that is never merged."""
