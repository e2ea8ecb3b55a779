"""Keys of [method] for multi-head LoRA; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import SharedAdapterOptions


class MhloraOptions(SharedAdapterOptions):
    """Multi-head LoRA (arXiv 2402.16828, section 3): all heads on every device, synchronised at every step."""

    name: Literal["mhlora"] = "mhlora"
    heads_per_device: int = Field(default=1, gt=0)
    """The model has N times this many heads, whose mean product is added to W."""

    def num_heads(self, devices: int) -> int:
        return devices * self.heads_per_device

    def held_rank(self, devices: int) -> int:
        return devices * self.heads_per_device * self.rank

    def row_rank(self, devices: int) -> int:
        return self.held_rank(devices)
