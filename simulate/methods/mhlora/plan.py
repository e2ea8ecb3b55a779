"""Forecast of multi-head LoRA: the gradients of all heads' pairs at every step; torch-free."""

from __future__ import annotations

from simulate.methods.mhlora.options import MhloraOptions
from simulate.methods.plans import AdapterPlan


class MhloraPlan(AdapterPlan[MhloraOptions]):
    """The plan of heads that every device holds, so that a row passes through all of them."""
