"""Keys of the [method] table; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import DenseOptions


class PowerSgdOptions(DenseOptions):
    """PowerSGD (arXiv 1905.13727): rank-r power iteration on gradients, with error feedback."""

    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(default=4, gt=0)
