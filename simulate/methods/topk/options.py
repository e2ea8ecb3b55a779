"""Keys of the [method] table; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import DenseOptions


class TopkOptions(DenseOptions):
    """The largest gradient entries with error feedback (arXiv 1809.07599)."""

    name: Literal["topk"] = "topk"
    density: float = Field(default=0.01, gt=0, le=1)
    """Share of each parameter's entries that travel, with their indices."""
