"""One file a method. Names resolve lazily, so that listing them costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from simulate.communicator import Communicator
    from simulate.config import Run
    from simulate.methods.base import Method

_CLASSES = {
    "lte": "simulate.methods.lte:Lte",
    "ddp": "simulate.methods.ddp:Ddp",
    "lora": "simulate.methods.lora:Lora",
    "relora": "simulate.methods.relora:Relora",
    "mhlora": "simulate.methods.mhlora:Mhlora",
    "local-sgd": "simulate.methods.local_sgd:LocalSgd",
    "diloco": "simulate.methods.diloco:Diloco",
    "daso": "simulate.methods.daso:Daso",
    "sapipe": "simulate.methods.sapipe:Sapipe",
    "adamix": "simulate.methods.adamix:Adamix",
    "powersgd": "simulate.methods.powersgd:PowerSgd",
    "topk": "simulate.methods.topk:Topk",
    "signsgd": "simulate.methods.signsgd:Signsgd",
}


def build_method(
    run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
) -> Method:
    """Return the method that run.toml names, on `device`, for the run's own network or for another plain one."""
    module, _, name = _CLASSES[run.method.name].partition(":")
    method: Method = getattr(import_module(module), name)(run, communicator, device, network)
    return method
