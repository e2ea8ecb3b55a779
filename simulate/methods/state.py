"""The tensors of a run by name, as checkpoints and recovery points pass them on, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # listing checkpoints must not cost torch's import
    from torch import Tensor


@dataclass(frozen=True)
class State:
    """Tensors of a run by name: those that all devices share, and those of each device alone."""

    shared: dict[str, Tensor] = field(default_factory=dict)
    of_devices: dict[int, dict[str, Tensor]] = field(default_factory=dict)
