"""Keys of [method] for DASO; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulate.config.method_options import NodeOptions


class DasoOptions(NodeOptions):
    """DASO (arXiv 2104.05588): synchronous inside a node, delayed averaging between nodes."""

    name: Literal["daso"] = "daso"
    devices_per_node: int = Field(default=2, gt=0)
    merge_every: int = Field(default=4, gt=0)
    """Steps from one global exchange to the next."""
    delay_steps: int = Field(default=1, ge=0)
    """Steps that go on while a global exchange travels; 0 waits for it."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    def ends_plainly(self, steps: int) -> bool:
        return super().ends_plainly(steps) and self.delay_steps == 0

    @model_validator(mode="after")
    def _delay_within_round(self) -> DasoOptions:
        if self.delay_steps >= self.merge_every:
            raise ValueError(
                f"delay_steps = {self.delay_steps} is not below merge_every = {self.merge_every}; lower it, since one "
                "exchange travels at a time"
            )
        return self
