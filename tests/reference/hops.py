"""Collectives hop by hop, and a shared link in small slices of time: slow twins of simulate/timeline."""

from __future__ import annotations

from collections.abc import Sequence


def ring_ends(starts: Sequence[float], hops: int, hop_s: Sequence[float]) -> list[float]:
    """Return when each node of a ring has made all hops: the k-th once it, and the one before it, made the last."""
    moments = list(starts)
    for _ in range(hops):
        moments = [max(moments[i], moments[i - 1]) + hop_s[i] for i in range(len(moments))]
    return moments


def sliced_ends(starts: Sequence[float], payload: float, own: float, whole: float, slice_s: float) -> list[float]:
    """Return when transfers end that get equal rates, going from slice to slice of time."""
    left = [payload] * len(starts)
    ends: list[float | None] = [None] * len(starts)
    now_s = 0.0
    while any(end is None for end in ends):
        active = [i for i, start in enumerate(starts) if start <= now_s and ends[i] is None]
        for i in active:
            left[i] -= min(own, whole / len(active)) * slice_s
        now_s += slice_s
        for i in active:
            if left[i] <= 0:
                ends[i] = now_s
    return [end for end in ends if end is not None]
