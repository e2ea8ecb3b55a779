"""Build the method that a run names: ours, or one from outside this package. Torch waits until a method is built.

`method.merge_delay` changes when any method merges, `method.pace` which devices step, and a quorum who takes part in
merges. Each has a class of its own, put in front of the method's class here, so that methods are written, and read,
without them.
"""

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
    if len({run.class_of(device) for device in communicator.local_devices}) > 1:
        from simulate.methods.unequal import Unequal

        return Unequal(build_method, run, communicator, device, network)
    train = method_part(run.method.name, "train")
    if run.method.late_steps:
        from simulate.methods.overlapped import Delayed

        train = type(f"Delayed{train.__name__}", (Delayed, train), {})
    if run.method.is_paced:
        from simulate.methods.paced import Paced

        train = type(f"Paced{train.__name__}", (Paced, train), {})
    if run.cluster.has_quorum:
        from simulate.methods.quorum import Quorum

        train = type(f"Quorum{train.__name__}", (Quorum, train), {})
    return cast("Method", train(run, communicator, device, network))
