"""Keys of [method] for SAPipe; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulate.config.method_options import MethodOptions
from simulate.config.tables import Cluster, Train
from simulate.models.schema import ModelOptions


class SapipeOptions(MethodOptions):
    """SAPipe (NeurIPS 2022): averaged gradients arrive one step late, and devices predict the weights to come."""

    name: Literal["sapipe"] = "sapipe"
    compensation: Literal["none", "prediction", "delay"] = "prediction"
    """none: plain stale gradients; prediction: gradients are taken at weights predicted with the device's own gradient;
    delay: stale gradients are corrected to first order (arXiv 1609.08326)."""
    delay_factor: float = Field(default=0.2, ge=0)
    """Strength of the delay compensation."""

    @property
    def reads_adam_moments(self) -> bool:
        return self.compensation == "prediction"

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        super().check(model, train, cluster)
        if not self.reads_adam_moments:
            return
        if train.optimizer != "adamw":
            raise ValueError(
                f"train.optimizer = {train.optimizer!r} cannot predict sapipe's weights, which is done with Adam's "
                "moments; try --set train.optimizer=adamw or --set method.compensation=none"
            )
        if train.optimizer_state == "8bit":
            raise ValueError(
                "train.optimizer_state = '8bit' has no moments that sapipe could predict weights with; "
                "try --set train.optimizer_state=fp32 or --set method.compensation=none"
            )
