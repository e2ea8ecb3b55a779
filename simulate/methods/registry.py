"""Find a method's class by its name and build it; modules are imported when they are asked for."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from simulate.comm.base import Communicator
from simulate.config.run import Run
from simulate.methods.base import Method

_CLASSES = {
    "lte": "simulate.methods.lte.train:Lte",
    "ddp": "simulate.methods.ddp.train:Ddp",
    "lora": "simulate.methods.lora.train:Lora",
    "relora": "simulate.methods.relora.train:Relora",
    "mhlora": "simulate.methods.mhlora.train:Mhlora",
    "local-sgd": "simulate.methods.local_sgd.train:LocalSgd",
    "diloco": "simulate.methods.diloco.train:Diloco",
    "daso": "simulate.methods.daso.train:Daso",
    "sapipe": "simulate.methods.sapipe.train:Sapipe",
    "adamix": "simulate.methods.adamix.train:Adamix",
    "powersgd": "simulate.methods.powersgd.train:PowerSgd",
    "topk": "simulate.methods.topk.train:Topk",
    "signsgd": "simulate.methods.signsgd.train:Signsgd",
}


def build_method(
    run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
) -> Method:
    """Return the method that run.toml names, on `device`, for the run's own network or for another plain one."""
    module, _, name = _CLASSES[run.method.name].partition(":")
    method: Method = getattr(import_module(module), name)(run, communicator, device, network)
    return method
