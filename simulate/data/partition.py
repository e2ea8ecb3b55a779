"""Which samples are whose: every sample of the training split belongs to exactly one device; torch-free.

Equally distributed, or skewed by class as in Yurochkin et al. 2019 (arXiv 1905.12022): class k goes to the devices in
shares p_k ~ Dirichlet_N(alpha). Here the devices' sizes are given as well, so the shares are brought to both margins by
iterative proportional fitting (Deming and Stephan 1940), which keeps their odds ratios: which device prefers what.

Legend: N devices, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from simulate.common.seeding import generator

FITTING_ROUNDS = 200
LEAST_SHARE = 1e-300
"""Where a draw is all but 0: fitting needs positive numbers, and tells apart the small ones."""


def shard_sizes(samples: int, devices: int, shards: Sequence[float] | None) -> list[int]:
    """Return how many samples each device has: all of them, in equal parts or in parts of the given relative sizes."""
    sizes = [1.0] * devices if shards is None else shards
    edges = [round(samples * share / sum(sizes)) for share in accumulate(sizes)]
    return [end - first for first, end in pairwise([0, *edges])]


def even_shards(samples: int, devices: int, shards: Sequence[float] | None, seed: int) -> list[np.ndarray]:
    """Return each device's samples, by number, in a random order: cuts of one permutation."""
    order = generator(seed, "shards").permutation(samples)
    edges = np.cumsum(shard_sizes(samples, devices, shards))[:-1]
    return np.split(order, edges)


def skewed_shards(
    labels: np.ndarray, classes: int, devices: int, shards: Sequence[float] | None, alpha: float, seed: int
) -> list[np.ndarray]:
    """Return each device's samples, by number: few classes each where `alpha` is far below 1, all alike far above."""
    counts_K = np.bincount(labels, minlength=classes)
    sizes_N = np.array(shard_sizes(len(labels), devices, shards))
    shares_NK = np.stack([_shares(generator(seed, "skew", k), devices, alpha) for k in range(classes)], axis=1)
    table_NK = fit_table(shares_NK, sizes_N, counts_K)
    parts: list[list[np.ndarray]] = [[] for _ in range(devices)]
    for k in range(classes):
        members = np.flatnonzero(labels == k)
        members = members[generator(seed, "shards", k).permutation(len(members))]
        for device, part in enumerate(np.split(members, np.cumsum(table_NK[:, k])[:-1])):
            parts[device].append(part)
    return [np.concatenate(part) for part in parts]


def _shares(random: np.random.Generator, devices: int, alpha: float) -> np.ndarray:
    """Return a draw from Dirichlet_N(alpha), (N,), over its largest: Gamma(α) = Gamma(α + 1)·U^(1/α), in logarithms."""
    logs_N = np.log(random.standard_gamma(alpha + 1, devices)) + np.log1p(-random.random(devices)) / alpha
    return np.exp(np.maximum(logs_N - logs_N.max(), math.log(LEAST_SHARE)))


def fit_table(shares_NK: np.ndarray, sizes_N: np.ndarray, counts_K: np.ndarray) -> np.ndarray:
    """Return whole numbers (N, K) that add up to the sizes and to the counts, in proportions near to the shares."""
    table = np.maximum(shares_NK, LEAST_SHARE)
    for _ in range(FITTING_ROUNDS):
        table *= _ratio(sizes_N, table.sum(1))[:, None]
        table *= _ratio(counts_K, table.sum(0))
    # Fitting need not have converged: nothing may be above its margin before the rest is dealt out.
    table *= np.minimum(1, _ratio(sizes_N, table.sum(1)))[:, None]
    table *= np.minimum(1, _ratio(counts_K, table.sum(0)))
    whole = np.floor(table + 1e-9).astype(np.int64)
    return _deal_rest(whole, table - whole, sizes_N - whole.sum(1), counts_K - whole.sum(0))


def _ratio(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    return np.divide(wanted, got, out=np.zeros(len(wanted)), where=got > 0)


def _deal_rest(whole: np.ndarray, fraction: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Add what rows and columns still lack: one each where the fraction is largest, then wherever there is room."""
    for once in (True, False):
        for flat in np.argsort(-fraction, axis=None, kind="stable"):
            n, k = divmod(int(flat), whole.shape[1])
            more = min(rows[n], columns[k], 1 if once else rows[n])
            whole[n, k] += more
            rows[n] -= more
            columns[k] -= more
    return whole
