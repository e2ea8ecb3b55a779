"""Build the method that a run names: ours, or one from outside this package. Torch waits until a method is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from simulate.config.method_table import method_part

if TYPE_CHECKING:
    import torch
    from torch import nn

    from simulate.comm.base import Communicator
    from simulate.config.run import Run
    from simulate.methods.base import Method


def build_method(
    run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
) -> Method:
    """Return the method that run.toml names, on `device`, for the run's own network or for another plain one."""
    train = method_part(run.method.name, "train")
    return cast("Method", train(run, communicator, device, network))
