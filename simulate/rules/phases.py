"""The moments of a step, a merge or an evaluation at which a device can hold most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

PhaseName = Literal[
    "forward", "backward_start", "backward_end", "optimizer_step", "round_figures", "merge", "gradient_figures",
    "outer_step", "evaluation", "checkpoint_save",
]  # fmt: skip
PHASES: tuple[PhaseName, ...] = (
    "forward", "backward_start", "backward_end", "optimizer_step", "round_figures", "merge", "gradient_figures",
    "outer_step", "evaluation", "checkpoint_save",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """Bytes beside what is held all the time, at one moment."""

    name: PhaseName
    gradients: int
    activations: int
    """What the forward pass has left for the backward pass."""
    temporary: int
    dropped: int = 0
    """Of what is held else, moments that the merge before dropped."""

    @cached_property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.activations + self.temporary - self.dropped
