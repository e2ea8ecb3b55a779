"""Pruning and forgetting of optimizer state after a merge: the moments of AdamW, of its 8-bit form, and of Muon.

Legend: C copies or heads, X elements of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from simulate.optim.adamw8bit import CODES, SCALES, moment_of, zero_moment
from simulate.optim.grouped import OptimizerState


def prune_moments(state: OptimizerState, parameters: Iterable[nn.Parameter], share: float) -> None:
    """Zero the `share` smallest entries, by magnitude, of each copy's and each moment's tensor.

    Adam's first moment goes as well wherever its second is zero: divided by almost nothing, it would blow up the step.
    """
    for parameter in parameters:
        moments = state[parameter]
        # Moments have the parameter's shape, in numbers or in codes; step counters and scales have not.
        names = [k.removesuffix(CODES) for k, t in moments.items() if t.shape == parameter.shape and SCALES not in k]
        for name in names:
            magnitudes_CX = _values(moments, name).abs()
            if count := int(share * magnitudes_CX.shape[1]):
                limits_C1 = magnitudes_CX.kthvalue(count, dim=1, keepdim=True).values
                _zero(moments, name, magnitudes_CX <= limits_C1)
            del magnitudes_CX  # before the next moment's take its room
        if "exp_avg_sq" in names:
            _zero(moments, "exp_avg", _values(moments, "exp_avg_sq") == 0)


def forget_moments(state: OptimizerState, parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizer start anew for these parameters, its step counter included."""
    for parameter in parameters:
        state.pop(parameter, None)


def _values(moments: dict[str, Any], name: str) -> Tensor:
    """Return a moment as numbers, (C, X): as it is kept, or unpacked from 8 bits."""
    if name in moments:
        values: Tensor = moments[name].flatten(1)
        return values
    return moment_of(moments, name)


def _zero(moments: dict[str, Any], name: str, zeroed_CX: Tensor) -> None:
    """Zero chosen entries of a moment, in place."""
    if name in moments:
        moments[name].flatten(1).masked_fill_(zeroed_CX, 0.0)
    else:
        zero_moment(moments, name, zeroed_CX)
