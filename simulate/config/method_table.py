"""Find a method by its name in run.toml: ours through one table of folders, others as package.module:Name.

A method has three parts: `options` (a subclass of MethodOptions: its keys of [method]), `plan` (built from the options;
simulate.rules.method_plan) and `train` (the algorithm; simulate.methods.registry builds it). Ours lie in a module each,
options.py, plan.py and train.py of the method's folder, and only the module that is asked for is imported: planning
never imports torch for them. The schema of run.toml, the costs and the registry ask here. Torch-free.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

from simulate.common.errors import InputError, near_match
from simulate.common.user_code import import_named
from simulate.config.method_options import MethodOptions

DEFAULT_METHOD, BASELINE = "lte", "ddp"
"""Method of a run that names none, and the method that plans and reports compare all others with."""
_FOLDERS = {
    "lte": ("lte", "Lte"),
    "ddp": ("ddp", "Ddp"),
    "lora": ("lora", "Lora"),
    "relora": ("relora", "Relora"),
    "mhlora": ("mhlora", "Mhlora"),
    "local-sgd": ("local_sgd", "LocalSgd"),
    "diloco": ("diloco", "Diloco"),
    "sparseloco": ("sparseloco", "Sparseloco"),
    "daso": ("daso", "Daso"),
    "sapipe": ("sapipe", "Sapipe"),
    "adamix": ("adamix", "Adamix"),
    "powersgd": ("powersgd", "PowerSgd"),
    "topk": ("topk", "Topk"),
    "signsgd": ("signsgd", "Signsgd"),
}
"""By name in run.toml: the folder in simulate/methods, and the prefix of the names of its classes."""
METHOD_NAMES = tuple(_FOLDERS)
PARTS = ("options", "plan", "train")
OUTSIDE = ":"
"""Character that only names of methods from outside have, between module and object: package.module:Name."""


class OutsideMethod(Protocol):
    """Object behind a name package.module:Name; a class or a module with these three attributes will do."""

    options: type[MethodOptions]
    plan: Any
    train: Any


def method_part(name: str, part: str) -> Any:
    """Return the options, plan or train class of a method; raises InputError where there is none of that name."""
    if name in _FOLDERS:
        folder, prefix = _FOLDERS[name]
        suffix = "" if part == "train" else part.title()  # diloco/train.py has Diloco, diloco/plan.py has DilocoPlan
        return getattr(import_module(f"simulate.methods.{folder}.{part}"), prefix + suffix)
    if OUTSIDE not in name:
        raise InputError(
            f"method.name = {name!r} is not a method; {near_match(name, METHOD_NAMES)}; or name one of yours as "
            "package.module:Name"
        )
    return getattr(_outside(name), part)


def method_options(name: Any) -> type[MethodOptions]:
    """Return the class of a method's options; raises InputError where there is none of that name."""
    if not isinstance(name, str):  # as a file may have it
        raise InputError(f"method.name = {name!r} is not text; give it one of {', '.join(METHOD_NAMES)}")
    return cast(type[MethodOptions], method_part(name, "options"))


def default_options(name: str) -> MethodOptions:
    """Return a method's options at their defaults."""
    return method_options(name)(name=name)


@lru_cache(maxsize=16)
def _outside(name: str) -> OutsideMethod:
    """Import a method from outside, and check that it has all parts before anything asks for one of them."""
    method = import_named("method.name", name)
    # Checked here, so that a missing part is an error of the user's line, not one of a later attribute.
    missing = [part for part in PARTS if not hasattr(method, part)]
    if missing:
        raise InputError(f"method.name = {name!r} has no {' and no '.join(missing)}; give it {', '.join(PARTS)}")
    if not (isinstance(method.options, type) and issubclass(method.options, MethodOptions)):
        raise InputError(
            f"method.name = {name!r} has options = {method.options!r}, which is no subclass of MethodOptions "
            "(simulate.config.method_options); derive it from that class, or from RoundOptions or AdapterOptions"
        )
    return cast(OutsideMethod, method)
