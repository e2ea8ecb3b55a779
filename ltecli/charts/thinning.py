"""Thin curves to the points that a chart can show: the ends stay, and the extremes of each stretch."""

from __future__ import annotations

from collections.abc import Sequence


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Return the indices, in order, of at most `most` values that draw nearly the same curve; `most` is 4 or more."""
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    # Two points of each stretch, and the two ends.
    stretches = (most - 2) // 2
    edges = [round(index * len(values) / stretches) for index in range(stretches + 1)]
    for index in range(stretches):
        stretch = range(edges[index], edges[index + 1])
        kept |= {min(stretch, key=lambda i: values[i]), max(stretch, key=lambda i: values[i])}
    return sorted(kept)
