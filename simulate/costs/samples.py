"""How many more samples a method needs than dense training: an assumption, not a measurement of your run.

Time per step alone would always favour the smallest rank and the rarest merge. So candidates are ranked by time to
dense-equivalent loss, with the few published numbers there are. Replace them where you have better ones.
"""

from __future__ import annotations

from simulate.config import Run
from simulate.models.shapes import ModelShape
from simulate.options import AdapterOptions, LteOptions, MethodOptions

LTE_SAMPLES = 1.4
"""Huh et al. 2024, section 4: about 40 % more samples than dense at rank x heads >= width, T = 10 (range 1.2-1.4)."""
MERGE_EVERY = 10
MERGE_EXPONENT = 0.15
"""Guess: ten times rarer merges cost 1.4x the samples (no published sweep over T at equal loss)."""
LTE_RANK_SHARE = 1 / 12
"""One head needs this share of the width: in the paper's sweep (ViT-S, width 384, 32 heads), rank 32 is nearly as good
as 64, while 16 and 8 fall off although rank x heads still reaches the width at 16."""
RANK_EXPONENT = 0.5
"""Guess: half the rank that is needed, by either rule, costs 1.4x the samples."""
MINIMUM_STEPS = 200
"""Guess: a batch of 1/200 of all tokens needs twice the samples, as at the critical batch size (McCandlish 2018)."""
SAMPLES: dict[str, float] = {
    "ddp": 1.0, "sapipe": 1.05, "powersgd": 1.05, "topk": 1.1, "signsgd": 1.1, "daso": 1.1, "local-sgd": 1.2,
    "diloco": 1.2, "lte": LTE_SAMPLES, "mhlora": 1.2, "relora": 1.4, "lora": 1.4, "adamix": 1.4,
}  # fmt: skip
"""Guesses but for lte: what each method needs at its best settings, T = 10 and full rank."""


def samples_factor(run: Run, shape: ModelShape, tokens: float) -> float:
    """Return the assumed multiple of dense small-batch training's samples for equal loss, >= 1."""
    factor = (1 + run.tokens_per_step * MINIMUM_STEPS / tokens) * SAMPLES[run.method.name]
    factor *= max(1.0, run.method.round_steps / MERGE_EVERY) ** MERGE_EXPONENT
    return factor * _shortfall(run.method, shape, run.cluster.devices) ** RANK_EXPONENT


def _shortfall(method: MethodOptions, shape: ModelShape, devices: int) -> float:
    """How many times too small the rank is: of all heads together for the width, and of one head for its share."""
    if not isinstance(method, AdapterOptions):
        return 1.0
    width = shape.largest_dimension
    if isinstance(method, LteOptions):
        total = method.held_rank(devices) * devices
        return max(1.0, width / total) * max(1.0, width * LTE_RANK_SHARE / method.rank)
    return max(1.0, width / method.row_rank(devices))
