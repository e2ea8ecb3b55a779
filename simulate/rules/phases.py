"""The moments of a step, a merge or an evaluation at which a device can hold most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from simulate.layers.formats import unpacking_bytes

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
    """Optimizer bytes that the preceding merge already freed."""

    @cached_property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.activations + self.temporary - self.dropped


@dataclass(frozen=True)
class WeightMaterialisation:
    """How an evaluation comes to the weights of adapted layers, one at a time."""

    tensors: int = 0
    """Of a weight's size, at the height of making it; 0: they are there."""
    quantize: str = "none"
    """Format that they are unpacked from, last of all."""

    def height(self, weights: int, element_bytes: int, outputs: int) -> int:
        """Bytes at the height of making and using a weight, with the outputs that it leads to."""
        if not self.tensors:
            return outputs
        whole = weights * element_bytes
        unpacking = (self.tensors - 1) * whole + unpacking_bytes(weights, self.quantize, element_bytes)
        return max(self.tensors * whole, unpacking, whole + outputs)


AS_THEY_ARE = WeightMaterialisation()
"""Weights that are there."""
