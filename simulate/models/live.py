"""Networks and losses that somebody holds in Python, registered so that a run can name them.

A network is copied when it is given, and each build is a copy of that copy: a run starts from the weights that it had
then, and the object itself is never trained. The digest in a name is of all that the network computes from which can be
seen: weights, settings and the code of its classes; functions that these call are not looked into. ltecli.api calls it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from simulate.common.errors import InputError, first_line
from simulate.common.live_objects import digest_of, register

PLAIN = (bool, int, float, str, bytes, type(None))
"""Types of settings that look the same in every process."""


NOT_HASHED = ("torch", "builtins", "typing", "abc")
"""Packages whose code is told by its version, which a run's events have."""


class LiveNetwork:
    """A network as it was when it was given; a call returns a copy on the CPU."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self._network)


class LiveLoss:
    """A loss of (outputs, targets)."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets)


def register_network(network: nn.Module) -> tuple[str, LiveNetwork]:
    """Return the name of a network, and what must be held for as long as the name is used; raises InputError."""
    try:
        copied = copy.deepcopy(network).to("cpu")
    except Exception as error:
        raise InputError(
            f"model = {type(network).__name__}: it cannot be copied ({type(error).__name__}: {first_line(error)}); "
            "keep computed tensors out of attributes, or name module:factory"
        ) from error
    copied.zero_grad(set_to_none=True)
    live = LiveNetwork(copied)
    return register(type(network).__name__, digest_of(_parts_of_network(copied)), live), live


def register_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[str, LiveLoss]:
    """Return the name of a loss, and what must be held for as long as the name is used; raises InputError."""
    if not callable(loss):
        raise InputError(f"loss = {loss!r}: a function of (outputs, targets) is needed")
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise InputError(
            f"loss = {type(loss).__name__}: it has parameters, which would not be trained; move them into the network"
        )
    live = LiveLoss(loss)
    kind = "".join(x for x in getattr(loss, "__name__", type(loss).__name__) if x.isalnum() or x == "_")
    return register(kind, digest_of(_parts_of(loss)), live), live


def _parts_of_network(network: nn.Module) -> Iterator[bytes | str]:
    """Yield all that a network computes from, as far as it can be seen."""
    classes: dict[type, None] = {}
    for name, module in network.named_modules():
        yield f"{name} {type(module).__module__}.{type(module).__qualname__}"
        classes |= dict.fromkeys(x for x in type(module).__mro__ if x.__module__.partition(".")[0] not in NOT_HASHED)
        settings = {key: value for key, value in vars(module).items() if key != "training" and not key.startswith("_")}
        yield from (f"{key}={_plain_text(value)}" for key, value in sorted(settings.items()))
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
        if not nn.parameter.is_lazy(tensor):
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    for found in classes:
        for key, value in sorted(vars(found).items()):
            if isinstance(value, FunctionType | staticmethod | classmethod | property):
                yield key
                yield from _parts_of(value)


def _parts_of(found: Any) -> Iterator[bytes | str]:
    """Yield what a callable computes from, as far as it can be seen: code, defaults and captured plain values."""
    if isinstance(found, nn.Module):
        yield from _parts_of_network(found)
    elif isinstance(found, property):
        yield from (part for function in (found.fget, found.fset) if function for part in _parts_of(function))
    elif isinstance(found, staticmethod | classmethod):
        yield from _parts_of(found.__func__)
    elif isinstance(found, FunctionType):
        yield from _parts_of_code(found.__code__)
        yield from (_plain_text(value) for value in found.__defaults__ or ())
        yield from (f"{key}={_plain_text(value)}" for key, value in (found.__kwdefaults__ or {}).items())
        yield from (_plain_text(cell.cell_contents) for cell in found.__closure__ or () if _is_filled(cell))
    elif hasattr(found, "func"):  # functools.partial
        yield from _parts_of(found.func)
        yield from (_plain_text(value) for value in (*found.args, *found.keywords.items()))
    else:
        yield f"{type(found).__module__}.{type(found).__qualname__} {getattr(found, '__qualname__', '')}"
        yield from _parts_of_code(code) if (code := getattr(type(found).__call__, "__code__", None)) else ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False


def _parts_of_code(code: CodeType) -> Iterator[bytes | str]:
    yield code.co_code
    yield " ".join(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:
            yield _plain_text(constant)


def _plain_text(value: Any) -> str:
    """Return a text of a value that is the same in every process; of objects, their type alone."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_plain_text, value))})"
    if isinstance(value, set | frozenset):  # in an order that depends on the process
        return f"{{{', '.join(sorted(map(_plain_text, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_plain_text(k)}: {_plain_text(v)}' for k, v in value.items())}}}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
