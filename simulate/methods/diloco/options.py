"""Keys of [method] for DiLoCo; torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from simulate.comm.transfers import Wire
from simulate.config.method_options import FragmentOptions


class DilocoOptions(FragmentOptions):
    """DiLoCo (arXiv 2311.08105): local AdamW, and Nesterov momentum on the averaged change of each round.

    The paper merges every 500 steps. `fragments` and `merge_delay` are Streaming DiLoCo's (arXiv 2501.18512).
    """

    takes_classes: ClassVar[bool] = True
    name: Literal["diloco"] = "diloco"
    outer_learning_rate: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    wire: Wire = "full"
    """Format in which outer gradients travel."""
