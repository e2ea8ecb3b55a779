"""Keys of [method] for AdaMix; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import AdapterOptions


class AdamixOptions(AdapterOptions):
    """AdaMix (arXiv 2205.12410): a mixture of adapters with random routing, merged by averaging."""

    name: Literal["adamix"] = "adamix"
    experts: int = Field(default=4, gt=0)
    """Pairs to draw from; every step routes through one A and one B of each layer."""

    def num_heads(self, devices: int) -> int:
        return self.experts

    def held_rank(self, devices: int) -> int:
        return self.experts * self.rank
