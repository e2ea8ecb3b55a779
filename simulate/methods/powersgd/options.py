"""Keys of [method] for PowerSGD; torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from simulate.config.method_options import MethodOptions


class PowerSgdOptions(MethodOptions):
    """PowerSGD (arXiv 1905.13727): rank-r power iteration on gradients, with error feedback."""

    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(default=4, gt=0)

    def is_compressible(self, shape: Sequence[int]) -> bool:
        """Whether the factors of a matrix are smaller than the matrix; all else travels as it is."""
        return len(shape) == 2 and self.rank * sum(shape) < math.prod(shape)
