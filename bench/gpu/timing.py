"""Pairs of calls in one process, in turns, so that whatever else the machine does hits both alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.pairs import median_and_quartiles, paired_seconds
from simulate.layers.accelerator import synchronize


def paired_ratio(
    ours: Callable[[], object], other: Callable[[], object], pairs: int, device: torch.device
) -> dict[str, Any]:
    """Return the median ratio of paired calls with its quartiles, and each one's median seconds."""
    timed = paired_seconds(ours, other, pairs, partial(synchronize, device))
    ratio, (low, high) = median_and_quartiles([our.wall / their.wall for our, their in timed])
    return {
        "ratio": ratio, "lower_quartile": low, "upper_quartile": high,
        "ours_s": statistics.median(our.wall for our, _ in timed),
        "other_s": statistics.median(their.wall for _, their in timed),
    }  # fmt: skip
