"""Count the steps of a round that each device takes, where devices are not equally fast.

The training loop, the simulated clock and the planned times call this, so that all three count alike.

Letters: N devices, T steps of a round, c_n steps of device n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from simulate.config.method_options import MethodOptions
from simulate.config.tables import DEFAULT_AGE_EXPONENT, Cluster

ROUNDING = 1e-9
"""Share of a step that division may round away: a step that fits exactly must not be lost to it."""


def quorum_deadline_s(cluster: Cluster, every: int, step_s: Sequence[float]) -> float:
    """Return the seconds after which devices of a run with a quorum stop and merge.

    They are `cluster.deadline_s`, or what the quorum-th fastest device needs for a round's T steps: with a quorum of
    one the fastest sets the pace, with a quorum of all the slowest.
    """
    return cluster.deadline_s or every * sorted(step_s)[cluster.needed - 1]


def discounts(ages: Sequence[int], exponent: float | None) -> list[float]:
    """Return (1 + age)^-p for changes that miss so many merges; p is `cluster.age_exponent`."""
    p = DEFAULT_AGE_EXPONENT if exponent is None else exponent
    return [(1.0 + age) ** -p for age in ages]


def round_counts(
    method: MethodOptions, step_s: Sequence[float], round_index: int = 0, cluster: Cluster | None = None
) -> tuple[int, ...]:
    """Return c_n for devices that need `step_s` seconds a step: T in lockstep, else as many as the deadline allows.

    c_n = max(1, min(T, ⌊deadline / step_s_n⌋)). Without a deadline, it is the time that the fastest device needs for T
    steps, or with a quorum in `cluster` the quorum-th. A list of given steps repeats from its start.
    """
    every = method.round_steps
    given = given_counts(method, cluster)
    if given is not None:
        return tuple(max(0, count) for count in given[round_index % len(given)])
    has_quorum = cluster is not None and cluster.has_quorum
    if not (method.is_paced or has_quorum):
        return (every,) * len(step_s)
    # At least one step, or a device that is too slow would never train.
    deadline_s = method.deadline_s or every * min(step_s)
    if cluster is not None and has_quorum:
        deadline_s = quorum_deadline_s(cluster, every, step_s)
    return tuple(max(1, min(every, math.floor(deadline_s / seconds + ROUNDING))) for seconds in step_s)


def given_counts(method: MethodOptions, cluster: Cluster | None) -> Sequence[tuple[int, ...]] | None:
    """Return the steps of each device round by round, where the run gives them; below 1 brings nothing."""
    of_merges = None if cluster is None else cluster.merges_given
    return method.given_steps if of_merges is None else of_merges


def round_compute_s(
    method: MethodOptions, step_s: Sequence[float], cluster: Cluster | None = None
) -> tuple[float, float]:
    """Return the seconds until a round's last device is done, and the steps of all devices together.

    Where the steps are given round by round, both are means over the given rounds. With a quorum nobody is late or
    lost, unless merges are given: what jitter and churn change is the timeline's to say.
    """
    given = given_counts(method, cluster)
    # One round stands for all where steps are not given, since step times do not change.
    rounds = [round_counts(method, step_s, index, cluster) for index in range(len(given or (None,)))]
    seconds = [max(count * s for count, s in zip(counts, step_s, strict=True)) for counts in rounds]
    return sum(seconds) / len(rounds), sum(map(sum, rounds)) / len(rounds)
