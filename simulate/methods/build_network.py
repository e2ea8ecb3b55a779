"""From run.toml to a network: the same weights for the same seed, whoever builds it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from simulate.common.seeding import address
from simulate.config.run import Run
from simulate.layers.dtypes import CPU
from simulate.models.repeatable import seeded
from simulate.models.schema import FactoryModel


def build_model(run: Run) -> nn.Module:
    """Return the plain network with its start weights, drawn in float32 from (seed, "weights"), in the run's dtype.

    Where tensors are fake there is nothing to draw, and how often a draw is repeated would depend on it.
    """
    if active_fake_mode() is not None and not isinstance(run.model, FactoryModel):
        return _fake_network(run)
    with seeded(address(run.train.seed, "weights")):
        # In fp32 for every dtype, so that an fp64 run starts from the same numbers.
        model = _in_dtype(run, _network(run))
    if isinstance(run.model, FactoryModel) and run.train.dtype == "fp64" and active_fake_mode() is None:
        from simulate.models.tracing import check_double_precision

        check_double_precision(run.model, model)
    return model


def _in_dtype(run: Run, model: nn.Module) -> nn.Module:
    """Return a network in the run's dtype; networks are drawn in fp32.

    Module.to would also turn complex buffers (rotary factors) into their real parts.
    """
    return model.double() if run.train.dtype == "fp64" else model


def start_figures(run: Run) -> dict[str, tuple[float, float]]:
    """Return two figures of each tensor of a user's network as it starts; none for networks of ours.

    They are Σ i·w_i and the root of Σ (i·w_i)². Other draws move the first by about the second; another processor's
    rounding, by a millionth of it.
    """
    if not isinstance(run.model, FactoryModel):  # the seed alone decides
        return {}
    figures = {}
    for name, tensor in build_model(run).state_dict().items():
        if isinstance(tensor, torch.Tensor):
            weighted = tensor.detach().flatten().double().nan_to_num()
            weighted *= torch.linspace(1, 2, len(weighted), dtype=torch.float64)
            figures[name] = float(weighted.sum()), float(weighted.norm())
    return figures


def _fake_network(run: Run) -> nn.Module:
    with unset_fake_temporarily():
        network = empty_model(run)
    fakes: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in fakes:  # what is shared stays shared
                fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, fakes[id(parameter)])
    return network


def empty_model(run: Run, device: torch.device = CPU) -> nn.Module:
    """Return the plain network without storage for parameters, to be called with others' weights on `device`."""
    if isinstance(run.model, FactoryModel):
        from simulate.models.tracing import empty_traced

        return _in_dtype(run, empty_traced(run.model, device)).eval()
    with torch.device("meta"), _Undrawn():
        return _in_dtype(run, _network(run)).eval()


class _Undrawn(TorchFunctionMode):
    """Leaves out the draws of start weights where tensors have no storage.

    torch draws normal numbers on the meta device in Python code that imports torch.compile's tracer, in seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = kwargs.get("tensor", args[0] if args else None)
        is_draw = func in _DRAWS or getattr(func, "__module__", "") == nn.init.__name__
        if is_draw and isinstance(drawn, Tensor) and drawn.is_meta:
            return drawn
        return func(*args, **kwargs)


_DRAWS = (Tensor.normal_, Tensor.uniform_)


def _network(run: Run) -> nn.Module:
    if isinstance(run.model, FactoryModel):
        from simulate.models.tracing import build_traced

        return build_traced(run.model)
    family = run.model.family  # "gpt" is the class Gpt of simulate/models/gpt.py
    network_class = getattr(import_module(f"simulate.models.{family}"), family.title())
    network: nn.Module = network_class(run.model, run.train.activation_checkpointing)
    return network
