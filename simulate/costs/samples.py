"""How many more samples a method needs than dense training: an assumption, not a measurement of your run.

Time per step alone would always favour the smallest rank and the rarest merge. So candidates are ranked by time to
dense-equivalent loss, with the few published numbers there are. Replace them where you have better ones.
"""

from __future__ import annotations

from simulate.config import LteOptions, Run
from simulate.models.shapes import ModelShape

LTE_SAMPLES = 1.4
"""Huh et al. 2024, section 4: about 40 % more samples than dense at rank x heads >= width, T = 10 (range 1.2-1.4)."""
LTE_MERGE_EVERY = 10
LTE_MERGE_EXPONENT = 0.15
"""Guess: ten times rarer merges cost 1.4x the samples (no published sweep over T at equal loss)."""
LTE_RANK_SHARE = 1 / 12
"""One head needs this share of the width: in the paper's sweep (ViT-S, width 384, 32 heads), rank 32 is nearly as good
as 64, while 16 and 8 fall off although rank x heads still reaches the width at 16."""
LTE_RANK_EXPONENT = 0.5
"""Guess: half the rank that is needed, by either rule, costs 1.4x the samples."""
MINIMUM_STEPS = 200
"""Guess: a batch of 1/200 of all tokens needs twice the samples, as at the critical batch size (McCandlish 2018)."""


def samples_factor(run: Run, shape: ModelShape, tokens: float) -> float:
    """Return the assumed multiple of dense small-batch training's samples for equal loss, >= 1."""
    factor = 1 + run.tokens_per_step * MINIMUM_STEPS / tokens
    method = run.method
    if isinstance(method, LteOptions):
        width = shape.largest_dimension
        shortfall = max(1.0, width / (method.rank * run.heads)) * max(1.0, width * LTE_RANK_SHARE / method.rank)
        rare_merges = max(1.0, method.merge_every / LTE_MERGE_EVERY)
        factor *= LTE_SAMPLES * shortfall**LTE_RANK_EXPONENT * rare_merges**LTE_MERGE_EXPONENT
    return factor
