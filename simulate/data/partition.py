"""Divide the training samples among devices: every sample belongs to exactly one device; torch-free.

Equally distributed, or skewed by class as in Yurochkin et al. 2019 (arXiv 1905.12022): class k goes to the devices in
shares p_k ~ Dirichlet_N(alpha). Here the devices' sizes are given as well, so the shares are brought to both margins by
iterative proportional fitting (Deming and Stephan 1940), which keeps their odds ratios: each device's preferences.

Legend: N devices, K classes, B samples of a device in a step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from simulate.common.seeding import generator

FITTING_ROUNDS = 200
REMEMBERED_EPOCHS = 2
"""Epochs of each device whose order is kept: a batch may end one epoch and begin the next."""
LEAST_SHARE = 1e-300
"""Lower bound of a drawn share: fitting needs positive numbers."""


def shard_sizes(samples: int, devices: int, shards: Sequence[float] | None) -> list[int]:
    """Return the number of samples of each device: equal parts of all, or parts in proportion to `shards`."""
    sizes = [1.0] * devices if shards is None else shards
    # Rounded edges, not sizes, so that the parts add up.
    edges = [round(samples * share / sum(sizes)) for share in accumulate(sizes)]
    return [end - first for first, end in pairwise([0, *edges])]


def even_shards(samples: int, devices: int, shards: Sequence[float] | None, seed: int) -> list[np.ndarray]:
    """Return the numbers of each device's samples, in random order: cuts of one permutation."""
    order = generator(seed, "shards").permutation(samples)
    edges = np.cumsum(shard_sizes(samples, devices, shards))[:-1]
    return np.split(order, edges)


def skewed_shards(
    labels: np.ndarray, classes: int, devices: int, shards: Sequence[float] | None, alpha: float, seed: int
) -> list[np.ndarray]:
    """Return the numbers of each device's samples: of few classes for `alpha` far below 1, of all classes far above."""
    # Whole numbers first, so that each device gets exactly its size and each class is used up.
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


class EpochRows:
    """Each device's samples, in a new order each epoch, addressed by (seed, device, step)."""

    def __init__(self, shards: Sequence[np.ndarray], samples: int, seed: int) -> None:
        """Draw `samples` rows a step from each device's shard."""
        self.shards, self.samples, self.seed = shards, samples, seed
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def of(self, device: int, step: int) -> np.ndarray:
        """Return the rows of one device's batch, (B,): the next ones of its shard in the order of the epoch."""
        shard = self.shards[device]
        # A shard is read as one endless list of shuffled epochs, of which a batch may span two or more.
        indices = np.arange(step * self.samples, (step + 1) * self.samples)
        epochs, indices = indices // len(shard), indices % len(shard)
        orders = {int(epoch): self._order(device, int(epoch)) for epoch in np.unique(epochs)}
        return shard[[orders[epoch][index] for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)]]

    def _order(self, device: int, epoch: int) -> np.ndarray:
        if (device, epoch) not in self._orders:
            random = generator(self.seed, "epoch", device, epoch)
            self._orders[device, epoch] = random.permutation(len(self.shards[device]))
            # The oldest goes first: steps only go forward.
            while len(self._orders) > REMEMBERED_EPOCHS * len(self.shards):
                self._orders.popitem(last=False)
        return self._orders[device, epoch]


def _shares(random: np.random.Generator, devices: int, alpha: float) -> np.ndarray:
    """Return a draw from Dirichlet_N(alpha) divided by its largest share, (N,).

    In logarithms, with Gamma(α) = Gamma(α + 1)·U^(1/α), since nearly all shares of a small α would be 0 in float64.
    """
    logs_N = np.log(random.standard_gamma(alpha + 1, devices)) + np.log1p(-random.random(devices)) / alpha
    return np.exp(np.maximum(logs_N - logs_N.max(), math.log(LEAST_SHARE)))


def fit_table(shares_NK: np.ndarray, sizes_N: np.ndarray, counts_K: np.ndarray) -> np.ndarray:
    """Return whole numbers (N, K) with row sums `sizes_N` and column sums `counts_K`, near the shares' proportions."""
    table = np.maximum(shares_NK, LEAST_SHARE)
    for _ in range(FITTING_ROUNDS):
        table *= _ratio(sizes_N, table.sum(1))[:, None]
        table *= _ratio(counts_K, table.sum(0))
    # Fitting may not have converged: bring each sum down to its margin, so that only missing samples are dealt out.
    table *= np.minimum(1, _ratio(sizes_N, table.sum(1)))[:, None]
    table *= np.minimum(1, _ratio(counts_K, table.sum(0)))
    # A little more than 0, since rounding may leave a whole number just below itself.
    whole = np.floor(table + 1e-9).astype(np.int64)
    return _deal_rest(whole, table - whole, sizes_N - whole.sum(1), counts_K - whole.sum(0))


def _ratio(target: np.ndarray, current: np.ndarray) -> np.ndarray:
    return np.divide(target, current, out=np.zeros(len(target)), where=current > 0)


def _deal_rest(whole: np.ndarray, fraction: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Add the missing samples of rows and columns: one each where the fraction is largest, then wherever they fit."""
    for once in (True, False):
        for flat in np.argsort(-fraction, axis=None, kind="stable"):
            n, k = divmod(int(flat), whole.shape[1])
            more = min(rows[n], columns[k], 1 if once else rows[n])
            whole[n, k] += more
            rows[n] -= more
            columns[k] -= more
    return whole
