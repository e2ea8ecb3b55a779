"""Weights that are computed when an operation uses them, and freed after it.

A weight may lie in another memory, be quantized, or lack the adapters that belong to it. A network that is called with
lazy weights needs memory for one layer's at a time, however many layers it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyWeight(Tensor):
    """Tensor without storage: each operation gets the result of `make` in its place, and frees it afterwards.

    `form`, a meta tensor, has the shape, strides and dtype of the result; `device` is the result's. A view of a lazy
    weight is lazy too, so autograd saves no computed weight: the backward pass computes it again. Do not write to it.
    """

    make: Callable[[], Tensor]
    form: Tensor

    @staticmethod
    def __new__(
        cls, make: Callable[[], Tensor], form: Tensor, device: torch.device, requires_grad: bool = False
    ) -> LazyWeight:
        weight: LazyWeight = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device, requires_grad=requires_grad
        )
        weight.make, weight.form = make, form
        return weight

    def leaf(self) -> LazyWeight:
        """Return the same weight as a leaf that requires a gradient."""
        return LazyWeight(self.make, self.form, self.device, requires_grad=True)

    # Without this, torch would wrap every result in this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        # A transpose for a product, or a saved reference, must not compute the weight and keep it.
        if func in VIEWS:
            weight, *view = args
            return cls(lambda: func(weight.make(), *view), func(weight.form, *view), weight.device)
        computed, named = tree_map_only(cls, lambda weight: weight.make(), (args, kwargs or {}))
        return func(*computed, **named)


_ATEN = torch.ops.aten
VIEWS = {
    _ATEN.detach.default, _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default,
    _ATEN.unsqueeze.default, _ATEN.squeeze.default, _ATEN.expand.default, _ATEN.slice.Tensor, _ATEN.select.int,
}  # fmt: skip
"""Operations that return one view of a tensor."""
