"""Everything that a method goes on from, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class State:
    """Tensors of a run: what all devices have in common, and what each has for itself, by device and name."""

    shared: dict[str, Tensor] = field(default_factory=dict)
    of_devices: dict[int, dict[str, Tensor]] = field(default_factory=dict)
