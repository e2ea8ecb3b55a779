"""Keys of the [method] table; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulate.comm.transfers import Wire
from simulate.config.method_options import DenseOptions, Pace, Steps


class DilocoOptions(DenseOptions):
    """DiLoCo (arXiv 2311.08105): local AdamW, and Nesterov momentum on the averaged change of each round."""

    name: Literal["diloco"] = "diloco"
    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round (the paper: 500)."""
    outer_learning_rate: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    wire: Wire = "full"
    """Format in which outer gradients travel."""
    fragments: int = Field(default=1, gt=0)
    """Groups of parameters that merge at staggered steps (Streaming DiLoCo, arXiv 2501.18512)."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels (Streaming DiLoCo's overlap); 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and counts for what it trained on."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: what the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, in place of a deadline, and again from the start: [[10, 3], [10, 4]]."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    @property
    def merges_per_round(self) -> int:
        return self.fragments

    @model_validator(mode="after")
    def _delay_fits(self) -> DilocoOptions:
        self._check_delay()
        self._check_pace()
        return self
