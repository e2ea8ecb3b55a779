"""Random generators addressed by (seed, purpose, ...): the same address gives the same draws in any process and order.

Devices must draw alike whether they share a process or not, so no generator is advanced from one use to the next.
"""

from __future__ import annotations

import hashlib

import numpy as np


def address(seed: int, purpose: str, *where: int | str) -> int:
    """Return a 63-bit seed for one purpose and address, for example address(0, "batch", device, step)."""
    # The separator keeps ("a", 12) apart from ("a1", 2).
    text = "\x1f".join(str(part) for part in (seed, purpose, *where))
    # torch's generators take signed 64-bit seeds, so the top bit is dropped.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *where: int | str) -> np.random.Generator:
    """Return a numpy generator that starts from one address."""
    return np.random.Generator(np.random.PCG64(address(seed, purpose, *where)))
