"""Cache figures that depend only on a run's method and number formats.

A plan has thousands of candidates, but only a few hundred methods, so most figures are computed once for many of them.
Functions in simulate.costs are decorated with by_method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from simulate.config.run import Run
from simulate.models.shapes import ModelShape

P = ParamSpec("P")
T = TypeVar("T")
MOST = 16384
"""Most results that one function's cache holds; a full cache is emptied."""
_CACHES: list[dict[Any, Any]] = []


def by_method(
    figure: Callable[Concatenate[Run, ModelShape, P], T],
) -> Callable[Concatenate[Run, ModelShape, P], T]:
    """Cache a figure of a run that does not depend on its batch, steps, recomputation or data.

    Methods are frozen and compared by id(), since candidates share them: hashing a method's two dozen keys would often
    take longer than computing the figure. Further arguments must be hashable. `__wrapped__` is the uncached function.
    """
    cached: dict[Any, tuple[T, Any]] = {}
    _CACHES.append(cached)

    @wraps(figure)
    def cached_figure(run: Run, shape: ModelShape, *others: P.args, **named: P.kwargs) -> T:
        train, cluster = run.train, run.cluster
        key = (
            id(run.method), shape, cluster.devices, cluster.classes, cluster.quorum, cluster.deadline_s,
            cluster.merges_given, train.dtype, train.autocast, train.optimizer, train.optimizer_state,
            train.apollo_rank, train.diagnostics_every is None, others, *named.items(),
        )  # fmt: skip
        try:
            return cached[key][0]
        except KeyError:
            if len(cached) >= MOST:
                cached.clear()
            found = figure(run, shape, *others, **named)
            cached[key] = found, run.method  # held, so that no other method can get the same id
            return found

    return cached_figure


def forget() -> None:
    """Empty all caches of by_method."""
    for cached in _CACHES:
        cached.clear()
