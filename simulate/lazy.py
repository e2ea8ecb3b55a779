"""Weights that are made when something is computed with them, and let go right after.

A weight may lie in another memory, in fewer bytes, or apart from the adapters that belong to it. A network that is
called with such weights needs room for one layer's at a time, however many layers it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class MadeWeight(Tensor):
    """A tensor without storage, in whose place every operation gets what `make` returns, for as long as it runs.

    `form`, on the meta device, has the shape, strides and dtype of what is made, `device` is where. Nobody can
    differentiate to it, and nothing can be written to it.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], form: Tensor, device: torch.device) -> MadeWeight:
        weight: MadeWeight = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device
        )
        weight.make = make
        return weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        made, named = tree_map_only(cls, lambda weight: weight.make(), (args, kwargs or {}))
        return func(*made, **named)
