"""The phases of a step, a merge or an evaluation in which a device's memory can peak."""

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
    """Bytes at one moment, on top of the state that is held all the time."""

    name: PhaseName
    gradients: int
    activations: int
    """Bytes that the forward pass has kept for the backward pass."""
    temporary: int
    dropped: int = 0
    """Optimizer bytes that the preceding merge already freed."""

    @cached_property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.activations + self.temporary - self.dropped


@dataclass(frozen=True)
class WeightMaterialisation:
    """How an evaluation computes the weights of adapted layers, one layer at a time."""

    tensors: int = 0
    """Tensors of a weight's size at the peak of computing it; 0 where weights are stored ready to use."""
    quantize: str = "none"
    """Format that the frozen weights are unpacked from, which happens last."""

    def height(self, weights: int, element_bytes: int, outputs: int) -> int:
        """Return the peak bytes of computing a weight and using it; `outputs` are the bytes of its layer's outputs."""
        if not self.tensors:
            return outputs
        whole = weights * element_bytes
        # Three moments compete: all tensors in full, the last one while it is unpacked, and the pass itself.
        unpacking = (self.tensors - 1) * whole + unpacking_bytes(weights, self.quantize, element_bytes)
        return max(self.tensors * whole, unpacking, whole + outputs)


AS_THEY_ARE = WeightMaterialisation()
"""Weights that are stored ready to use."""
