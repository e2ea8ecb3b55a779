"""Random numbers of thousands of devices at once, each with an address: (seed, purpose, device, index).

A device's draw depends on its address alone, not on the number of devices or the order of the calls. The addresses are
hashed by the finaliser of SplitMix64 (Steele, Lea & Flood 2014), all devices in one pass.

A step's seconds are gamma distributed, with the profile's mean and the standard deviation `step_jitter` times that. The
steps of a device are independent, so several together are gamma distributed, too, and need one draw. It is made from a
normal number z by Wilson & Hilferty (1931): a gamma number of shape k over its mean is about (1 − 1/9k + z/3√k)³,
whose mean is within 0.2 % of 1 for every shape that is allowed (k = steps / step_jitter² ≥ 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulate.common.seeding import address

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def uniform(seed: int, purpose: str, devices_N: Integers, index: int) -> Floats:
    """Return a number between 0 and 1, both excluded, for each device's address."""
    start = np.uint64(address(seed, purpose, index))
    mixed_N = start + (devices_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        mixed_N = (mixed_N ^ (mixed_N >> shift)) * multiplier
    mixed_N ^= mixed_N >> _SHIFTS[2]
    return ((mixed_N >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, purpose: str, devices_N: Integers, index: int) -> Floats:
    """Return a standard normal number for each device's address (Box & Muller 1958)."""
    radius_N = np.sqrt(-2.0 * np.log(uniform(seed, f"{purpose}, radius", devices_N, index)))
    return radius_N * np.cos(2 * np.pi * uniform(seed, f"{purpose}, angle", devices_N, index))


def slowness(seed: int, devices_N: Integers, index: int, steps_N: Floats, jitter_N: Floats) -> Floats:
    """Return the seconds of `steps_N` steps of each device over their mean; exactly 1 without jitter."""
    factor_N = np.ones(len(devices_N))
    jittery = (jitter_N > 0) & (steps_N > 0)
    if jittery.any():
        inverse_9k = jitter_N[jittery] ** 2 / (9 * steps_N[jittery])
        z = normal(seed, "step-jitter", devices_N[jittery], index)
        factor_N[jittery] = np.maximum(0.0, 1 - inverse_9k + z * np.sqrt(inverse_9k)) ** 3
    return factor_N
