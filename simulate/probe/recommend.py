"""Recommend rank, heads and batch from a probe's figures, each with its range and its reason; torch-free.

`lte probe` prints the recommendation; a plan marks its candidates with it (simulate.planning.probe_ranks).

In a layer's update of T steps, k_q directions hold the share q of the squared norm; k_q below is the largest over the
adapted layers, since one rank serves them all. H heads of rank r add up to at most r·H directions at a merge, so

    together   r·H >= k_99: all heads together can hold nearly all of the round's update
    alone      r >= k_90: between merges a head trains alone, and should hold most of the update that it would make

The rank is the larger of both, rounded up to a multiple of ROUNDED_TO. The second rule is ours: heads start a round at
the same weights and find nearly the same leading directions, so that many heads do not make up for a low rank. In the
sweep of Huh et al. 2024 (arXiv 2402.16828) 32 heads of rank 8 or 16 are worse although rank x heads is near the width
or above it; docs/probe.md has a sweep of ours. The range of the rank begins where heads hold k_99 together and k_50
alone, and ends at k_99, with which one head alone holds nearly all. The upper mark is the paper's: rank x heads near
the largest layer dimension.

The recommended batch of all devices is the gradient noise scale: there a step gains half of what an infinite batch
would gain (McCandlish et al. 2018, arXiv 1812.06162, section 2.2).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from simulate.probe.schema import Estimate, Probe, Recommendation, Spectrum, State

ROUNDED_TO = 4
"""Recommended ranks are multiples of this."""


@dataclass(frozen=True)
class Needs:
    """Numbers of directions that updates of some steps need, and the layers' dimensions."""

    half: int
    """k_50: directions that hold half of a layer's update, the largest number of all layers."""
    most: int
    """k_90: directions that hold 90 %."""
    nearly_all: int
    """k_99: directions that hold 99 %."""
    limit: int
    """The smallest layer's dimension, which no rank exceeds."""
    upper: int
    """The largest layer's dimension: the paper's mark for rank x heads."""
    steps: int
    """Steps of the update."""

    @classmethod
    def of(cls, probe: Probe, merge_every: int | None = None) -> Needs:
        """Return the needs of rounds of `merge_every` steps: of the measured round, or of the whole warm-up if longer.

        A network that the warm-up did not change needs one direction.
        """
        settings = probe.settings
        # A round longer than the measured one needs more directions: the whole warm-up is the nearest figure.
        longer = merge_every is not None and merge_every > settings.round_steps
        updates = [layer.update for layer in probe.layers if layer.update] if longer else round_updates(probe)
        return cls(
            half=max((update.rank_50 for update in updates), default=1),
            most=max((update.rank_90 for update in updates), default=1),
            nearly_all=max((update.rank_99 for update in updates), default=1),
            limit=probe.network.smallest_dimension,
            upper=probe.network.largest_dimension,
            steps=settings.warmup_steps if longer else settings.round_steps,
        )

    def together(self, heads: int) -> int:
        """Return the lowest rank with which so many heads together hold nearly all of an update."""
        return min(self.limit, math.ceil(self.nearly_all / heads))

    def lowest(self, heads: int) -> int:
        """Return the lowest rank with which so many heads hold nearly all together, and each alone half."""
        return min(self.limit, max(self.together(heads), self.half))

    def highest(self, heads: int) -> int:
        """Return the rank with which one head alone holds nearly all; never below the recommended one."""
        return max(self.rank(heads), min(self.limit, self.nearly_all))

    def rank(self, heads: int) -> int:
        """Return the recommended rank of one of so many heads."""
        needed = max(self.together(heads), self.most)  # k_99 together, and k_90 alone
        return min(self.limit, math.ceil(needed / ROUNDED_TO) * ROUNDED_TO)

    def marks(self, rank: int, heads: int) -> Iterator[str]:
        """Yield remarks on a candidate whose rank is below or above the probe's."""
        if rank * heads < self.nearly_all and rank < self.limit:
            yield (
                f"rank x heads = {rank * heads} is below the {self.nearly_all} directions that the probe found in an "
                f"update of {self.steps} steps (99 % of its squared norm, estimate)"
            )
        elif rank < self.most and rank < self.limit:
            yield (
                f"rank {rank} of one head is below the {self.most} directions that hold 90 % of an update of "
                f"{self.steps} steps (probe, estimate)"
            )
        if rank > self.highest(heads):
            yield (
                f"rank {rank} is above the {self.highest(heads)} with which one head alone would hold 99 % of an "
                f"update of {self.steps} steps (probe, estimate)"
            )


def round_updates(probe: Probe) -> list[Spectrum]:
    """Return the spectra of the layers' updates in the warm-up's last round."""
    return [layer.round_update for layer in probe.layers if layer.round_update is not None]


def recommend(probe: Probe, heads: int, devices: int) -> Recommendation:
    """Return rank, heads and batch for a run with so many heads on so many devices, with reasons."""
    needs = Needs.of(probe)
    rank = needs.rank(heads)
    batch = _batch(probe)
    return Recommendation(
        rank=Estimate(estimate=rank, low=needs.lowest(heads), high=needs.highest(heads)),
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
    """Return the fewest heads of a rank that together hold nearly all, between those for k_90 and the paper's mark."""
    # A multiple of the devices, since each has the same number of heads.
    low, estimate, high = (
        math.ceil(directions / rank / devices) * devices for directions in (needs.most, needs.nearly_all, needs.upper)
    )
    return Estimate(estimate=estimate, low=low, high=max(high, estimate))


def _batch(probe: Probe) -> Estimate | None:
    noise = probe.warmed.noise
    if noise.scale_samples is None or noise.scale_low_samples is None or noise.scale_high_samples is None:
        return None
    # No batch is below one sample, however little noise there is.
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
        f"rank {rank} a head with {heads} heads (estimate; range {needs.lowest(heads)} to {needs.highest(heads)}): "
        f"what {needs.steps} dense steps change in a layer has 90 % of its squared norm in at most {needs.most} "
        f"directions (median of the layers {median:g}), which a head that trains by itself between merges should hold; "
        f"99 % lie in {needs.nearly_all}, which {heads} heads hold together from rank {needs.together(heads)} on; a "
        "higher rank in the range is safer for the loss, a lower one saves bytes and memory"
    )


def _heads_reason(needs: Needs, rank: int, devices: int) -> str:
    heads = _heads(needs, rank, devices)
    return (
        f"heads {heads.estimate:g} (estimate; range {heads.low:g} to {heads.high:g}, multiples of the {devices} "
        f"devices): the fewest of rank {rank} that hold those {needs.nearly_all} directions; more average over more "
        "data but add little rank"
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
            "batch: the gradient noise scale cannot be estimated from these batches: noise exceeds the gradient, or "
            "one batch decides it; probe with more --batches"
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
        text += (
            "; Muon makes all directions of an update equal, so that the rank of its updates says little of the rank "
            "that training needs"
        )
    return text
