"""Builds networks that users bring: imports module:factory, calls it, and checks the result.

Every way to plan or train such a network begins here, so that a user's mistake is one line that names it, rather than a
traceback from inside our layers. simulate.models.tracing calls this, and checks what only running it can tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from simulate.common.errors import InputError, first_line, near_match
from simulate.common.safetensors_writer import DTYPES
from simulate.common.user_code import import_named
from simulate.layers.convert import refuse_batch_norm
from simulate.models.interfaces import HUGGINGFACE, HuggingfaceOptions, UserNetworkOptions


def call_factory(options: UserNetworkOptions) -> nn.Module:
    """Return the network of a run's [model] table; raises InputError if the user's code does not make a usable one."""
    if options.family == HUGGINGFACE:
        from simulate.models.huggingface import build_huggingface

        network: Any = build_huggingface(cast(HuggingfaceOptions, options))
    else:
        factory = _factory(options.name)
        try:
            network = factory(**_keywords(options, factory))
        except (Exception, SystemExit) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"model.name = {options.name!r}: the factory raised {type(error).__name__}: {first_line(error)}; "
                "call it by itself to see where, or set its keywords in [model]"
            ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model.name = {options.name!r}: the factory returned a {type(network).__name__} where a torch.nn.Module "
            "is needed; return the network"
        )
    refuse_batch_norm(network)
    _refuse_wrapped(options.name, network)
    for name, parameter in network.named_parameters():
        _refuse_parameter(options.name, name, parameter)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.device.type != "cpu":
            raise InputError(
                f"model.name = {options.name!r}: {name} is on the device {tensor.device}; build the network on the "
                "CPU, with its start weights: the run moves it"
            )
        if tensor.is_inference():
            raise InputError(
                f"model.name = {options.name!r}: {name} was made in torch.inference_mode, where nothing is trained; "
                "build the network outside of it"
            )
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES:
            raise InputError(
                f"model.name = {options.name!r}: {name} is {dtype}, which no checkpoint can hold; supported: "
                f"{', '.join(DTYPES)}"
            )
    _refuse_shared_memory(options.name, network)
    for tensor in (*network.parameters(), *network.buffers()):
        # Gradients and messages are seen as rows of numbers, and a checkpoint is read into each number's own memory.
        tensor.data = tensor.data.contiguous()
    for name, module in network.named_modules():
        # Attention and recurrent layers have a probability named dropout.
        probability = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if isinstance(probability, int | float) and probability > 0:
            raise InputError(
                f"model: {name} ({type(module).__name__}) drops activations with probability {probability:g}, drawn "
                "outside of the run's seed, so that no run could be repeated or resumed; build the network with "
                "dropout 0"
            )
    return network


def _refuse_wrapped(network_name: str, network: nn.Module) -> None:
    """Raise InputError for modules whose layers cannot be replaced, or have no weights yet."""
    for name, module in network.named_modules():
        kind = type(module).__name__
        where = f"{name} ({kind})" if name else f"the network ({kind})"
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule) or kind in _WRAPPERS:
            raise InputError(
                f"model.name = {network_name!r}: {where} is scripted, compiled or wrapped, so that its layers "
                "cannot be given copies for devices; return the plain module"
            )
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise InputError(
                f"model.name = {network_name!r}: {where} has no weights before its first samples; name its sizes, or "
                "pass it samples in the factory"
            )


_WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def _refuse_parameter(network_name: str, name: str, parameter: nn.Parameter) -> None:
    """Raise InputError for a parameter that would not be trained as it is."""
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise InputError(
            f"model.name = {network_name!r}: {name} has a hook on its gradient, which devices' own copies would not "
            "have; compute it in forward, or set requires_grad = False to freeze the parameter"
        )
    if parameter.requires_grad and parameter.numel() == 0:
        raise InputError(
            f"model.name = {network_name!r}: {name} has no elements; leave the layer out where its size is 0, or set "
            "requires_grad = False"
        )
    if parameter.is_complex() or (parameter.is_floating_point() and parameter.dtype != torch.float32):
        raise InputError(
            f"model.name = {network_name!r}: {name} is {str(parameter.dtype).removeprefix('torch.')}; build the "
            "network in float32, and let train.dtype and train.autocast choose the format"
        )


def _refuse_shared_memory(network_name: str, network: nn.Module) -> None:
    """Raise InputError for two parameters, or a parameter and a buffer, that partly lie in the same memory.

    Plain training moves both with either one; copies for devices would part them without a word.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.numel() and not tensor.is_sparse:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for tensors in by_storage.values():
        if len(tensors) == 1 or not isinstance(tensors[0][1], nn.Parameter):  # parameters come first
            continue
        storage = tensors[0][1].untyped_storage()
        owner = torch.zeros(storage.nbytes(), dtype=torch.int32)  # of each byte: the parameter's number, from 1 on
        for number, (name, tensor) in enumerate(tensors, 1):
            numbers = torch.arange(storage.nbytes() // tensor.element_size())
            own = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) * tensor.element_size()
            if other := int(owner[own].max()):
                raise InputError(
                    f"model.name = {network_name!r}: {tensors[other - 1][0]} and {name} lie in the same memory, "
                    "without being one parameter; give both modules the same nn.Parameter, or clone the tensor"
                )
            if isinstance(tensor, nn.Parameter):
                owner[own] = number


def _factory(name: str) -> Callable[..., Any]:
    factory = import_named("model.name", name)
    if not callable(factory):
        raise InputError(f"model.name = {name!r}: it is no function or class; name what returns the network")
    return cast(Callable[..., Any], factory)


def _keywords(options: UserNetworkOptions, factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the sizes that the factory has parameters for; raises InputError for an extra key that it lacks."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        return {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    extra_keys = options.model_extra or {}
    for key in extra_keys:
        if key not in parameters and not takes_all:
            raise InputError(f"model.{key} is no parameter of {options.name}; {near_match(key, parameters)}")
    return {key: value for key, value in options.keywords().items() if key in parameters or key in extra_keys}
