"""Keys of [method] for dense data parallelism; torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from simulate.comm.transfers import Wire
from simulate.config.method_options import MethodOptions


class DdpOptions(MethodOptions):
    """Dense data parallelism: gradients of all parameters are averaged at every step."""

    takes_classes: ClassVar[bool] = True
    name: Literal["ddp"] = "ddp"
    wire: Wire = "full"
    """Format in which gradients travel."""
