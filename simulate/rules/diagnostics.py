"""How much of a run diagnostics look at."""

from __future__ import annotations

DIRECTIONS = 8
"""Leading singular vectors that subspaces are made of."""
SAMPLED_HEADS = 8
"""Heads of which all pairs are compared."""
NOISE_BATCHES = 4
"""Batches behind one estimate of the gradient noise scale."""
