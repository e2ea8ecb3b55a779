"""Keys of [method] for ReLoRA; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import SharedAdapterOptions


class ReloraOptions(SharedAdapterOptions):
    """ReLoRA (arXiv 2307.05695): one adapter under data parallelism, merged and drawn anew every T steps."""

    name: Literal["relora"] = "relora"
    merge_every: int = Field(default=100, gt=0)
    """Optimizer steps T from one restart to the next."""
    prune_share: float = Field(default=0.9, ge=0, le=1)
    """Share of the adapters' optimizer state that a restart zeroes: the entries of the smallest magnitude."""
    rewarm_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate climbs back after a restart."""
    warm_start_steps: int = Field(default=0, ge=0)
    """Dense steps before the first adapter."""

    def ends_plainly(self, steps: int) -> bool:
        return (steps - self.warm_start_steps) % self.merge_every != 0  # the last step is followed by no restart

    @property
    def keeps_master(self) -> bool:
        return self.quantize != "none"
