"""Keys of the [method] table; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import DenseOptions


class SapipeOptions(DenseOptions):
    """SAPipe (NeurIPS 2022): averaged gradients arrive one step late, and devices predict the weights to come."""

    name: Literal["sapipe"] = "sapipe"
    compensation: Literal["none", "prediction", "delay"] = "prediction"
    """none: plain stale gradients; prediction: gradients are taken at weights predicted with the device's own gradient;
    delay: stale gradients are corrected to first order (arXiv 1609.08326)."""
    delay_factor: float = Field(default=0.2, ge=0)
    """Strength of the delay compensation."""
