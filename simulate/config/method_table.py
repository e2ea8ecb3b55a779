"""Find a method by its name: ours through one table of dotted names, others as package.module:Name. Torch-free.

A method is an object with three parts: `options` (a subclass of MethodOptions: its keys of [method]), `plan` (built
from the options; simulate.rules.method_plan) and `train` (the algorithm, built by simulate.methods.registry).
Ours name each part as module:class, so that asking for one part imports neither the others nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from simulate.common.errors import InputError, near_match
from simulate.common.user_code import import_named
from simulate.config.method_options import MethodOptions

DEFAULT_METHOD, BASELINE = "lte", "ddp"
"""The method of a run that names none, and the one that all others are compared with."""
_ROOMS = {
    "lte": ("lte", "Lte"),
    "ddp": ("ddp", "Ddp"),
    "lora": ("lora", "Lora"),
    "relora": ("relora", "Relora"),
    "mhlora": ("mhlora", "Mhlora"),
    "local-sgd": ("local_sgd", "LocalSgd"),
    "diloco": ("diloco", "Diloco"),
    "daso": ("daso", "Daso"),
    "sapipe": ("sapipe", "Sapipe"),
    "adamix": ("adamix", "Adamix"),
    "powersgd": ("powersgd", "PowerSgd"),
    "topk": ("topk", "Topk"),
    "signsgd": ("signsgd", "Signsgd"),
}
"""Folder in simulate/methods and first part of the classes' names, by name in run.toml."""
METHOD_NAMES = tuple(_ROOMS)
PARTS = ("options", "plan", "train")
OUTSIDE = ":"
"""Is in every name of a method from outside: package.module:Name."""


class OutsideMethod(Protocol):
    """The object that a name package.module:Name leads to."""

    options: type[MethodOptions]
    plan: Any
    train: Any


@dataclass(frozen=True)
class _Room:
    """One of our methods, whose parts are imported when they are asked for."""

    folder: str
    prefix: str

    def part(self, part: str) -> Any:
        suffix = "" if part == "train" else part.title()
        return getattr(import_module(f"simulate.methods.{self.folder}.{part}"), self.prefix + suffix)


def method_part(name: str, part: str) -> Any:
    """Return the options, plan or train class of a method; raises InputError where there is none of that name."""
    if name in _ROOMS:
        return _Room(*_ROOMS[name]).part(part)
    if OUTSIDE not in name:
        raise InputError(f"method.name = {name!r} is not a method; {near_match(name, METHOD_NAMES)}")
    return getattr(_outside(name), part)


@lru_cache(maxsize=64)
def method_options(name: Any) -> type[MethodOptions]:
    """Return the class of a method's options; raises ValueError where there is none of that name."""
    try:
        return cast(type[MethodOptions], method_part(str(name), "options"))
    except InputError as error:
        raise ValueError(str(error)) from None


def default_options(name: str) -> MethodOptions:
    """Return a method's options at their defaults."""
    return method_options(name)(name=name)


@lru_cache(maxsize=16)
def _outside(name: str) -> OutsideMethod:
    method = import_named("method.name", name)
    missing = [part for part in PARTS if not hasattr(method, part)]
    if missing or not issubclass(method.options, MethodOptions):
        lack = missing[0] if missing else "options that subclass MethodOptions"
        raise InputError(f"method.name = {name!r} has no {lack}; give it {', '.join(PARTS)}")
    return cast(OutsideMethod, method)
