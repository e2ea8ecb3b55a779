"""Figures that a run's method and number formats decide alone: a plan's thousands of candidates share a few hundred."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from simulate.config.run import Run
from simulate.models.shapes import ModelShape

P = ParamSpec("P")
T = TypeVar("T")
MOST = 16384
"""Figures that are kept of one kind; beyond that all are forgotten, and worked out again."""
_CACHES: list[dict[Any, Any]] = []


def by_method(
    figure: Callable[Concatenate[Run, ModelShape, P], T],
) -> Callable[Concatenate[Run, ModelShape, P], T]:
    """Remember a figure of a run that depends on neither its batch nor its steps, recomputation or data.

    Methods and shapes are frozen and told apart by identity, which candidates share; a method's two dozen keys would
    take longer to hash than many a figure to work out. Further arguments are hashable. What is not
    remembered is `__wrapped__`.
    """
    remembered: dict[Any, tuple[T, Any]] = {}
    _CACHES.append(remembered)

    @wraps(figure)
    def recall(run: Run, shape: ModelShape, *others: P.args, **named: P.kwargs) -> T:
        train = run.train
        key = (
            id(run.method), shape, run.cluster.devices, train.dtype, train.autocast, train.optimizer,
            train.optimizer_state, train.diagnostics_every is None, others, *named.items(),
        )  # fmt: skip
        try:
            return remembered[key][0]
        except KeyError:
            if len(remembered) >= MOST:
                remembered.clear()
            found = figure(run, shape, *others, **named)
            remembered[key] = found, run.method  # which keeps its identity from being another's
            return found

    return recall


def forget() -> None:
    """Forget everything that by_method remembers."""
    for remembered in _CACHES:
        remembered.clear()
