"""Keys of [method] for top-k sparsification; torch-free."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from simulate.config.method_options import MethodOptions

INDEX_BYTES = 4
"""An int32 position of an entry."""


class TopkOptions(MethodOptions):
    """The largest gradient entries with error feedback (arXiv 1809.07599)."""

    name: Literal["topk"] = "topk"
    density: float = Field(default=0.01, gt=0, le=1)
    """Share of each parameter's entries that travel, with their indices."""

    def entries(self, elements: int) -> int:
        """Return how many entries of a parameter travel: at least one."""
        return max(1, math.ceil(self.density * elements))
