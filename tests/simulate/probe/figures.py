"""Probes with given ranks, for tests of recommendations."""

from __future__ import annotations

from simulate.probe.schema import Layer, LayerGradient, Noise, Probe, ProbedData, ProbedModel, Settings, Spectrum, State

QUIET = Noise(
    gradient_square=2.0, gradient_variance=80.0, signal_share=0.8, scale_samples=40.0, scale_low_samples=30.0,
    scale_high_samples=60.0,
)  # fmt: skip
DROWNED = Noise(
    gradient_square=-1.0, gradient_variance=80.0, signal_share=0.0, scale_samples=None, scale_low_samples=None,
    scale_high_samples=None,
)  # fmt: skip


def spectrum(half: int, most: int) -> Spectrum:
    """Return a spectrum with k_50 and k_90."""
    return Spectrum(effective_rank=most, stable_rank=half, rank_50=half, rank_90=most, rank_99=2 * most)


def probe_of(
    *ranks: tuple[int, int],
    limit: int = 64,
    upper: int = 64,
    noise: Noise = QUIET,
    fingerprint: str = "none",
    grown: int = 1,
) -> Probe:
    """Return a probe of layers with these (k_50, k_90) of their round's update, on 4 devices with a head each.

    The update of all of the warm-up has `grown` times their ranks.
    """
    gradient = LayerGradient(spectrum=spectrum(1, 2), noise=noise)
    return Probe(
        network=ProbedModel(
            name="gpt", parameters=1000, adapted_parameters=900, largest_dimension=upper, smallest_dimension=limit,
            sizes={"name": "gpt"}, fingerprint=fingerprint,
        ),
        data=ProbedData(source="prose", fingerprint="text"),
        settings=Settings(
            seed=0, dtype="fp32", optimizer="adamw", learning_rate=1e-3, devices=4, heads=4, micro_batch=8,
            tokens_per_sample=16, batches=8, warmup_steps=50, round_steps=10,
        ),
        initial=State(steps=0, loss=5.0, noise=noise),
        warmed=State(steps=50, loss=4.0, noise=noise),
        layers=[
            Layer(
                name=f"layer{index}", outputs=limit, inputs=limit, initial=gradient, warmed=gradient,
                round_update=spectrum(*pair), update=spectrum(*(grown * rank for rank in pair)),
            )
            for index, pair in enumerate(ranks)
        ],
    )  # fmt: skip
