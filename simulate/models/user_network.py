"""Networks that users bring: module:factory, imported, called, and looked at before anything is planned with them."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from simulate.common.errors import InputError, near_match
from simulate.models.schema import FactoryModel, HuggingfaceModel

FOLDER_OF_MODULES = os.getcwd
"""Modules are looked for in the current folder, too, as `python -m` does."""


def call_factory(options: FactoryModel) -> nn.Module:
    """Return the network of a run's [model] table; raises InputError where the user's code does not make one."""
    if isinstance(options, HuggingfaceModel):
        from simulate.models.huggingface import build_huggingface

        network: Any = build_huggingface(options)
    else:
        factory = _factory(options.name)
        try:
            network = factory(**_keywords(options, factory))
        except Exception as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"model.name = {options.name!r}: the factory raised {type(error).__name__}: {error}; "
                "call it by itself to see where, or set its keywords in [model]"
            ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model.name = {options.name!r}: the factory returned a {type(network).__name__} where a torch.nn.Module "
            "is needed; return the network"
        )
    for name, module in network.named_modules():
        _check_layer(name, module)
    return network


def _check_layer(name: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        raise InputError(
            f"model: {name} is a {type(module).__name__}, whose running statistics mix samples and belong to no "
            "device's parameters; use LayerNorm, RMSNorm or GroupNorm"
        )
    share = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    if isinstance(share, float) and share > 0:
        raise InputError(
            f"model: {name} ({type(module).__name__}) drops activations with probability {share:g}, drawn outside of "
            "the run's seed, so that no run could be repeated or resumed; build the network with dropout 0"
        )


def _factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    module = _imported(module_name, name)
    factory = getattr(module, attribute, None)
    if factory is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"model.name = {name!r}: {module_name} has no {attribute!r}; {near_match(attribute, known)}")
    if not callable(factory):
        raise InputError(f"model.name = {name!r}: {attribute} is no function or class; name what returns the network")
    return factory


def _imported(module_name: str, name: str) -> ModuleType:
    folder = FOLDER_OF_MODULES()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"model.name = {name!r}: {error}; the form is package.module:factory, and modules are found in the current "
            "folder and where Python is installed"
        ) from None
    except Exception as error:
        raise InputError(
            f"model.name = {name!r}: importing {module_name} raised {type(error).__name__}: {error}; mend it first"
        ) from error


def _keywords(options: FactoryModel, factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the sizes that the factory has parameters for; what the user gave beyond ours must be among them."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    extras = options.model_extra or {}
    for key in extras:
        if key not in parameters and not takes_all:
            raise InputError(f"model.{key} is no parameter of {options.name}; {near_match(key, parameters)}")
    return {key: value for key, value in options.keywords().items() if key in parameters or key in extras}
