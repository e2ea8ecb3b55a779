"""From a probe's figures to rank, heads and batch, each with its range and its reason; torch-free.

Of what T steps change in a layer, k_q directions hold the share q of the squared norm; k_q below is the largest over
the adapted layers, since one rank serves them all. H heads of rank r add up to at most r·H directions at a merge, so

    together   r·H >= k_90: all heads at once can hold the round's update
    alone      r >= k_50: between merges a head trains by itself, and should follow at least half of what it would do

The rank is the larger of both, rounded up to a multiple of ROUNDED_TO. The second rule is a guess of ours; what speaks
for it is the sweep of Huh et al. 2024 (arXiv 2402.16828), where 32 heads of rank 8 or 16 fall off although rank x heads
is near the width or above it. The range runs from `together` alone to k_90, at which one head holds all that is needed.
The mark above: rank x heads near the largest layer dimension, as the paper's best runs have it.

The batch of all devices is the gradient noise scale: there a step gains half of what an endless batch would gain
(McCandlish et al. 2018, arXiv 1812.06162, section 2.2).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from simulate.probe.document import Estimate, Probe, Recommendation, Spectrum, State

ROUNDED_TO = 4


@dataclass(frozen=True)
class Needs:
    """What rank a round's update needs, and what there is."""

    half: int
    """k_50: the most directions of any layer that hold half of its update."""
    most: int
    """k_90."""
    limit: int
    """The smallest layer's dimension."""
    upper: int
    """The largest layer's dimension: the paper's mark for rank x heads."""
    round_steps: int

    @classmethod
    def of(cls, probe: Probe) -> Needs:
        """Return a probe's; a network that the warm-up did not change needs one direction."""
        updates = round_updates(probe)
        return cls(
            half=max((update.rank_50 for update in updates), default=1),
            most=max((update.rank_90 for update in updates), default=1),
            limit=probe.network.smallest_dimension,
            upper=probe.network.largest_dimension,
            round_steps=probe.settings.round_steps,
        )

    def together(self, heads: int) -> int:
        """Return the rank with which so many heads hold what is needed between them."""
        return min(self.limit, math.ceil(self.most / heads))

    def rank(self, heads: int) -> int:
        """Return the recommended rank of one of so many heads."""
        needed = max(math.ceil(self.most / heads), self.half)
        return min(self.limit, math.ceil(needed / ROUNDED_TO) * ROUNDED_TO)

    def marks(self, rank: int, heads: int) -> Iterator[str]:
        """Say where a candidate lies below or above what the probe found."""
        if rank * heads < self.most:
            yield (
                f"rank x heads = {rank * heads} is below the {self.most} directions that the probe found in a round's "
                "update (90 % of its squared norm, estimate)"
            )
        elif rank < self.half and rank < self.limit:
            yield (
                f"rank {rank} of one head is below the {self.half} directions that hold half of a round's update "
                "(probe, estimate)"
            )
        if rank > max(self.most, self.rank(heads)):
            yield (f"rank {rank} is above the {self.most} directions that one head alone would need (probe, estimate)")


def round_updates(probe: Probe) -> list[Spectrum]:
    """Return the spectra of what the warm-up's last round changed, layer by layer."""
    return [layer.round_update for layer in probe.layers if layer.round_update is not None]


def recommend(probe: Probe, heads: int, devices: int) -> Recommendation:
    """Return rank, heads and batch for a run with so many heads on so many devices, with the reasons."""
    needs = Needs.of(probe)
    rank = needs.rank(heads)
    batch = _batch(probe)
    return Recommendation(
        rank=Estimate(estimate=rank, low=needs.together(heads), high=max(rank, min(needs.limit, needs.most))),
        heads=_heads(needs, rank, devices),
        batch_samples=batch,
        upper_rank_times_heads=needs.upper,
        reasoning=[
            _rank_reason(probe, needs, heads),
            _heads_reason(needs, rank, devices),
            _upper_reason(needs, heads),
            _gradient_reason(probe),
            _batch_reason(probe, batch, devices),
            _limits(probe),
        ],
    )


def _heads(needs: Needs, rank: int, devices: int) -> Estimate:
    """Return the fewest heads of a rank that hold what is needed, as many on each device; up to the paper's mark."""
    low, estimate, high = (
        math.ceil(directions / rank / devices) * devices for directions in (needs.half, needs.most, needs.upper)
    )
    return Estimate(estimate=estimate, low=low, high=max(high, estimate))


def _batch(probe: Probe) -> Estimate | None:
    noise = probe.warmed.noise
    if noise.scale_samples is None or noise.scale_low_samples is None or noise.scale_high_samples is None:
        return None
    low, estimate, high = (
        max(1.0, scale) for scale in (noise.scale_low_samples, noise.scale_samples, noise.scale_high_samples)
    )
    return Estimate(estimate=estimate, low=low, high=high)


def _rank_reason(probe: Probe, needs: Needs, heads: int) -> str:
    updates, rank = round_updates(probe), needs.rank(heads)
    if not updates:
        return "rank: the warm-up changed no adapted layer, so nothing can be said of the rank; probe with more steps"
    median = statistics.median(update.rank_90 for update in updates)
    return (
        f"rank {rank} a head with {heads} heads (estimate; range {needs.together(heads)} to "
        f"{max(rank, min(needs.limit, needs.most))}): what {needs.round_steps} dense steps change in a layer has 90 % "
        f"of its squared norm in at most {needs.most} directions (median of the layers {median:g}), which {heads} "
        f"heads hold together from rank {needs.together(heads)} on and one head alone from {needs.most} on; half of it "
        f"lies in {needs.half}, which a head should be able to follow by itself between merges"
    )


def _heads_reason(needs: Needs, rank: int, devices: int) -> str:
    heads = _heads(needs, rank, devices)
    return (
        f"heads {heads.estimate:g} (estimate; range {heads.low:g} to {heads.high:g}, multiples of the {devices} "
        f"devices): the fewest of rank {rank} that hold those {needs.most} directions; more average over more data "
        "but add little rank"
    )


def _upper_reason(needs: Needs, heads: int) -> str:
    return (
        f"upper mark: rank x heads near the largest layer dimension {needs.upper} (arXiv 2402.16828), which is rank "
        f"{min(needs.limit, math.ceil(needs.upper / heads))} with {heads} heads; a full update has no more directions"
    )


def _gradient_reason(probe: Probe) -> str:
    return (
        f"gradient: its mean over {probe.settings.batches} batches has effective rank "
        f"{_over_layers(probe, lambda layer: layer.initial.spectrum)} at the start and "
        f"{_over_layers(probe, lambda layer: layer.warmed.spectrum)} after {probe.settings.warmup_steps} steps (median "
        f"and range of the layers); {probe.initial.noise.signal_share:.0%} and {probe.warmed.noise.signal_share:.0%} "
        "of its squared norm are signal (estimates), and noise adds directions, so these are rather too high"
    )


def _over_layers(probe: Probe, spectrum_of: Callable[..., Spectrum | None]) -> str:
    ranks = [spectrum.effective_rank for layer in probe.layers if (spectrum := spectrum_of(layer)) is not None]
    return f"{statistics.median(ranks):.0f} ({min(ranks):.0f} to {max(ranks):.0f})" if ranks else "0 (it is zero)"


def _batch_reason(probe: Probe, batch: Estimate | None, devices: int) -> str:
    if batch is None:
        return (
            "batch: the gradient noise scale cannot be told from these batches, since noise drowns the gradient or one "
            "batch decides it; probe with more --batches"
        )
    per_device = max(1, round(batch.estimate / devices))
    return (
        f"batch {batch.estimate:.0f} samples over all devices, {per_device} a device (estimate; range {batch.low:.0f} "
        f"to {batch.high:.0f}, two standard errors over the batches): the gradient noise scale after "
        f"{probe.settings.warmup_steps} steps, at which a step gains half of what any batch could gain (McCandlish et "
        f"al. 2018); at the start it was {_scale(probe.initial)}, and it moves as training goes on"
    )


def _scale(state: State) -> str:
    noise = state.noise
    if noise.scale_samples is None:
        return "beyond these batches"
    if noise.scale_low_samples is None or noise.scale_high_samples is None:
        return f"{noise.scale_samples:.1f}"
    return f"{noise.scale_samples:.1f} ({noise.scale_low_samples:.1f} to {noise.scale_high_samples:.1f})"


def _limits(probe: Probe) -> str:
    settings = probe.settings
    text = (
        f"all of it is from the first {settings.warmup_steps} dense steps with {settings.optimizer}, one seed and "
        f"{settings.micro_batch * settings.devices} samples a step; later updates, and smaller batches, have other "
        "ranks"
    )
    if settings.optimizer == "muon":
        text += "; Muon makes all directions of an update alike, so that its rank says little of what training needs"
    return text
