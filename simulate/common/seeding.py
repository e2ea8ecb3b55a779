"""Random numbers with an address: (seed, purpose, ...) always draws the same, whoever draws it and in which order."""

from __future__ import annotations

import hashlib

import numpy as np


def address(seed: int, purpose: str, *where: int | str) -> int:
    """Return a 63-bit seed for one purpose and place, for example address(0, "batch", device, step)."""
    text = "\x1f".join(str(part) for part in (seed, purpose, *where))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *where: int | str) -> np.random.Generator:
    """Return numpy's generator for one address."""
    return np.random.Generator(np.random.PCG64(address(seed, purpose, *where)))
