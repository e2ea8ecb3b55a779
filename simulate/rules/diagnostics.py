"""Limits of what diagnostics look at; the program and the forecast of its memory and bytes share them."""

from __future__ import annotations

DIRECTIONS = 8
"""Leading singular vectors of the subspaces that are compared."""
SAMPLED_HEADS = 8
"""Most heads that are compared; all pairs of them are."""
NOISE_BATCHES = 4
"""Batches for one estimate of the gradient noise scale."""
