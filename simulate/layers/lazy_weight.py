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


class LazyWeight(Tensor):
    """A tensor without storage, in whose place every operation gets what `make` returns, for as long as it runs.

    `form`, on the meta device, has the shape, strides and dtype of what is made, `device` is where. A view of it is one
    more of its kind, so that autograd, too, keeps nothing of what is made: the backward pass makes it again. Nothing
    can be written to it.
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
        """Return the same weight for somebody who differentiates to it."""
        return LazyWeight(self.make, self.form, self.device, requires_grad=True)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        if func in VIEWS:
            weight, *how = args
            return cls(lambda: func(weight.make(), *how), func(weight.form, *how), weight.device)
        made, named = tree_map_only(cls, lambda weight: weight.make(), (args, kwargs or {}))
        return func(*made, **named)


_ATEN = torch.ops.aten
VIEWS = {
    _ATEN.detach.default, _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default,
    _ATEN.unsqueeze.default, _ATEN.squeeze.default, _ATEN.expand.default, _ATEN.slice.Tensor, _ATEN.select.int,
}  # fmt: skip
"""Operations that make one view of a tensor."""
